"""Attention with a sink logit (gpt-oss); with logits of zero this is the off-by-one softmax."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from diffx.config.model import Sink, TransformerSinkConfig
from diffx.models.attention import Attend
from diffx.models.transformer import TransformerAttention
from diffx.models.view import AttentionView
from diffx.ops import attention


class TransformerSinkAttention(TransformerAttention):
    """Causal attention whose softmax has exp(sink) as a further term of its denominator.

    Attributes:
        sinks: the logit s of each head (H,); None with ``sink=zero``.
    """

    def __init__(self, config: TransformerSinkConfig, layer: int):
        super().__init__(config, layer)
        self.sinks: Tensor | None = None
        if config.sink is Sink.learned:
            self.sinks = nn.Parameter(torch.empty(config.num_heads))

    def view(self, x: Tensor, cos: Tensor, sin: Tensor) -> AttentionView:
        """As in the base, with the sinks."""
        return replace(super().view(x, cos, sin), sinks=self._logits(x))

    def context(self, x: Tensor, attend: Attend) -> Tensor:
        """The weighted values (B, T, H, d)."""
        return attend(partial(attention, sinks=self._logits(x)))

    def _logits(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.queries[0]) if self.sinks is None else self.sinks
