"""The parameter-matched baseline of DIFF V2: 1.5·H query heads of width d, the H_kv key/value heads of the baseline."""

from diffx.config.model import Transformer1p5hConfig
from diffx.models.transformer import TransformerAttention


class Transformer1p5hAttention(TransformerAttention):
    """Ordinary causal attention with half as many query heads again."""

    def __init__(self, config: Transformer1p5hConfig, layer: int):
        super().__init__(config, layer, heads=3 * config.num_heads // 2)
