"""Differential Transformer V2 (January 2026): 2H query heads, a lambda per token and head.

Notation: B batch, T tokens, D model width, H and H_kv the baseline's heads, d = D/H, m the ratio of
signal maps to noise maps (1 in V2).
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from diffx.config.model import DiffV2Config, LambdaForm, Pairing
from diffx.models.attention import Attend, Attention
from diffx.models.view import AttentionView
from diffx.ops import attention, differential_attention


class DiffV2Attention(Attention):
    """Head j is o_2j - lambda_j o_(2j+1), which share a key/value head; no norm, no lambda_init.

    With a ratio m, groups of m + 1 maps make m heads, of which the last map is the noise.
    """

    def __init__(self, config: DiffV2Config, layer: int):
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        super().__init__(
            config,
            layer,
            queries=(heads + heads // config.ratio, d),
            keys=(kv_heads, d),
            values=(kv_heads, d),
            features=heads * d,
        )
        self.ratio, self.heads = config.ratio, heads
        self.across = config.pairing is Pairing.across
        self.sigmoid = config.lambda_form is LambdaForm.sigmoid
        self.lambda_proj = None
        if config.lambda_form is not LambdaForm.one:
            self.lambda_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def lambda_value(self, x: Tensor) -> Tensor:
        """Lambda = sigmoid(x W_lambda) for x (B, T, D), as (B, T, H); or the form of the config."""
        if self.lambda_proj is None:
            return x.new_ones(())
        lam: Tensor = self.lambda_proj(x)
        return lam.sigmoid() if self.sigmoid else lam

    def view(self, x: Tensor, cos: Tensor, sin: Tensor) -> AttentionView:
        """As in the base; across key/value heads, the maps are brought into groups."""
        view = super().view(x, cos, sin)
        if not self.across:
            return view
        maps = torch.arange(self.queries[0]).split([self.heads, self.heads // self.ratio])
        order = torch.cat([maps[0].unflatten(0, (-1, self.ratio)), maps[1][:, None]], 1).flatten()
        keys = [self.key_map[m] for m in order.tolist()]
        return replace(view, q=view.q[:, :, order], key_map=keys)

    def context(self, x: Tensor, attend: Attend) -> Tensor:
        """The differences (B, T, H, d)."""
        lam = self.lambda_value(x)
        if not self.across:
            return attend(partial(differential_attention, ratio=self.ratio), lam)
        # The maps of a head weigh the values of different heads.
        maps = attend(attention).split([self.heads, self.heads // self.ratio], 2)
        return torch.addcmul(
            maps[0], lam[..., None], maps[1].repeat_interleave(self.ratio, 2), value=-1
        )
