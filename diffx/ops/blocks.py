"""Attention on the CPU in blocks of query rows, forward and backward, as matrix products.

The logits of a block's rows are computed for all keys at once. The two softmax maps of a
differential head are subtracted before the product with the values, and backward computes dV and dP
once for both maps: the cost of two ordinary heads (DIFF V1). Memory grows with block x Tk: no map
is stored, backward computes the maps again.

Notation: B batch, Tq queries, Tk keys, d query width, dv value width, G groups of heads that share
values, R heads in a group, m signal maps for each noise map. The signal maps of a group are its R
heads, and R/m noise maps follow (none in ordinary attention).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffx.ops.reference import split_maps

BLOCK = 128  # rows of a matrix product, over the R heads of a group; the fastest of 32 to 256


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """See ``diffx.ops.attention``."""
    return _run([q], [k], v, None, 1, **options)


def differential_attention(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, ratio: int = 1, **options: Any
) -> Tensor:
    """See ``diffx.ops.differential_attention``."""
    queries, keys = zip(*split_maps(q, k, v.shape[2], ratio), strict=True)
    return _run(queries, keys[: k.shape[2] // v.shape[2]], v, lam, ratio, **options)


def _run(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    v: Tensor,
    lam: Tensor | None,
    ratio: int,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention, given the queries of signal and noise maps and the keys of each or of both."""
    if key_mask is not None:
        raise ValueError("impl='blocks' takes no key_mask: choose sdpa or reference, or None")
    groups, out_dtype, dtype = v.shape[2], v.dtype, torch.promote_types(v.dtype, torch.float32)
    scale = queries[0].shape[3] ** -0.5 if scale is None else scale
    heads = queries[0].shape[2] // groups
    # (B, G, R or R/m, Tq, d)
    queries = [
        (q.to(dtype) * scale).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4) for q in queries
    ]
    if len(keys) == 1:  # all maps are rows of one matrix product
        queries = [torch.cat(queries, 2)]
    if lam is not None:
        lam = lam.to(dtype).expand(*v.shape[:1], queries[0].shape[3], groups * heads)
        lam = lam.unflatten(2, (groups, -1, ratio)).permute(0, 2, 3, 4, 1)[..., None]
    pairs = zip(queries, keys, strict=True)
    tensors = [x.contiguous() for q, k in pairs for x in (q, k.to(dtype).transpose(1, 2))]
    v = v.to(dtype).transpose(1, 2).contiguous()  # (B, G, Tk, dv)
    # (B, G, R, Tq, dv)
    out: Tensor = _BlockAttention.apply(v, lam, heads, causal, *tensors)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out_dtype)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, v: Tensor, lam: Tensor | None, heads: int, causal: bool, *tensors: Tensor
    ) -> Tensor:
        """Take v (B, G, Tk, dv), lambda (B, G, R/m, m, Tq, 1), and queries and keys in turn."""
        out = v.new_empty(*v.shape[:2], heads, tensors[0].shape[3], v.shape[3])
        for rows, keys in _blocks(tensors[0], v, heads, causal):
            first, second = _heads(_softmax(tensors, rows, keys, causal), heads)
            weights = _difference(first, second, lam, rows)
            out[..., rows, :] = _product(weights, v[..., keys, :])
        ctx.save_for_backward(v, lam, *tensors)
        ctx.options = heads, causal
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        v, lam, *tensors = ctx.saved_tensors
        heads, causal = ctx.options
        dv, gradients = torch.zeros_like(v), [torch.zeros_like(x) for x in tensors]
        dlam: Any = None if lam is None else lam.new_empty(lam.shape)
        for rows, keys in _blocks(tensors[0], v, heads, causal):
            block = d_out[..., rows, :].contiguous()
            maps = _softmax(tensors, rows, keys, causal)
            first, second = _heads(maps, heads)
            weights = _difference(first, second, lam, rows)
            dv[..., keys, :] += weights.flatten(2, 3).mT @ block.flatten(2, 3)
            d_map = _product(block, v[..., keys, :].mT)  # (B, G, R, rows, keys)
            d_logits = [torch.empty_like(x) for x in maps]
            d_first, d_second = _heads(d_logits, heads)
            torch.mul(first, d_map, out=d_first)
            d_first.addcmul_(first, d_first.sum(-1, keepdim=True), value=-1)
            if lam is not None:
                second = second[:, :, :, None]
                products = second * d_map.unflatten(2, lam.shape[2:4])
                sums = products.sum(-1, keepdim=True)  # (B, G, R/m, m, rows, 1)
                dlam[..., rows, :] = -sums
                products.addcmul_(second, sums, value=-1).mul_(-lam[..., rows, :])
                torch.sum(products, 3, out=d_second)
            for d_part, q, k, dq, dk in zip(
                d_logits, tensors[::2], tensors[1::2], gradients[::2], gradients[1::2], strict=True
            ):
                dq[..., rows, :] = _product(d_part, k[..., keys, :])
                dk[..., keys, :] += d_part.flatten(2, 3).mT @ q[..., rows, :].flatten(2, 3)
        return dv, dlam, None, None, *gradients


def _blocks(q: Tensor, v: Tensor, heads: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Slices of the queries (B, G, maps, Tq, d), each with the slice of its keys."""
    tq, tk = q.shape[3], v.shape[2]
    rows = max(16, BLOCK // heads)
    for start in range(0, tq, rows):
        end = min(start + rows, tq)
        yield slice(start, end), slice(0, tk - tq + end if causal else tk)


def _softmax(tensors: Sequence[Tensor], rows: slice, keys: slice, causal: bool) -> list[Tensor]:
    """The maps (B, G, maps, rows, keys) of each pair of queries and keys."""
    maps = []
    for q, k in zip(tensors[::2], tensors[1::2], strict=True):
        logits = _product(q[..., rows, :], k[..., keys, :].mT)
        if causal:
            count = logits.shape[-2]
            future = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu(1)
            logits[..., -count:].masked_fill_(future, -torch.inf)
        maps.append(logits.softmax(-1))
    return maps


def _heads(maps: list[Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """The signal maps (B, G, R, ...) and the noise maps (B, G, R/m, ...), if any."""
    first, second = maps if len(maps) == 2 else maps[0].tensor_split([heads], 2)
    return first, second


def _difference(first: Tensor, second: Tensor, lam: Tensor | None, rows: slice) -> Tensor:
    if lam is None:
        return first
    grouped = first.unflatten(2, lam.shape[2:4])  # (B, G, R/m, m, rows, keys)
    return torch.addcmul(grouped, second[:, :, :, None], lam[..., rows, :], value=-1).flatten(2, 3)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Multiply x (B, G, heads, rows, a) by y (B, G, a, b), which the heads share."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])
