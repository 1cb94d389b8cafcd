"""Layers that architectures share: RoPE, head norm, feed-forward layers.

Notation: B batch, T tokens, H heads (or maps), d their width, D model width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffx.config.model import DiffV1Config, Ffn, ModelConfig, TransformerWideHeadConfig


def rope_tables(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, (..., width/2), at ``positions`` (T,) or (B, T)."""
    frequencies = theta ** (
        -torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    )
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate features 2i and 2i+1 of every head by the angle of their position (arXiv 2104.09864).

    Args:
        x: (B, T, H, d), computed in fp32 or wider and returned in the type of ``x``.
        cos: (T, d/2), or (B, T, d/2) where the positions of rows differ.
        sin: as ``cos``.

    Returns:
        (B, T, H, d).
    """
    # (B, T, H, d/2, 2)
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, d/2)
    if torch.compiler.is_compiling():  # complex products cannot be fused
        even, odd = pairs.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one kernel in place of seven: a quarter of the time
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).to(x.dtype)


class KeepsFp32(nn.Module):
    """A module whose parameters and buffers, except those of children, stay in fp32 in any cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsFp32":
        # .to(), .half() and .bfloat16() call this
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(move, recurse=False)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the features of each head, with one gain (width,) for all heads."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, heads, width) to the same shape, in the type of the gain (autocast: fp32)."""
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))


def sublayer_norm(config: DiffV1Config | TransformerWideHeadConfig, width: int) -> nn.Module:
    """The norm of head outputs according to the config; ``nn.Identity`` for none."""
    if not config.sublayer_norm:
        return nn.Identity()
    eps = getattr(config, "sublayer_norm_eps", None) or config.norm_eps
    return HeadNorm(width, eps=eps, elementwise_affine=config.sublayer_norm_gain)


class PolyNorm(nn.Module):
    """w0·n(x³) + w1·n(x²) + w2·n(x) + b, n being RMSNorm without a gain (arXiv 2411.03884)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same shape."""
        powers = (F.rms_norm(x**power, x.shape[-1:], eps=1e-6) for power in (3, 2, 1))
        terms = (weight * power for weight, power in zip(self.weight, powers, strict=True))
        return sum(terms, self.bias)


class MLP(nn.Module):
    """Feed-forward layer: down(act(gate(x)) * up(x)), no biases (with SiLU: arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden_size, width = config.hidden_size, config.ffn_size
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.act_fn = PolyNorm() if config.ffn is Ffn.polynorm else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
