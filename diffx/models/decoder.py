"""The decoder: one for all architectures, pre-norm, RoPE, SwiGLU, no biases. The attention module is all that differs.

Notation: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffx.config.model import ModelConfig
from diffx.models.attention import Attention, attention_modules
from diffx.models.cache import KVCache
from diffx.models.diff_v1 import DiffV1Attention
from diffx.models.diff_v2 import DiffV2Attention
from diffx.models.layers import MLP, rope_tables
from diffx.models.transformer import TransformerAttention
from diffx.models.transformer_1p5h import Transformer1p5hAttention
from diffx.models.transformer_wide_head import TransformerWideHeadAttention
from diffx.ops import Documents

ATTENTION: dict[str, Callable[[Any, int], Attention]] = {
    "transformer": TransformerAttention,
    "transformer_wide_head": TransformerWideHeadAttention,
    "transformer_1p5h": Transformer1p5hAttention,
    "diff_v1": DiffV1Attention,
    "diff_v2": DiffV2Attention,
}

LOGITS = 2**26  # held at once where a loss is computed; backward computes those of each chunk again


class Block(nn.Module):
    """Attention, then the feed-forward layer, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = ATTENTION[config.kind](config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.ffn_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, documents: Documents | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A decoder-only language model; make it with ``build_model``.

    Attributes:
        config: the architecture and its shape.
        lm_head: the output projection; None where it is the embedding (``tie_embeddings``), see ``output_weight``.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: a model can be built only for a known vocabulary")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, layer) for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.rope_width = blocks[0].self_attn.rope_width
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """The matrix (V, D) that turns hidden states into logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, or with ``targets`` the loss.

        Args:
            input_ids: tokens (B, T).
            cache: keys and values of the tokens before these, which it then takes in; inference only.
            cu_seqlens: boundaries of the documents in the flattened batch (n + 1,), from 0 to B·T, the ends of rows among
                them; attention then stays within each document, at the cost of one call a document, but for the fused kernels.
            targets: next tokens (B, T), -100 where there is no loss.

        Returns:
            (B, T, V); or the sum of the targets' cross-entropies in nats, for which no more than a chunk of the logits is held at a time.

        Raises:
            ValueError: a cache that is full, boundaries that do not fit the batch, or both given.
        """
        hidden = self.forward_hidden(input_ids, cache=cache, cu_seqlens=cu_seqlens)
        if targets is None:
            return F.linear(hidden, self.output_weight)
        rows = max(1, LOGITS // self.embed_tokens.num_embeddings)
        if targets.numel() <= rows:
            return _loss(hidden.flatten(0, 1), self.output_weight, targets.flatten())
        chunks = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        losses = [checkpoint(_loss, part, self.output_weight, own, use_reentrant=False) for part, own in chunks]
        return torch.stack(losses).sum()

    def forward_hidden(self, input_ids: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """As ``forward``, up to the final norm: (B, T, D)."""
        if cu_seqlens is not None and cache is not None:
            raise ValueError("cache and cu_seqlens cannot be used together")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        if cache is not None:
            positions = positions + (cache.length if cache.positions is None else cache.positions[:, None])  # (B, T) if rows differ
        hidden = self.run_layers(self.embed_tokens(input_ids), positions, cache, cu_seqlens)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return hidden

    def run_layers(self, x: Tensor, positions: Tensor, cache: KVCache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Run all layers and the final norm.

        Args:
            x: embeddings (B, T, D).
            positions: of the tokens, (T,), or (B, T) where rows differ.
            cache: as in ``forward``; its length stays as it is.
            cu_seqlens: as in ``forward``.

        Returns:
            (B, T, D).
        """
        documents = None if cu_seqlens is None else _documents(cu_seqlens, *x.shape[:2])
        cos, sin = rope_tables(positions, self.rope_width, self.config.rope_theta)  # (T, width/2) or (B, T, width/2)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, documents)
        return self.norm(x)

    def num_parameters(self) -> dict[str, int]:
        """Parameters, split into the embedding (an untied output projection included) and the rest."""
        total = sum(parameter.numel() for parameter in self.parameters())
        embedding = self.embed_tokens.weight.numel() * (1 if self.lm_head is None else 2)
        return {"embedding": embedding, "rest": total - embedding, "total": total}

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs a token of forward and backward, at context length ``seq_len``; a multiply-add is two.

        6 for each parameter of a matrix product (the output projection included, the embedding lookup not), and
        6 for each multiply-add of attention, over the seq_len/2 keys that a token sees on average. A query map costs its
        width (logits) and its value's width (output) a key, which makes 4d for two heads of the baseline and 6d for one of DIFF V1.
        Backward counts as twice forward, and neither recomputation nor padding counts.
        """
        matrices = sum(module.weight.numel() for module in self.layers.modules() if isinstance(module, nn.Linear))
        attention = sum(module.macs_per_pair for module in attention_modules(self))
        return 6.0 * (matrices + self.output_weight.numel()) + 6.0 * attention * seq_len / 2


def build_model(config: ModelConfig, *, device: torch.device | str | None = None) -> Decoder:
    """Allocate a decoder without setting its parameters: call ``init_weights``, or load a state dict.

    Args:
        config: the architecture; ``vocab_size`` must be set.
        device: where to allocate; None is PyTorch's default device (``torch.device("meta")`` allocates nothing).

    Raises:
        ValueError: ``config.vocab_size`` is None.
    """
    with torch.device("meta"):  # so that no layer draws random numbers of its own
        model = Decoder(config)
    return model.to_empty(device=torch.get_default_device() if device is None else device)


def _loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of targets (N,) that are not -100 behind hidden states (N, D)."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum")


def _documents(cu_seqlens: Tensor, batch: int, length: int) -> Documents:
    bounds = cu_seqlens.tolist()  # device sync
    lengths = [end - start for start, end in pairwise(bounds)]
    rows = set(range(0, batch * length + 1, length))
    if bounds[0] != 0 or bounds[-1] != batch * length or min(lengths) < 1 or not rows <= set(bounds):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to B·T={batch * length} through every row's end (T={length})")
    return Documents(lengths, cu_seqlens)
