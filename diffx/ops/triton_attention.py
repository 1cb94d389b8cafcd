"""Differential attention by Triton kernels, as operators of ``torch.library``.

Autograd, ``torch.compile`` and checkpointing treat it as one operator. It needs a CUDA device, or
``TRITON_INTERPRET=1``. Gradients are deterministic.

Notation as in ``diffx.ops.triton_kernels``.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from diffx.ops import triton_kernels as kernels
from diffx.ops.reference import split_maps
from diffx.ops.sdpa import attention as attention  # ordinary attention uses PyTorch's kernels

TAKES_DOCUMENTS = True  # computes all documents in one call, given cu_seqlens
WIDEST = 128  # features of a query or key; a value has twice as many at most
_SPLIT = 256  # least number of keys for a program of the decoding kernel
# (Kernel, whether fp32): rows and keys of a block, and warps, for d <= 64 and for d > 64. The
# compiler spills few or no registers for compute capabilities 8.0 and 9.0. Not timed on a GPU.
_SIZES = {
    ("forward", False): ((128, 32, 8), (64, 32, 8)),
    ("forward", True): ((32, 32, 8), (16, 16, 8)),
    ("row_sums", False): ((32, 0, 4), (32, 0, 4)),
    ("row_sums", True): ((32, 0, 4), (32, 0, 4)),
    ("keys", False): ((64, 32, 4), (32, 32, 8)),
    ("keys", True): ((16, 32, 8), (16, 16, 8)),
    ("queries", False): ((64, 64, 4), (32, 32, 8)),
    ("queries", True): ((32, 32, 8), (32, 16, 8)),
    ("decode", False): ((0, 64, 4), (0, 64, 8)),
    ("decode", True): ((0, 32, 4), (0, 16, 8)),
}
_LOG2E = 1.4426950408889634


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ratio: int = 1,
) -> Tensor:
    """See ``diffx.ops.differential_attention``.

    With ``cu_seqlens`` (``Documents.bounds``) a query attends within its document. The width d of
    the maps is at most 128, that of the values 256, and ``key_mask`` must be None. A noise map is
    computed again for each of its signal maps.

    Raises:
        ValueError: a ``key_mask``, a width or a type that the kernels do not support, or
            ``cu_seqlens`` with a cache.
    """
    if key_mask is not None:
        raise ValueError("impl='triton' takes no key_mask: choose sdpa or reference, or None")
    if q.shape[3] > WIDEST or v.shape[3] > 2 * WIDEST:
        limit = f"impl='triton' takes maps of {WIDEST} features and values of {2 * WIDEST} at most"
        raise ValueError(f"{limit}, not {q.shape[3]} and {v.shape[3]}: choose sdpa, or None")
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    types = {q.dtype, k.dtype, v.dtype}
    if len(types) > 1 or not types <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"impl='triton' takes q, k and v all fp32, bf16 or fp16, and these are {q.dtype}, "
            f"{k.dtype} and {v.dtype}"
        )
    if cu_seqlens is not None and q.shape[1] != k.shape[1]:
        raise ValueError("cu_seqlens cannot be used with a cache: each key must have a query")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if ratio > 1 or k.shape[2] == v.shape[2]:  # the kernels read a query and a key for each map
        (signal, signal_keys), (noise, noise_keys) = split_maps(q, k, v.shape[2], ratio)
        noise = noise.repeat_interleave(ratio, 2)
        q = torch.stack([signal, noise], 3).flatten(2, 3)
        k = torch.stack([signal_keys, noise_keys], 3).flatten(2, 3)
    lam = lam.float().expand(*q.shape[:2], q.shape[2] // 2).transpose(1, 2)  # (B, h, Tq)
    if q.shape[1] == 1 and cu_seqlens is None and not torch.is_grad_enabled():
        return _decode(q, k, v, lam, scale)
    out, _, _ = _forward(q, k, v, lam, causal, scale, cu_seqlens)
    return out


def key_ranges(
    tq: int, tk: int, causal: bool, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The keys [low, high) that each query attends to, both int32 (Tq,) and ascending."""
    position = torch.arange(tk - tq, tk, device=device)
    low, high = torch.zeros_like(position), torch.full_like(position, tk)
    if cu_seqlens is not None:
        ends = cu_seqlens.to(device, torch.int64)
        document = torch.searchsorted(ends, position, right=True)
        low, high = ends[document - 1], ends[document]
    if causal:
        high = position + 1
    return low.int(), high.int()


