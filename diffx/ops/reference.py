"""Attention with explicit maps: the reference of the faster implementations and of statistics.

Everything is computed in fp32 or wider, also under autocast. Memory grows with Tq x Tk.

Notation: B batch, Tq queries, Tk keys, H query heads, H_kv key heads, h differential heads, d query
width, dv value width.
"""

from typing import Any

import torch
from torch import Tensor


def attention_maps(
    q: Tensor,
    k: Tensor,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax maps (B, H, Tq, Tk) of q (B, Tq, H, d) and k (B, Tk, H_kv, d); see ``attention``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)  # (B, Tk, H, d)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype)) * scale
    if causal:
        tq, tk = logits.shape[2:]
        past = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
        logits = logits.masked_fill(~past, -torch.inf)
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return logits.softmax(-1)


def differential_attention_maps(q: Tensor, k: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """A1 and A2 of every head, (B, h, Tq, Tk) each, of q (B, Tq, 2h, d) and k (B, Tk, H_kv, d).

    ``options`` are those of ``attention_maps``.
    """
    first = attention_maps(q[:, :, 0::2], k[:, :, 0::2], **options)
    second = attention_maps(q[:, :, 1::2], k[:, :, 1::2], **options)
    return first, second


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """See ``diffx.ops.attention``."""
    return _weigh(attention_maps(q, k, **options), v)


def differential_attention(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, **options: Any) -> Tensor:
    """See ``diffx.ops.differential_attention``."""
    first, second = differential_attention_maps(q, k, **options)
    return _weigh(first - lam.view(-1, 1, 1) * second, v)


def _weigh(maps: Tensor, v: Tensor) -> Tensor:
    values = v.repeat_interleave(maps.shape[1] // v.shape[2], dim=2)  # (B, Tk, H, dv)
    with torch.autocast(v.device.type, enabled=False):
        return torch.einsum("bhqk,bkhd->bqhd", maps, values.to(maps.dtype)).to(v.dtype)
