"""Grouped differential attention (arXiv 2510.06949): several signal maps share a noise map."""

from diffx.config.model import DiffGDAConfig
from diffx.models.diff_v1 import DiffV1Attention


class DiffGDAAttention(DiffV1Attention):
    """DIFF V1 with ``ratio`` signal maps, and so as many heads, for each noise map."""

    def __init__(self, config: DiffGDAConfig, layer: int):
        super().__init__(config, layer, config.noise_maps, config.ratio)