@torch.library.custom_op("diffx::differential_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``OUT``, ``OUT2`` and ``LSE`` of ``forward_kernel``."""
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    batch, tq, heads = q.shape[0], q.shape[1], q.shape[2] // 2
    out = q.new_empty(batch, tq, heads, v.shape[3])
    out2 = torch.empty_like(out)
    lse = q.new_empty(2, batch, heads, tq, dtype=torch.float32)
    low, high = key_ranges(tq, k.shape[1], causal, cu_seqlens, q.device)
    block = _launch_options("forward", q, v)
    kernels.forward_kernel[triton.cdiv(tq, block["M"]), batch * heads](
        q, k, v, lam.contiguous(), low, high, out, out2, lse,
        scale * _LOG2E, tq, k.shape[1], heads, heads // v.shape[2], *_strides(q, k, v), **block,
    )  # fmt: skip
    return out, out2, lse


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lam: Tensor, causal: Any, scale: Any, cu_seqlens: Any
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tq, maps, _ = q.shape
    out = q.new_empty(batch, tq, maps // 2, v.shape[3])
    return out, torch.empty_like(out), q.new_empty(2, batch, maps // 2, tq, dtype=torch.float32)


@torch.library.custom_op("diffx::differential_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor,
    out: Tensor,
    out2: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and lambda (B, h, Tq)."""
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    d_out, lam = d_out.contiguous(), lam.contiguous()
    batch, tq, heads = q.shape[0], q.shape[1], q.shape[2] // 2
    tk, groups = k.shape[1], v.shape[2]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    sums = torch.empty_like(lse)
    low, high = key_ranges(tq, tk, causal, cu_seqlens, q.device)
    key = torch.arange(tk, device=q.device, dtype=torch.int32)
    first, last = (torch.searchsorted(x, key, right=True, out_int32=True) for x in (high, low))
    block = _launch_options("row_sums", q, v)
    kernels.row_sums_kernel[triton.cdiv(tq, block["M"]), batch * heads](
        d_out, out, out2, lam, sums, tq, heads, **block
    )
    shared = (scale * _LOG2E, scale, tq, tk, heads, heads // groups, *_strides(q, k, v))
    block = _launch_options("keys", q, v)
    kernels.keys_kernel[triton.cdiv(tk, block["N"]), batch * groups](
        q, k, v, lam, low, high, first, last, d_out, lse, sums, dk, dv, *shared, **block
    )
    block = _launch_options("queries", q, v)
    kernels.queries_kernel[triton.cdiv(tq, block["M"]), batch * heads](
        q, k, v, lam, low, high, d_out, lse, sums, dq, *shared, **block
    )
    return dq, dk, dv, -sums[1]


@_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lam)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, lam, causal, scale, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, lam, *output, cu_seqlens)
    ctx.options = (causal, scale)


def _gradients(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens = ctx.saved_tensors
    return (*_backward(d_out, *saved, *ctx.options, cu_seqlens), None, None, None)


_forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("diffx::differential_attention_decode", mutates_args=())
def _decode(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, scale: float) -> Tensor:
    """One query per sequence (B, 1, 2h, d): programs process parts of the keys, then combined."""
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    batch, tk, groups, width = q.shape[0], k.shape[1], v.shape[2], v.shape[3]
    members = q.shape[2] // 2 // groups
    block = _launch_options("decode", q, v)
    split = triton.cdiv(max(_SPLIT, triton.cdiv(tk, 64)), block["N"]) * block["N"]
    splits = triton.cdiv(tk, split)
    out = q.new_empty(batch, groups, splits, 2, members, width, dtype=torch.float32)
    lse = q.new_empty(batch, groups, splits, 2, members, dtype=torch.float32)
    kernels.decode_kernel[batch * groups, splits](
        q, k, v, out, lse, scale * _LOG2E, tk, split, groups, splits,
        q.stride(0), q.stride(2), *k.stride()[:3], *v.stride()[:3],
        R=members, BLOCK_R=max(16, triton.next_power_of_2(members)), **block,
    )  # fmt: skip
    weight = (lse * (1 / _LOG2E)).softmax(2)[..., None]  # of each part in the softmax
    first, second = (out * weight).sum(2).unbind(2)  # (B, G, R, dv) each
    lam = lam.reshape(batch, groups, members, 1)
    difference = torch.addcmul(first, lam, second, value=-1)
    return difference.view(batch, 1, groups * members, width).to(v.dtype)


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, scale: float) -> Tensor:
    return v.new_empty(q.shape[0], 1, q.shape[2] // 2, v.shape[3])


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _launch_options(kernel: str, q: Tensor, v: Tensor) -> dict[str, Any]:
    """Widths, block sizes and launch options of a kernel."""
    exact, d, width = q.dtype is torch.float32, q.shape[3], v.shape[3]
    rows, keys, warps = _SIZES[kernel, exact][d > 64]
    sizes: dict[str, Any] = {"M": rows} if rows else {}
    sizes |= {"N": keys} if keys else {}
    if kernel != "row_sums":
        sizes["EXACT"] = exact or isinstance(kernels.forward_kernel, InterpretedFunction)
        sizes |= {"D": d, "BLOCK_D": max(16, triton.next_power_of_2(d))}
    return sizes | {
        "WIDE": width,
        "BLOCK_WIDE": max(16, triton.next_power_of_2(width)),
        "num_warps": warps,
        "num_stages": 1 if exact else 2,
    }
