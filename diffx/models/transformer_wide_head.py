"""The wide-head Transformer of the DIFF V1 ablations: H/2 heads of width 2d, optional head norm.

Notation: B batch, T tokens, Tk keys, D model width, H and H_kv the baseline's heads, d = D/H.
"""

from torch import Tensor

from diffx.config.model import TransformerWideHeadConfig
from diffx.models.attention import Attention
from diffx.models.cache import KVCache
from diffx.models.layers import sublayer_norm
from diffx.ops import Documents, attention


class TransformerWideHeadAttention(Attention):
    """Ordinary causal attention of H/2 heads, each twice as wide."""

    context_module = "sublayer_norm"

    def __init__(self, config: TransformerWideHeadConfig, layer: int):
        heads, kv_heads, width = (
            config.num_heads // 2,
            config.num_kv_heads // 2,
            2 * config.head_dim,
        )
        super().__init__(
            config,
            layer,
            queries=(heads, width),
            keys=(kv_heads, width),
            values=(kv_heads, width),
            context=heads * width,
        )
        self.sublayer_norm = sublayer_norm(config, width)

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
        # (B, T, H/2, 2d), (B, Tk, H_kv/2, 2d), (B, Tk, H_kv/2, 2d)
        q, k, v = self.project(x, cos, sin, cache)
        return self.o_proj(
            self.sublayer_norm(self.attend(attention, q, k, v, documents, cache)).flatten(2)
        )
