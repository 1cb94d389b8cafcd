"""The differential step before an output projection (arXiv 2505.16333, equations 3 to 5).

Notation: B batch, T tokens, H heads, d_v width of a head's output O, t optimizer steps done of T_a.
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

    It maps (B, T, H·d_v) to (B, T, D), as ``proj`` does. W_D is (d_v, d_v) for the layer or
    (H, d_v, d_v), one for each head.
    """

    chosen: Tensor  # (H, 1), 1 or 0
    schedule: Tensor  # (2,), the weights of lambda_init and lambda_learn in lambda(t)

    def __init__(
        self,
        proj: nn.Module,
        num_heads: int,  # H
        width: int,  # d_v
        heads: list[int],  # the chosen ones
        layer: int,  # from 0
        *,
        share: Share = Share.layer,
        sign: int = -1,  # +1 adds, as a control
        anneal_steps: int | None = 0,  # T_a; 0: lambda_learn from the start, None: lambda_init
    ):
        super().__init__()
        self.proj = proj
        self.num_heads, self.width, self.heads = num_heads, width, sorted(heads)
        self.sign, self.anneal_steps = sign, anneal_steps
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        fp32: dict[str, Any] = {"device": next(proj.parameters()).device, "dtype": torch.float32}
        shape = (width, width) if share is Share.layer else (num_heads, width, width)
        self.w_d = nn.Parameter(torch.zeros(shape, **fp32))
        self.lambda_learn = None
        if anneal_steps is not None:
            self.lambda_learn = nn.Parameter(torch.zeros(1, **fp32))  # FSDP cannot shard ()
        chosen = torch.zeros(num_heads, 1, **fp32)
        chosen[self.heads] = 1
        # Persistent, so that they survive a model built on the meta device.
        self.register_buffer("chosen", chosen)
        self.register_buffer("schedule", torch.zeros(2, **fp32))
        self.set_step(0)

    def initialize(self, init: Init, generator: torch.Generator) -> None:
        """Set W_D, which is 0, as ``nn.Linear`` does if ``init`` is ``linear``, on the CPU."""
        if init is Init.linear:
            uniform = torch.rand(self.w_d.shape, generator=generator) * 2 - 1
            self.w_d.data.copy_(uniform * self.width**-0.5)

    def set_step(self, step: int) -> None:
        """Set t: lambda(t) = (1 - a)·(t/T_a)·lambda_init + a·lambda_learn, a = min(1, t/T_a)."""
        weights = (1.0, 0.0)
        if self.anneal_steps is not None:
            a = min(1.0, step / self.anneal_steps) if self.anneal_steps else 1.0
            weights = ((1 - a) * a, a)
        self.schedule.copy_(torch.tensor(weights, dtype=self.schedule.dtype))

    def lambda_value(self) -> Tensor:
        """Lambda(t), fp32 (1,), without a device sync."""
        learned = 0 if self.lambda_learn is None else self.schedule[1:] * self.lambda_learn
        return self.schedule[:1] * self.lambda_init + learned

    def matrix(self) -> Tensor:
        """``sign`` · lambda(t) W_D, fp32."""
        # Lambda multiplies W_D, not O W_D, which would save a (B, T, D) for backward.
        return self.sign * self.lambda_value() * self.w_d

    def change(self, o: Tensor) -> Tensor:
        """O (B, T, H, d_v) times ``matrix``, for every head."""
        w = self.matrix().to(o.dtype)
        return o @ w if w.ndim == 2 else torch.einsum("...hd,hde->...he", o, w)

    def forward(self, o: Tensor) -> Tensor:
        """Map (B, T, H·d_v) to (B, T, D)."""
        heads = o.unflatten(-1, (self.num_heads, self.width))  # (B, T, H, d_v)
        change = self.change(heads).to(o.dtype)
        # The other heads stay the same bit for bit.
        return self.proj(torch.addcmul(heads, change, self.chosen.to(o.dtype)).flatten(-2))

    @torch.no_grad()
    def folded_weight(self) -> Tensor:
        """Weight of the equivalent projection in fp64: (I - lambda W_D) W_O in chosen heads."""
        weight = projection_weight(self.proj).double()
        transposed = isinstance(self.proj, Conv1D)
        per_head = (weight if transposed else weight.T).unflatten(0, (self.num_heads, self.width))
        change = self.matrix().double() @ per_head  # (H, d_v, D)
        folded = (per_head + self.chosen.double()[..., None] * change).flatten(0, 1)
        return folded if transposed else folded.T


class PartlyTrained(nn.Module):
    """A frozen ``nn.Linear`` or Conv1D; ``rows``, fp32, replace some of its output features."""

    index: Tensor

    def __init__(self, proj: nn.Module, rows: list[int]):
        super().__init__()
        self.proj = proj
        weight = projection_weight(proj)
        self.dim = int(isinstance(proj, Conv1D))
        self.register_buffer("index", torch.tensor(rows, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach().index_select(self.dim, self.index).float())

    @property
    def weight(self) -> Tensor:
        """The whole weight, in the layout of the pretrained one."""
        frozen = projection_weight(self.proj)
        return frozen.index_copy(self.dim, self.index, self.rows.to(frozen.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        bias: Any = self.proj.bias
        return F.linear(x, self.weight.T if self.dim else self.weight, bias)


def projection_weight(proj: nn.Module) -> Tensor:
    """The weight of an ``nn.Linear`` (out, in) or a Conv1D (in, out)."""
    assert isinstance(proj.weight, Tensor)
    return proj.weight
