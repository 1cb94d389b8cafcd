"""The differential step before an output projection (arXiv 2505.16333, equations 3 to 5).

Notation: B batch, T tokens, H heads, d_v width of a head's output O, t optimizer steps done, T_a
annealing steps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diffx.config.dex import Init, Share
from diffx.models.layers import KeepsFp32


class DexProjection(KeepsFp32):
    """An output projection whose input is O - lambda(t) O W_D instead of O, in chosen heads.

    Args:
        proj: the pretrained projection, (B, T, H·d_v) to (B, T, D).
        num_heads: H.
        width: d_v.
        heads: indices of the chosen heads.
        layer: l, from 0; lambda_init = 0.8 - 0.6·exp(-0.3·l).
        share: one W_D for the layer, or one for each head.
        sign: -1 subtracts (DEX), +1 adds (its control).
        anneal_steps: T_a; 0 is lambda_learn from the start, None a constant lambda_init.

    Attributes:
        w_d: W_D, fp32, (d_v, d_v) or (H, d_v, d_v).
        lambda_learn: the learned part of lambda, fp32; None where lambda is fixed.
    """

    chosen: Tensor
    schedule: Tensor

    def __init__(
        self,
        proj: nn.Module,
        num_heads: int,
        width: int,
        heads: list[int],
        layer: int,
        *,
        share: Share = Share.layer,
        sign: int = -1,
        anneal_steps: int | None = 0,
    ):
        super().__init__()
        self.proj = proj
        self.num_heads, self.width, self.heads, self.sign, self.anneal_steps = (
            num_heads,
            width,
            sorted(heads),
            sign,
            anneal_steps,
        )
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        fp32: dict[str, Any] = {"device": next(proj.parameters()).device, "dtype": torch.float32}
        shape = (width, width) if share is Share.layer else (num_heads, width, width)
        self.w_d = nn.Parameter(torch.zeros(shape, **fp32))
        # (1,): FSDP cannot shard ()
        self.lambda_learn = None if anneal_steps is None else nn.Parameter(torch.zeros(1, **fp32))
        chosen = torch.zeros(num_heads, 1, **fp32)
        chosen[self.heads] = 1
        # (H, 1); persistent, so that it survives a model built on the meta device
        self.register_buffer("chosen", chosen)
        # weights of lambda_init and lambda_learn
        self.register_buffer("schedule", torch.zeros(2, **fp32))
        self.set_step(0)

    def initialize(self, init: Init, generator: torch.Generator) -> None:
        """Set W_D to zeros, or as ``nn.Linear``: uniform within 1/sqrt(d_v), drawn on the CPU."""
        with torch.no_grad():
            if init is Init.linear:
                bound = self.width**-0.5
                self.w_d.copy_((torch.rand(self.w_d.shape, generator=generator) * 2 - 1) * bound)
            else:
                self.w_d.zero_()

    def set_step(self, step: int) -> None:
        """Set t: lambda(t) = (1 - a)·(t/T_a)·lambda_init + a·lambda_learn, a = min(1, t/T_a)."""
        if self.anneal_steps is None:
            weights = (1.0, 0.0)
        else:
            progress = step / self.anneal_steps if self.anneal_steps else 1.0
            a = min(1.0, progress)
            weights = ((1 - a) * progress, a)
        self.schedule.copy_(torch.tensor(weights, dtype=self.schedule.dtype))

    def lambda_value(self) -> Tensor:
        """Lambda(t), fp32 (1,), without a device sync."""
        fixed = self.schedule[:1] * self.lambda_init
        return fixed if self.lambda_learn is None else fixed + self.schedule[1:] * self.lambda_learn

    def matrix(self) -> Tensor:
        """``sign`` · lambda(t) W_D, fp32, (d_v, d_v) or (H, d_v, d_v)."""
        # lambda times W_D, not times O W_D, saves a (B, T, D) for backward
        return self.sign * self.lambda_value() * self.w_d

    def change(self, o: Tensor) -> Tensor:
        """O (B, T, H, d_v) times ``matrix``, for every head."""
        w = self.matrix().to(o.dtype)
        return o @ w if w.ndim == 2 else torch.einsum("...hd,hde->...he", o, w)

    def forward(self, o: Tensor) -> Tensor:
        """Map (B, T, H·d_v) to (B, T, D)."""
        heads = o.unflatten(-1, (self.num_heads, self.width))  # (B, T, H, d_v)
        # chosen is (H, 1); the other heads stay the same bit for bit
        return self.proj(
            torch.addcmul(heads, self.change(heads).to(o.dtype), self.chosen.to(o.dtype)).flatten(
                -2
            )
        )

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """Weight of the equivalent projection in fp64: (I - lambda W_D) W_O in chosen heads."""
        weight = projection_weight(self.proj).double()
        columns = weight if isinstance(self.proj, Conv1D) else weight.T  # (H·d_v, D)
        per_head = columns.unflatten(0, (self.num_heads, self.width))  # (H, d_v, D)
        w = self.matrix().double().expand(self.num_heads, self.width, self.width)
        folded = per_head + self.chosen.double()[..., None] * (w @ per_head)
        folded = folded.flatten(0, 1)
        return folded if isinstance(self.proj, Conv1D) else folded.T


class PartlyTrained(nn.Module):
    """A projection of which only some output features are trained.

    Args:
        proj: the pretrained map, ``nn.Linear`` or Conv1D; its weight stays frozen.
        rows: the output features that are trained.

    Attributes:
        rows: the weights of these features, (n, in), fp32; they replace those of ``proj``.
    """

    index: Tensor

    def __init__(self, proj: nn.Module, rows: list[int]):
        super().__init__()
        self.proj = proj
        weight = projection_weight(proj)
        self.dim = 1 if isinstance(proj, Conv1D) else 0
        self.register_buffer("index", torch.tensor(rows, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach().index_select(self.dim, self.index).float())

    @property
    def weight(self) -> Tensor:
        """The whole weight, in the layout of the pretrained one."""
        frozen = projection_weight(self.proj)
        return frozen.index_copy(self.dim, self.index, self.rows.to(frozen.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        bias = self.proj.bias
        assert bias is None or isinstance(bias, Tensor)
        return F.linear(x, self.weight.T if self.dim else self.weight, bias)


def projection_weight(proj: nn.Module) -> Tensor:
    """The weight of an ``nn.Linear`` (out, in) or a Conv1D (in, out)."""
    weight = proj.weight
    assert isinstance(weight, Tensor)
    return weight
