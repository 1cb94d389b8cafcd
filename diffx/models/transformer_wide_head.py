"""The wide-head Transformer of the DIFF V1 ablations: H/2 heads of width 2d, optional head norm."""

from torch import Tensor

from diffx.config.model import TransformerWideHeadConfig
from diffx.models.attention import Attend
from diffx.models.layers import sublayer_norm
from diffx.models.transformer import TransformerAttention
from diffx.ops import attention


class TransformerWideHeadAttention(TransformerAttention):
    """Ordinary causal attention of H/2 heads, each twice as wide."""

    context_module = "sublayer_norm"

    def __init__(self, config: TransformerWideHeadConfig, layer: int):
        heads, kv_heads = config.num_heads // 2, config.num_kv_heads // 2
        super().__init__(config, layer, heads, kv_heads, width=2 * config.head_dim)
        self.sublayer_norm = sublayer_norm(config, 2 * config.head_dim)

    def context(self, x: Tensor, attend: Attend) -> Tensor:
        """The normed heads (B, T, H/2, 2d)."""
        return self.sublayer_norm(attend(attention))
