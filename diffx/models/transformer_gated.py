"""Gated attention (arXiv 2505.06708): the baseline, with a sigmoid gate on the output of heads."""

from torch import Tensor, nn

from diffx.config.model import Gate, TransformerGatedConfig
from diffx.models.attention import Attend
from diffx.models.transformer import TransformerAttention
from diffx.ops import attention


class TransformerGatedAttention(TransformerAttention):
    """Ordinary causal attention, times sigmoid(x W_g): a gate for each head, or each element."""

    def __init__(self, config: TransformerGatedConfig, layer: int):
        super().__init__(config, layer)
        heads, width = self.queries
        self.gates = (heads, 1 if config.gate is Gate.head else width)
        self.gate_proj = nn.Linear(config.hidden_size, heads * self.gates[1], bias=False)

    def context(self, x: Tensor, attend: Attend) -> Tensor:
        """The gated heads (B, T, H, d)."""
        return attend(attention) * self.gate_proj(x).sigmoid().unflatten(-1, self.gates)
