"""Attention by the memory-efficient kernels of PyTorch's ``scaled_dot_product_attention``.

The kernels need queries, keys and values of one width; for other shapes PyTorch stores Tq x Tk maps
and takes twice the time on a CPU. So the narrower tensors are padded with zeros, which changes no
logit and no output. Grouped keys and values are repeated here, because not every kernel supports
them; it costs about 2%.

Notation: B batch, Tq queries, Tk keys, H query heads, H_kv key heads, h differential heads, d query
width, dv value width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffx.ops.reference import split_maps


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """See ``diffx.ops.attention``."""
    tq, tk, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    width = max(q.shape[3], v.shape[3])
    mask = None
    # PyTorch's causal mask aligns the first query with the first key, which is right only for
    # Tq = Tk. One query needs no mask.
    if causal and (1 < tq < tk or key_mask is not None):
        mask = torch.ones(tq, tk, dtype=torch.bool, device=q.device).tril(tk - tq)
    if key_mask is not None:
        keys = key_mask[:, None, None]
        mask = keys if mask is None else keys & mask  # (B, 1, Tq, Tk)
    out = F.scaled_dot_product_attention(
        _widen(q, width).transpose(1, 2),
        _repeat(_widen(k, width), groups).transpose(1, 2),
        _repeat(_widen(v, width), groups).transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None and tq == tk,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )
    return out.transpose(1, 2)[..., : v.shape[3]]  # (B, Tq, H, dv)


def differential_attention(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, ratio: int = 1, **options: Any
) -> Tensor:
    """See ``diffx.ops.differential_attention``."""
    if k.shape[2] == v.shape[2]:  # all maps of a group use the same keys: one call
        maps = attention(q, k, v, **options).unflatten(2, (-1, ratio + 1))
        first, second = maps[:, :, :, :ratio].flatten(2, 3), maps[:, :, :, ratio]
    else:
        pair = split_maps(q, k, v.shape[2], ratio)
        first, second = (attention(*queries_and_keys, v, **options) for queries_and_keys in pair)
    lam = lam.to(first.dtype)[..., None]
    return torch.addcmul(first, lam, _repeat(second, ratio), value=-1)  # (B, Tq, h, dv)


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3]))


def _repeat(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)
