"""Differential Transformer V2 (January 2026): 2H query heads, a lambda per token and head.

Notation: B batch, T tokens, D model width, H and H_kv the baseline's heads, d = D/H.
"""

import torch
from torch import Tensor, nn

from diffx.config.model import DiffV2Config
from diffx.models.attention import Attend, Attention
from diffx.ops import attention


class DiffV2Attention(Attention):
    """Head j is o_2j - lambda_j o_(2j+1), which share a key/value head; no norm, no lambda_init."""

    def __init__(self, config: DiffV2Config, layer: int):
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        super().__init__(
            config,
            layer,
            queries=(2 * heads, d),
            keys=(kv_heads, d),
            values=(kv_heads, d),
            features=heads * d,
        )
        self.lambda_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def lambda_value(self, x: Tensor) -> Tensor:
        """Lambda = sigmoid(x W_lambda) for x (B, T, D), as (B, T, H)."""
        return self.lambda_proj(x).sigmoid()

    def context(self, x: Tensor, attend: Attend) -> Tensor:
        """The differences (B, T, H, d)."""
        first, second = attend(attention).unflatten(2, (-1, 2)).unbind(3)
        return torch.addcmul(first, self.lambda_value(x)[..., None], second, value=-1)
