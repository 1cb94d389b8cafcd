"""The base of the attention modules: projections, RoPE, the cache, and document masks.

Notation: B batch, T tokens, Tk keys (more than T with a cache), D model width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffx.config.model import ModelConfig
from diffx.models.cache import KVCache
from diffx.models.layers import apply_rope
from diffx.models.view import AttentionView
from diffx.ops import Documents, attention

Attend = Callable[..., Tensor]  # applies an operation of diffx.ops, given it and its lambda


class Attention(nn.Module, ABC):
    """Base of the attention modules.

    A subclass defines ``lambda_value``; where they differ from the base's also ``context``,
    ``key_map`` (if its maps use the keys in another order) and ``context_module``. Logs, suites and
    head selection read these.

    Args:
        config: configuration of the decoder.
        layer: index of the layer, from 0.
        queries: query heads (or maps) and their width.
        keys: key heads (or maps) and their width.
        values: value heads and their width.
        features: features that enter ``o_proj``.

    Attributes:
        layer: index of the layer, from 0.
        ratio: signal maps for each noise map of differential heads.
        implementation: the ``impl`` of the operations of ``diffx.ops`` that the module calls; None
            picks one by device and length.
        context_module: name of the submodule whose input is the context (the weighted values, after
            any subtraction).
    """

    context_module = "o_proj"
    ratio = 1
    implementation: Any = None

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        queries: tuple[int, int],
        keys: tuple[int, int],
        values: tuple[int, int],
        features: int,
    ):
        super().__init__()
        self.layer = layer
        self.queries, self.keys, self.values = queries, keys, values
        width = config.hidden_size
        self.q_proj = nn.Linear(width, queries[0] * queries[1], bias=False)
        self.k_proj = nn.Linear(width, keys[0] * keys[1], bias=False)
        self.v_proj = nn.Linear(width, values[0] * values[1], bias=False)
        self.o_proj = nn.Linear(features, width, bias=False)

    @property
    def rope_width(self) -> int:
        """Width of a query."""
        return self.queries[1]

    @property
    def macs_per_pair(self) -> int:
        """Forward multiply-adds of a query-key pair: logit and weighted value of each query map."""
        return self.queries[0] * (self.queries[1] + self.values[1])

    @property
    def key_map(self) -> list[int]:
        """The key map of each query map: neighbours share one."""
        return [m // (self.queries[0] // self.keys[0]) for m in range(self.queries[0])]

    @abstractmethod
    def lambda_value(self, x: Tensor) -> Tensor | None:
        """Lambda of each head: its noise map, times lambda, is subtracted from its signal map.

        Returns:
            A tensor broadcastable to (B, T, heads), given the input x (B, T, D) of the module; None
            where nothing is subtracted and each query map is a head.
        """

    def view(self, x: Tensor, cos: Tensor, sin: Tensor) -> AttentionView:
        """Queries and keys of an input x (B, T, D), without a cache; see ``project``."""
        q, k, _ = self.project(x, cos, sin)
        scale, lam = q.shape[3] ** -0.5, self.lambda_value(x)
        return AttentionView(q=q, k=k, key_map=self.key_map, scale=scale, lam=lam, ratio=self.ratio)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, D); with a cache, keys and values of all tokens.

        Returns:
            q (B, T, *queries), k (B, Tk, *keys), v (B, Tk, *values).
        """
        q = apply_rope(self.q_proj(x).unflatten(-1, self.queries), cos, sin)
        k = apply_rope(self.k_proj(x).unflatten(-1, self.keys), cos, sin)
        v = self.v_proj(x).unflatten(-1, self.values)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return q, k, v

    def context(self, x: Tensor, attend: Attend) -> Tensor:
        """The input of ``o_proj`` before its heads are joined, (B, T, heads, width).

        ``attend`` applies an operation of ``diffx.ops`` to the queries, keys and values of the
        module's input x (B, T, D), and to lambda if it is given.
        """
        return attend(attention)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            x: input of the module.
            cos: cosines of ``rope_tables``.
            sin: sines of ``rope_tables``.
            cache: keys and values of the tokens before these; its padding is masked.
            documents: the documents in the flattened batch of B·T tokens; each is within one row.
        """
        q, k, v = self.project(x, cos, sin, cache)

        def attend(op: Callable[..., Tensor], *lam: Tensor) -> Tensor:
            if cache is not None and cache.valid is not None:
                mask = cache.valid[:, : k.shape[1]]
                return op(q, k, v, *lam, impl=self.implementation, key_mask=mask)
            if documents is None:
                return op(q, k, v, *lam, impl=self.implementation)
            flat = (x.flatten(0, 1)[None] if x.ndim > 2 else x for x in (q, k, v, *lam))
            out = op(*flat, impl=self.implementation, documents=documents)
            return out.reshape(*q.shape[:2], -1, v.shape[-1])

        return self.o_proj(self.context(x, attend).flatten(2))


def attention_modules(model: nn.Module) -> list[Attention]:
    """The attention modules of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Attention)]
