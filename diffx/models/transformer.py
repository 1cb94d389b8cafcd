"""The baseline Transformer: H heads of width d, softmax attention, grouped queries.

Notation: B batch, T tokens, Tk keys, D model width, H heads, H_kv key/value heads, d = D/H.
"""

from torch import Tensor

from diffx.config.model import ModelConfig
from diffx.models.attention import Attention
from diffx.models.cache import KVCache
from diffx.ops import Documents, attention


class TransformerAttention(Attention):
    """Ordinary causal attention.

    Args:
        config: configuration of the decoder.
        layer: index of the layer, from 0.
        heads: query heads; None is H.
    """

    def __init__(self, config: ModelConfig, layer: int, heads: int | None = None):
        heads, kv_heads, d = heads or config.num_heads, config.num_kv_heads, config.head_dim
        super().__init__(
            config,
            layer,
            queries=(heads, d),
            keys=(kv_heads, d),
            values=(kv_heads, d),
            context=heads * d,
        )

    def lambda_value(self, x: Tensor) -> None:
        """None: nothing is subtracted."""

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D); see ``project`` and ``attend`` for the arguments."""
        # (B, T, H, d), (B, Tk, H_kv, d), (B, Tk, H_kv, d)
        q, k, v = self.project(x, cos, sin, cache)
        return self.o_proj(self.attend(attention, q, k, v, documents, cache).flatten(2))
