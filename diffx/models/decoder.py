"""The decoder of all architectures: pre-norm, RoPE, SwiGLU or PolyNorm, no biases.

Architectures differ in the attention module only.

Notation: B batch, T tokens, D model width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffx.config.model import ModelConfig
from diffx.models.attention import Attention, attention_modules
from diffx.models.cache import KVCache
from diffx.models.diff_gda import DiffGDAAttention
from diffx.models.diff_v1 import DiffV1Attention
from diffx.models.diff_v2 import DiffV2Attention
from diffx.models.layers import MLP, rope_tables
from diffx.models.transformer import TransformerAttention
from diffx.models.transformer_1p5h import Transformer1p5hAttention
from diffx.models.transformer_gated import TransformerGatedAttention
from diffx.models.transformer_sink import TransformerSinkAttention
from diffx.models.transformer_wide_head import TransformerWideHeadAttention
from diffx.ops import Documents

ATTENTION: dict[str, Callable[[Any, int], Attention]] = {
    "transformer": TransformerAttention,
    "transformer_wide_head": TransformerWideHeadAttention,
    "transformer_1p5h": Transformer1p5hAttention,
    "transformer_gated": TransformerGatedAttention,
    "transformer_sink": TransformerSinkAttention,
    "diff_v1": DiffV1Attention,
    "diff_gda": DiffGDAAttention,
    "diff_v2": DiffV2Attention,
}

LOGITS = 2**26  # held at once to compute a loss; backward computes them again, chunk by chunk


class Block(nn.Module):
    """Attention, then the feed-forward layer, each pre-norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = ATTENTION[config.kind](config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Map (B, T, D) to (B, T, D), given the further arguments of ``Attention.forward``."""
        x = x + self.self_attn(self.input_layernorm(x), *args)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A decoder-only language model; ``build_model`` allocates it.

    Attributes:
        config: the architecture and its shape.
        lm_head: the output projection; None with ``tie_embeddings``, see ``output_weight``.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set: a model needs a known vocabulary")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, layer) for layer in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.rope_width = blocks[0].self_attn.rope_width
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

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
            cache: keys and values of the tokens before these, which are appended to it; inference
                only.
            cu_seqlens: boundaries of the documents in the flattened batch (n + 1,), from 0 to B·T,
                among them every end of a row; a token then attends within its document. All but the
                fused kernels take one call per document.
            targets: next tokens (B, T), -100 where there is no loss.

        Returns:
            Logits (B, T, V), or the sum of the cross-entropies of the targets in nats, computed in
            chunks of logits.

        Raises:
            ValueError: a full cache, boundaries that do not fit the batch, or both a cache and
                boundaries.
        """
        hidden = self.forward_hidden(input_ids, cache=cache, cu_seqlens=cu_seqlens)
        if targets is None:
            return F.linear(hidden, self.output_weight)
        rows = max(1, LOGITS // self.embed_tokens.num_embeddings)
        if targets.numel() <= rows:
            return _loss(self.output_weight, hidden.flatten(0, 1), targets.flatten())
        chunks = zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        loss = partial(checkpoint, _loss, self.output_weight, use_reentrant=False)
        return torch.stack([loss(*chunk) for chunk in chunks]).sum()

    def forward_hidden(
        self, input_ids: Tensor, *, cache: KVCache | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """As ``forward``, up to the final norm: (B, T, D)."""
        if cu_seqlens is not None and cache is not None:
            raise ValueError("cache and cu_seqlens cannot be used together")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
        if cache is not None:  # (B, T) if rows differ
            past = cache.length if cache.positions is None else cache.positions[:, None]
            positions = positions + past
        hidden = self.run_layers(self.embed_tokens(input_ids), positions, cache, cu_seqlens)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return hidden

    def run_layers(
        self,
        x: Tensor,
        positions: Tensor,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Map embeddings (B, T, D) to (B, T, D) by all layers and the final norm.

        ``positions`` are those of the tokens, (T,), or (B, T) where rows differ; see ``forward``
        for ``cache``, whose length is not advanced, and ``cu_seqlens``.
        """
        documents = None if cu_seqlens is None else _documents(cu_seqlens, *x.shape[:2])
        # (T, width/2) or (B, T, width/2)
        cos, sin = rope_tables(positions, self.rope_width, self.config.rope_theta)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, documents)
        return self.norm(x)

    def num_parameters(self) -> dict[str, int]:
        """Parameters: ``embedding`` (with an untied output projection), ``rest`` and ``total``."""
        total = sum(parameter.numel() for parameter in self.parameters())
        embedding = self.embed_tokens.weight.numel() * (1 if self.lm_head is None else 2)
        return {"embedding": embedding, "rest": total - embedding, "total": total}

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs per token of forward and backward at context length ``seq_len``.

        Each parameter of a matrix product (the output projection included, the embedding lookup
        excluded) counts 6, and so does each multiply-add of attention (``macs_per_pair``), over the
        seq_len/2 keys of an average token. A multiply-add is two FLOPs, backward twice forward;
        recomputation and padding do not count.
        """
        linear = (module for module in self.layers.modules() if isinstance(module, nn.Linear))
        matrices = sum(module.weight.numel() for module in linear)
        attention = sum(module.macs_per_pair for module in attention_modules(self))
        return 6.0 * (matrices + self.output_weight.numel()) + 6.0 * attention * seq_len / 2


def build_model(config: ModelConfig, *, device: torch.device | str | None = None) -> Decoder:
    """Allocate a decoder on ``device``, or PyTorch's default device if it is None.

    Its parameters are then set by ``init_weights`` or a state dict.

    Raises:
        ValueError: ``config.vocab_size`` is None.
    """
    with torch.device("meta"):  # so that no layer draws random numbers
        model = Decoder(config)
    return model.to_empty(device=torch.get_default_device() if device is None else device)


def _loss(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of targets (N,), except -100, given hidden states (N, D)."""
    return F.cross_entropy(
        F.linear(hidden, weight).float(), targets, ignore_index=-100, reduction="sum"
    )


def _documents(cu_seqlens: Tensor, batch: int, length: int) -> Documents:
    bounds = cu_seqlens.tolist()  # device sync
    lengths = [end - start for start, end in pairwise(bounds)]
    rows = set(range(0, batch * length + 1, length))
    if not {bounds[0], bounds[-1]} <= rows <= set(bounds) or min(lengths) < 1:
        raise ValueError(
            f"cu_seqlens={bounds} must rise from 0 to B·T={batch * length} through every row's "
            f"end (T={length})"
        )
    return Documents(lengths, cu_seqlens)
