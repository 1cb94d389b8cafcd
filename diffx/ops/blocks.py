"""Attention on the CPU in blocks of query rows, forward and backward, as matrix products.

The logits of a block's rows are computed for all keys at once. The two softmax maps of a
differential head are subtracted before the product with the values, and backward computes dV and dP
once for both maps: the cost of two ordinary heads. Memory grows with block x Tk: no map is stored,
backward computes the maps again.

Notation: B batch, Tq queries, Tk keys, H query heads, h differential heads, d query width, dv value
width, G groups of heads that share keys and values, R heads in a group, m maps in a head (1, or 2
for differential attention).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # rows of a matrix product, over the R heads of a group; the fastest of 16 to 256


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """See ``diffx.ops.attention``."""
    return _run(q, k, v, None, **options)


def differential_attention(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, **options: Any) -> Tensor:
    """See ``diffx.ops.differential_attention``."""
    return _run(q, k, v, lam, **options)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | None,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None = None,
) -> Tensor:
    if key_mask is not None:
        raise ValueError("impl='blocks' takes no key_mask: choose sdpa or reference, or None")
    groups, maps = v.shape[2], k.shape[2] // v.shape[2]
    out_dtype, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    # (m, B, G, R, Tq, d)
    q = (q.to(dtype) * scale).unflatten(2, (groups, -1, maps)).permute(4, 0, 2, 3, 1, 5)
    k = k.to(dtype).unflatten(2, (groups, maps)).permute(3, 0, 2, 1, 4)  # (m, B, G, Tk, d)
    v = v.to(dtype).transpose(1, 2)  # (B, G, Tk, dv)
    if lam is not None:
        # (1, G, R, 1, 1)
        lam = lam.to(dtype).expand(q.shape[2] * q.shape[3]).view(1, groups, -1, 1, 1)
    # (B, G, R, Tq, dv)
    out: Tensor = _BlockAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), lam, causal)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out_dtype)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, causal: bool
    ) -> Tensor:
        out = q.new_empty(*q.shape[1:-1], v.shape[-1])
        for rows, keys in _blocks(q, k, causal):
            maps = _softmax(q[..., rows, :], k[..., keys, :], causal)
            out[..., rows, :] = _product(_difference(maps, lam), v[..., keys, :])
        ctx.save_for_backward(q, k, v, lam)
        ctx.causal = causal
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lam = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dlam = None if lam is None else lam.new_zeros(lam.shape)
        for rows, keys in _blocks(q, k, ctx.causal):
            block = d_out[..., rows, :].contiguous()
            maps = _softmax(q[..., rows, :], k[..., keys, :], ctx.causal)
            dv[..., keys, :] += _difference(maps, lam).flatten(2, 3).mT @ block.flatten(2, 3)
            d_map = _product(block, v[..., keys, :].mT)  # (B, G, R, rows, keys)
            d_logits = maps * d_map
            row_sums = d_logits.sum(-1, keepdim=True)  # (m, B, G, R, rows, 1)
            d_logits.addcmul_(maps, row_sums, value=-1)
            if dlam is not None:
                dlam -= row_sums[1].sum((0, -2, -1)).view_as(dlam)
                d_logits[1] *= -lam
            dq[..., rows, :] = _product(d_logits, k[..., keys, :])
            dk[..., keys, :] += d_logits.flatten(3, 4).mT @ q[..., rows, :].flatten(3, 4)
        return dq, dk, dv, dlam, None


def _blocks(q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Slices of the queries (m, B, G, R, Tq, d), each with the slice of its keys."""
    heads, tq, tk = q.shape[3], q.shape[4], k.shape[3]
    rows = max(16, BLOCK // heads)
    for start in range(0, tq, rows):
        end = min(start + rows, tq)
        yield slice(start, end), slice(0, tk - tq + end if causal else tk)


def _softmax(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    logits = _product(q, k.mT)  # (m, B, G, R, rows, keys)
    if causal:
        rows = q.shape[-2]
        future = torch.ones(rows, rows, dtype=torch.bool, device=logits.device).triu(1)
        logits[..., -rows:].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


def _difference(maps: Tensor, lam: Tensor | None) -> Tensor:
    return maps[0] if lam is None else torch.addcmul(maps[0], maps[1], lam, value=-1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Multiply x (..., R, rows, a) by y (..., a, b), which the R heads of a group share."""
    return (x.flatten(-3, -2) @ y).unflatten(-2, x.shape[-3:-1])
