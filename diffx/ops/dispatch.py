"""Attention and differential attention: check shapes, pick an implementation and call it.

Notation, one layout everywhere, (B, T, H, D):
    B       batch
    Tq, Tk  queries and keys; with a KV cache Tq < Tk
    H       query heads (or maps); H_kv key heads (or maps)
    h       differential heads, one for each signal map; m signal maps share a noise map
    G       value heads
    d       width of a query or key; dv width of a value
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffx.ops import blocks, reference, sdpa

_IMPLEMENTATIONS = {"reference": reference, "sdpa": sdpa, "blocks": blocks, "triton": None}


class Documents(NamedTuple):
    """Documents laid end to end in a batch of one sequence: a query attends within its document.

    Attributes:
        lengths: tokens of each document.
        bounds: where each document begins and the last one ends, ascending from 0 to T (N + 1,).
    """

    lengths: list[int]
    bounds: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    impl: Any = None,
    key_mask: Tensor | None = None,
    documents: Documents | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention with grouped queries: query head i reads key/value head i // (H / H_kv).

    Args:
        q: queries (B, Tq, H, d).
        k: keys (B, Tk, H_kv, d).
        v: values (B, Tk, H_kv, dv).
        causal: query i is at position Tk - Tq + i and does not attend to later keys.
        scale: factor on the logits; None is 1/sqrt(d).
        impl: ``reference`` (explicit maps), ``sdpa`` (PyTorch's kernels), ``blocks`` (for the CPU),
            an implementation such as ``QuantizedLogits``, or None to pick ``sdpa`` or ``blocks``.
        key_mask: (B, Tk), false for keys that no query attends to; ``blocks`` does not support it.
            Each query must attend to a key.
        documents: the documents of the sequence, where B = 1 and Tq = Tk.
        sinks: logits s (H,): exp(s) is added to the sum of exponentials of the head's softmax.

    Returns:
        (B, Tq, H, dv), in the type of ``v``.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
    """
    _check_shapes(q, k, v, causal)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads and v has {v.shape[2]}: they must be equal")
    if (heads := q.shape[2]) % (kv_heads := k.shape[2]):
        raise ValueError(
            f"q has {heads} heads and k has {kv_heads}: the latter must divide the former"
        )
    # above about 1,000 rows PyTorch's kernel is as fast as `blocks` for a single map
    rows = q.shape[1] if documents is None else max(documents.lengths)
    default = blocks if _eager_cpu(q) and rows <= 1024 and key_mask is None else sdpa
    scale = q.shape[3] ** -0.5 if scale is None else scale
    op = partial(_pick(impl, default).attention, causal=causal, scale=scale)
    if sinks is not None:
        op = partial(_attend_with_sinks, op, (sinks / scale).to(q.dtype))
    return _apply(op, (q, k, v), key_mask, documents)


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lam: Tensor | float,
    causal: bool = True,
    scale: float | None = None,
    impl: Any = None,
    key_mask: Tensor | None = None,
    documents: Documents | None = None,
    ratio: int = 1,
) -> Tensor:
    """Differential attention (arXiv 2410.05258, equation 1): head j is (A1 - lambda A2) v.

    The query maps are groups of m = ``ratio`` signal maps and then a noise map (arXiv 2510.06949).
    A1 and A2 are the softmax maps of the signal map of head j and of the noise map of its group:
    query maps 2j and 2j+1 for m = 1. Head j has value head g = j // (h / G), signal key map 2g and
    noise key map 2g+1, or key map g for both. Neither a norm after the difference nor the factor
    1 - lambda_init is part of this operation.

    Args:
        q: query maps (B, Tq, h + h/m, d).
        k: key maps (B, Tk, 2G, d) (DIFF V1), or (B, Tk, G, d) (V2).
        v: values (B, Tk, G, dv).
        lam: lambda, a number, or a tensor (), (h,) or (B, Tq, h).
        causal: as in ``attention``.
        scale: as in ``attention``.
        impl: as in ``attention``, or ``triton`` (fused, for a GPU).
        key_mask: as in ``attention``; ``triton`` does not support it either.
        documents: as in ``attention``.
        ratio: signal maps for each noise map.

    Returns:
        (B, Tq, h, dv), in the type of ``v``.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
    """
    _check_shapes(q, k, v, causal)
    (batch, tq, maps, _), key_maps, groups = q.shape, k.shape[2], v.shape[2]
    shapes = f"q has {maps} maps, k has {key_maps}, v has {groups} heads"
    if key_maps not in (groups, 2 * groups):
        raise ValueError(f"{shapes}: k needs one or two maps a head of v")
    if maps % ((ratio + 1) * groups):
        raise ValueError(f"{shapes}: q needs groups of {ratio + 1} maps for each head of v")
    lam, heads = torch.as_tensor(lam, device=q.device), maps - maps // (ratio + 1)
    if lam.shape not in ((), (heads,), (batch, tq, heads)):
        accepted = f"a scalar, ({heads},) or ({batch}, {tq}, {heads})"
        raise ValueError(f"lam has shape {tuple(lam.shape)}: it must be {accepted}")
    default = blocks if _eager_cpu(q) and key_mask is None else sdpa
    implementation = _pick(impl, default)
    op = partial(implementation.differential_attention, ratio=ratio, causal=causal, scale=scale)
    if documents is not None and getattr(implementation, "TAKES_DOCUMENTS", False):
        return op(q, k, v, lam, key_mask=key_mask, cu_seqlens=documents.bounds)
    return _apply(op, (q, k, v, lam.expand(batch, tq, heads)), key_mask, documents)


