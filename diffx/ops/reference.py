"""Attention with explicit maps: the reference of the faster implementations and of statistics.

Everything is computed in fp32 or wider, also under autocast. Memory grows with Tq x Tk.

Notation: B batch, Tq queries, Tk keys, H query heads, H_kv key heads, h differential heads, G value
heads, m signal maps for each noise map, d query width, dv value width.
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


def split_maps(
    q: Tensor, k: Tensor, groups: int, ratio: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries and keys of the signal maps, (B, Tq, h, d) and (B, Tk, G, d), and of the noise maps.

    The noise maps have h/m queries. The keys are one tensor where both maps share them.
    """
    signal, noise = q.unflatten(2, (-1, ratio + 1)).split([ratio, 1], 3)
    keys = k.unflatten(2, (groups, -1)).unbind(3)
    return (signal.flatten(2, 3), keys[0]), (noise.flatten(2, 3), keys[-1])


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """See ``diffx.ops.attention``."""
    return _weigh(attention_maps(q, k, **options), v)


def differential_attention(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, ratio: int = 1, **options: Any
) -> Tensor:
    """See ``diffx.ops.differential_attention``."""
    pair = split_maps(q, k, v.shape[2], ratio)
    first, second = (attention_maps(*queries_and_keys, **options) for queries_and_keys in pair)
    lam = lam.expand(*q.shape[:2], first.shape[1]).transpose(1, 2)[..., None]  # (B, h, Tq, 1)
    return _weigh(first - lam * second.repeat_interleave(ratio, 1), v)


def _weigh(maps: Tensor, v: Tensor) -> Tensor:
    values = v.repeat_interleave(maps.shape[1] // v.shape[2], dim=2)  # (B, Tk, H, dv)
    with torch.autocast(v.device.type, enabled=False):
        return torch.einsum("bhqk,bkhd->bqhd", maps, values.to(maps.dtype)).to(v.dtype)
