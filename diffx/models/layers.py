"""Layers that architectures share: rotary position embedding, the norm of each head's output, the SwiGLU feed-forward layer.

Notation: B batch, T tokens, H heads (or maps), d their width, D model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffx.config.model import DiffV1Config, TransformerWideHeadConfig


def rope_tables(positions: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding at ``positions`` (T,) or (B, T), in fp32, with one more dimension of width/2."""
    frequencies = theta ** (-torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width)
    angles = positions[..., None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate features 2i and 2i+1 of every head by the angle of their position (RoFormer, arXiv 2104.09864).

    Args:
        x: (B, T, H, d); rotated in fp32 at least, returned in its own type.
        cos: (T, d/2), or (B, T, d/2) where rows stand at different positions.
        sin: the same.

    Returns:
        (B, T, H, d).
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))  # (B, T, H, d/2, 2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, d/2)
    if torch.compiler.is_compiling():  # complex products cannot be fused
        even, odd = pairs.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one kernel in place of seven: a quarter of the time
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).to(x.dtype)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the features of each head, (B, T, heads, width); one gain of size ``width`` for all heads."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, heads, width) to the same, in the gain's type: autocast leaves that in fp32, and the two must agree."""
        return super().forward(x if self.weight is None else x.to(self.weight.dtype))


def sublayer_norm(config: DiffV1Config | TransformerWideHeadConfig, width: int) -> nn.Module:
    """The norm of each head's output that the config asks for; ``nn.Identity`` for none."""
    if not config.sublayer_norm:
        return nn.Identity()
    return HeadNorm(width, eps=config.norm_eps, elementwise_affine=config.sublayer_norm_gain)


class MLP(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202): D to ``width`` and back, no biases."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
