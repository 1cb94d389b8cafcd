"""The baseline Transformer: H heads of width d, softmax attention, grouped queries."""

from torch import Tensor

from diffx.config.model import ModelConfig
from diffx.models.attention import Attention


class TransformerAttention(Attention):
    """Ordinary causal attention.

    Args:
        config: configuration of the decoder.
        layer: index of the layer, from 0.
        heads: query heads; None is H.
        kv_heads: key/value heads; None is H_kv.
        width: of a head; None is d.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        heads: int | None = None,
        kv_heads: int | None = None,
        width: int | None = None,
    ):
        heads, width = heads or config.num_heads, width or config.head_dim
        keys = (kv_heads or config.num_kv_heads, width)
        queries, features = (heads, width), heads * width
        super().__init__(config, layer, queries=queries, keys=keys, values=keys, features=features)

    def lambda_value(self, x: Tensor) -> None:
        """None: nothing is subtracted."""
