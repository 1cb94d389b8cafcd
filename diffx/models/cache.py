"""Keys and values of previous tokens, for decoding token by token.

Notation: B batch, T tokens, H_kv key/value heads, d head width. Every architecture has H_kv·d key
and H_kv·d value features per token, so that all use the same cache.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from diffx.config.model import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer; for inference, without gradients.

    Args:
        config: configuration of the model.
        batch_size: sequences.
        max_len: tokens a sequence can reach.
        device: device of the model.
        dtype: type of the keys and values.

    Attributes:
        length: stored tokens, padding included; the decoder advances it after its last layer.
        valid: (B, max_len), false at padding; None where there is none.
        positions: (B,) tokens of each row, without padding; None where every row has ``length``.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = (config.num_layers, batch_size, max_len, config.num_kv_heads * config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_len = max_len
        self.length = 0
        self.valid: Tensor | None = None
        self.positions: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, T, heads, width) and return those of all tokens (B, length + T, ...).

        Raises:
            ValueError: they would exceed ``max_len``.
        """
        end = self.length + k.shape[1]
        if end > self.max_len:
            raise ValueError(f"a KV cache for {self.max_len} tokens cannot hold {end}")
        self.keys[layer, :, self.length : end] = k.flatten(2)
        self.values[layer, :, self.length : end] = v.flatten(2)
        keys, values = self.keys[layer, :, :end], self.values[layer, :, :end]
        return keys.unflatten(2, k.shape[2:]), values.unflatten(2, v.shape[2:])

    def advance(self, tokens: int) -> None:
        """Add ``tokens``, which every layer has stored, to the length."""
        self.length += tokens
        if self.positions is not None:
            self.positions = self.positions + tokens

    def drop_padding(self, padding: list[int]) -> None:
        """Mask the last ``padding`` tokens of each row and leave them out of its positions."""
        if not any(padding):
            return
        batch, device = self.keys.shape[1], self.keys.device
        if self.valid is None or self.positions is None:
            self.valid = torch.ones(batch, self.max_len, dtype=torch.bool, device=device)
            self.positions = torch.full((batch,), self.length, device=device)
        count = torch.tensor(padding, device=device)
        places = torch.arange(self.max_len, device=device)
        self.valid &= (places < self.length - count[:, None]) | (places >= self.length)
        self.positions = self.positions - count

    def select(self, rows: Tensor, free: int = 0) -> "KVCache":
        """Copy the rows of these indices (n,) into a cache for ``free`` further tokens."""
        new = copy.copy(self)
        new.max_len = self.length + free
        shape = (self.keys.shape[0], len(rows), new.max_len, self.keys.shape[3])
        new.keys, new.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        for copied, stored in ((new.keys, self.keys), (new.values, self.values)):
            copied[:, :, : self.length] = stored[:, rows, : self.length]
        if self.valid is not None and self.positions is not None:
            new.valid = F.pad(self.valid[rows, : self.length], (0, free), value=True)
            new.positions = self.positions[rows]
        return new
