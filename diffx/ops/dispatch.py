"""Attention and differential attention: check shapes, pick an implementation and call it.

Notation, one layout everywhere, (B, T, H, D):
    B       batch
    Tq, Tk  queries and keys; with a KV cache Tq < Tk
    H       query heads (or maps); H_kv key heads (or maps)
    h       differential heads; 2h query maps, of which 2j and 2j+1 make head j
    d       width of a query or key; dv width of a value
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
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

    Returns:
        (B, Tq, H, dv), in the type of ``v``.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
    """
    _check_shapes(q, k, v, causal)
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads and v has {v.shape[2]}: they must be equal")
    # above about 1,000 rows PyTorch's kernel is as fast as `blocks` for a single map
    rows = q.shape[1] if documents is None else max(documents.lengths)
    default = blocks if _eager_cpu(q) and rows <= 1024 and key_mask is None else sdpa
    op = partial(_pick(impl, default).attention, causal=causal, scale=scale)
    return _apply(op, q, k, v, key_mask, documents)


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
) -> Tensor:
    """Differential attention (arXiv 2410.05258, equation 1): head j is (A1 - lambda A2) v.

    A1 and A2 are the softmax maps of query maps 2j and 2j+1. Head j belongs to group g = j // (h /
    (H_kv/2)), whose keys are key maps 2g and 2g+1 and whose value is value head g. Neither the norm
    after the difference nor the factor 1 - lambda_init is part of this operation.

    Args:
        q: query maps (B, Tq, 2h, d).
        k: key maps (B, Tk, H_kv, d).
        v: values (B, Tk, H_kv/2, 2d).
        lam: lambda, a number, a scalar tensor, or a tensor (h,) with a value for each head.
        causal: as in ``attention``.
        scale: as in ``attention``.
        impl: as in ``attention``, or ``triton`` (fused, for a GPU).
        key_mask: as in ``attention``; ``triton`` does not support it either.
        documents: as in ``attention``.

    Returns:
        (B, Tq, h, 2d), in the type of ``v``.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``impl``.
    """
    _check_shapes(q, k, v, causal)
    maps, key_maps, width = q.shape[2], k.shape[2], q.shape[3]
    if maps % 2 or key_maps != 2 * v.shape[2]:
        shapes = f"q has {maps} maps, k has {key_maps}, v has {v.shape[2]} heads"
        raise ValueError(f"{shapes}: q and k need two maps a head")
    if v.shape[3] != 2 * width:
        raise ValueError(f"v is {v.shape[3]} wide: it must be twice the maps' width {width}")
    lam = torch.as_tensor(lam, device=q.device)
    if lam.shape not in ((), (maps // 2,)):
        raise ValueError(f"lam has shape {tuple(lam.shape)}: it must be a scalar or ({maps // 2},)")
    default = blocks if _eager_cpu(q) and key_mask is None else sdpa
    implementation = _pick(impl, default)
    op = partial(implementation.differential_attention, lam=lam, causal=causal, scale=scale)
    if documents is not None and getattr(implementation, "TAKES_DOCUMENTS", False):
        return op(q, k, v, key_mask=key_mask, cu_seqlens=documents.bounds)
    return _apply(op, q, k, v, key_mask, documents)


def _apply(
    op: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    documents: Documents | None,
) -> Tensor:
    """Apply ``op``, once to each document; ``split`` has one concatenation as backward pass."""
    if documents is None:
        return op(q, k, v, key_mask=key_mask)
    parts = zip(*(x.split(documents.lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([op(*part, key_mask=key_mask) for part in parts], dim=1)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be (B, T, H, D)")
    (batch, tq, heads, d), (_, tk, kv_heads, _) = q.shape, k.shape
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
    elif heads % kv_heads:
        problem = f"q has {heads} heads and k has {kv_heads}: the latter must divide the former"
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