def _apply(
    op: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    key_mask: Tensor | None,
    documents: Documents | None,
) -> Tensor:
    """Apply ``op``, once to each document; ``split`` has one concatenation as backward pass."""
    if documents is None:
        return op(*tensors, key_mask=key_mask)
    parts = zip(*(x.split(documents.lengths, dim=1) for x in tensors), strict=True)
    return torch.cat([op(*part, key_mask=key_mask) for part in parts], dim=1)


def _attend_with_sinks(
    op: Callable[..., Tensor],
    sinks: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention with a key in front whose value is zero and whose logits are ``sinks``·scale.

    The key has a feature that others lack, in a multiple of 8 as kernels require. Where Tq = Tk a
    query in front keeps them equal.
    """
    width, square = q.shape[3], int(q.shape[1] == k.shape[1])
    q = torch.cat([q, sinks[:, None].expand(*q.shape[:3], 1)], 3)
    k = F.pad(k, (0, 8, 0, 0, 1, 0))
    k[:, 0, :, width] = 1
    if key_mask is not None:
        key_mask = F.pad(key_mask, (1, 0), value=True)
    out = op(F.pad(q, (0, 7, 0, 0, square, 0)), k, F.pad(v, (0, 0, 0, 0, 1, 0)), key_mask=key_mask)
    return out[:, square:]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be (B, T, H, D)")
    (batch, tq, _, d), tk = q.shape, k.shape[1]
    problem = None
    if not batch == k.shape[0] == v.shape[0]:
        batches = f"{batch}, {k.shape[0]} and {v.shape[0]}"
        problem = f"q, k and v have batches {batches}: they must be equal"
    elif tk != v.shape[1]:
        problem = f"k has length {tk} and v has {v.shape[1]}: they must be equal"
    elif causal and tq > tk:
        problem = f"causal attention of {tq} queries to {tk} keys: each query must have a key"
    elif d != k.shape[3]:
        problem = f"q is {d} wide and k is {k.shape[3]}: they must be equal"
    if problem:
        raise ValueError(problem)


def _eager_cpu(q: Tensor) -> bool:
    return q.device.type == "cpu" and not torch.compiler.is_compiling()


def _pick(impl: Any, default: ModuleType) -> Any:
    if impl is None:
        return default
    if not isinstance(impl, str):
        return impl
    if impl not in _IMPLEMENTATIONS:
        known = ", ".join(_IMPLEMENTATIONS)
        raise ValueError(f"impl={impl!r} is unknown: choose one of {known}, or None")
    # Triton is imported when it is asked for
    return _IMPLEMENTATIONS[impl] or import_module("diffx.ops.triton_attention")
