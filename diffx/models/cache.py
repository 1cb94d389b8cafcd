"""Keys and values of the tokens seen so far, for decoding a token at a time.

Notation: B batch, T tokens, H_kv key/value heads, d head width. All architectures keep H_kv·d keys and H_kv·d values a
token, however they cut them into heads, so one cache serves them all.
"""

import torch
from torch import Tensor

from diffx.config.model import ModelConfig


class KVCache:
    """Preallocated keys and values of every layer; for inference, without gradients.

    Args:
        config: the model's.
        batch_size: sequences.
        max_len: tokens a sequence can reach.
        device: where the model is.
        dtype: type of the keys and values.

    Attributes:
        length: tokens held; the decoder advances it after its last layer.
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_len: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        shape = (config.num_layers, batch_size, max_len, config.num_kv_heads * config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_len = max_len
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' k and v (B, T, heads, width) and return those of all tokens (B, length + T, heads, width).

        Raises:
            ValueError: there is no room for them.
        """
        end = self.length + k.shape[1]
        if end > self.max_len:
            raise ValueError(f"a KV cache for {self.max_len} tokens cannot hold {end}")
        self.keys[layer, :, self.length : end] = k.flatten(2)
        self.values[layer, :, self.length : end] = v.flatten(2)
        return self.keys[layer, :, :end].unflatten(2, k.shape[2:]), self.values[layer, :, :end].unflatten(2, v.shape[2:])
