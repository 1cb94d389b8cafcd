"""The parameter-matched baseline of DIFF V2: 1.5·H query heads and H_kv key/value heads."""

from diffx.config.model import Transformer1p5hConfig
from diffx.models.transformer import TransformerAttention


class Transformer1p5hAttention(TransformerAttention):
    """Ordinary causal attention with 1.5·H query heads."""

    def __init__(self, config: Transformer1p5hConfig, layer: int):
        super().__init__(config, layer, heads=3 * config.num_heads // 2)
