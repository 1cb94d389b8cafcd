"""Differential Transformer V2 (January 2026): 2H query heads, a lambda per token and head.

Notation: B batch, T tokens, Tk keys, D model width, H and H_kv the baseline's heads, d = D/H.
"""

import torch
from torch import Tensor, nn

from diffx.config.model import DiffV2Config
from diffx.models.attention import Attention
from diffx.models.cache import KVCache
from diffx.ops import Documents, attention


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
            context=heads * d,
        )
        self.lambda_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def lambda_value(self, x: Tensor) -> Tensor:
        """Lambda = sigmoid(x W_lambda) for x (B, T, D), as (B, T, H)."""
        return self.lambda_proj(x).sigmoid()

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D); see ``project`` and ``attend`` for the arguments."""
        # (B, T, 2H, d), (B, Tk, H_kv, d), (B, Tk, H_kv, d)
        q, k, v = self.project(x, cos, sin, cache)
        # (B, T, H, d) each
        first, second = (
            self.attend(attention, q, k, v, documents, cache).unflatten(2, (-1, 2)).unbind(3)
        )
        out = torch.addcmul(first, self.lambda_value(x)[..., None], second, value=-1)
        return self.o_proj(out.flatten(2))
