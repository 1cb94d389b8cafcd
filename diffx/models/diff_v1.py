"""Differential Transformer V1 (Ye et al., arXiv 2410.05258, equations 1 to 3).

Notation: B batch, T tokens, D model width, H and H_kv the baseline's heads, d = D/H, l the
layer from 0, h = H/2 differential heads: query maps 2j and 2j+1, of width d, make head j, whose
value is 2d wide. With a ratio m of signal maps to a noise map, groups of m + 1 maps make m heads.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from diffx.config.model import DiffV1Config, Halve, LambdaScope, Sign
from diffx.models.attention import Attend, Attention
from diffx.models.layers import KeepsFp32, sublayer_norm
from diffx.ops import differential_attention


class DiffV1Attention(KeepsFp32, Attention):
    """Each head is the difference of two softmax maps, A1 - lambda A2, followed by a norm.

    Args:
        config: configuration of the decoder.
        layer: index of the layer, from 0.
        noise_maps: number of noise maps; None is h.
        ratio: signal maps for each noise map.

    Attributes:
        lambda_init: the initial lambda: 0.8 - 0.6·exp(-0.3·l), or the constant of the config.
        sign: -1 where the second map is added.
        lambda_q1: with ``lambda_k1``, ``lambda_q2`` and ``lambda_k2`` the parameters of lambda:
            (d,), or (h, d) with a lambda for each head; always fp32.
        sublayer_norm: RMSNorm over a head's 2d features, its gain shared by the heads;
            ``nn.Identity`` when off.
    """

    context_module = "sublayer_norm"

    def __init__(
        self, config: DiffV1Config, layer: int, noise_maps: int | None = None, ratio: int = 1
    ):
        heads, kv_heads, width = config.num_heads // 2, config.num_kv_heads // 2, config.head_dim
        if config.halve is Halve.head_dim:  # H heads with maps of width d/2 and values of width d
            heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim // 2
        noise_maps = heads if noise_maps is None else noise_maps
        self.ratio, heads = ratio, ratio * noise_maps
        super().__init__(
            config,
            layer,
            queries=(heads + noise_maps, width),
            keys=(2 * kv_heads, width),
            values=(kv_heads, 2 * width),
            features=heads * 2 * width,
        )
        given = config.lambda_init
        depth = layer - (given == "depth-1")
        by_depth = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lambda_init = by_depth if isinstance(given, str) else float(given)
        self.sign = -1 if config.sign is Sign.plus else 1
        shape = (heads, width) if config.lambda_scope is LambdaScope.head else (width,)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.empty(shape)) for _ in range(4)
        )
        self.sublayer_norm = sublayer_norm(config, 2 * width)

    @property
    def key_map(self) -> list[int]:
        """Signal maps use key map 2g and noise maps 2g + 1, where g is the group of their head."""
        per_group, noise = 2 * self.queries[0] // self.keys[0], self.ratio
        return [2 * (m // per_group) + (m % (noise + 1) == noise) for m in range(self.queries[0])]

    def lambda_value(self, x: Tensor | None = None) -> Tensor:
        """Lambda = exp(lq1·lk1) - exp(lq2·lk2) + lambda_init (equation 2) in fp32, () or (h,).

        It is negative where the second map is added.
        """
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        first = (self.lambda_q1 * self.lambda_k1).sum(-1, dtype=dtype).exp()
        second = (self.lambda_q2 * self.lambda_k2).sum(-1, dtype=dtype).exp()
        return self.sign * (first - second + self.lambda_init)

    def context(self, x: Tensor, attend: Attend) -> Tensor:
        """The normed differences (B, T, h, 2d), times 1 - lambda_init."""
        out = attend(partial(differential_attention, ratio=self.ratio), self.lambda_value())
        return (1 - self.lambda_init) * self.sublayer_norm(out)
