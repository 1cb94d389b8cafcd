"""``diffx bench attention``: forward and backward of differential attention in several ways."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.bench.targets import NO_TARGET, Row, show_figures, show_ratios
from diffx.bench.timing import Call, attention_inputs, begin, measure
from diffx.config import require
from diffx.config.checks import refuse
from diffx.config.eval import Dtype
from diffx.config.train import Precision
from diffx.loading import DTYPES
from diffx.ops import attention, differential_attention
from diffx.train.throughput import matmul_ceiling

FUSED = {"cpu": "blocks", "cuda": "triton"}
# The highest accepted ratio of time, by contestant compared with, device and T (None is any).
TARGETS: dict[tuple[str, str, int | None], float] = {
    ("padded", "cpu", 1024): 0.65,
    ("padded", "cpu", 2048): 0.70,
    ("padded", "cpu", 4096): 0.70,
    ("four calls", "cuda", None): 0.70,
    ("baseline", "cuda", None): 1.25,
}
# Floating-point operations of both passes, per query-key pair and differential head, in units of d.
FLOPS = {"baseline": 28, "padded": 56, "four calls": 56, "diffx": 32}


def bench_attention(
    out: Path | None,
    heads: int,
    width: int,
    seq_lens: list[int],
    rounds: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Measure forward and backward of causal attention, on one sequence; see ``diffx.bench``.

    ``baseline`` is ordinary attention of ``heads`` heads, with ``width`` features of type ``dtype``
    (``auto``: fp32 on a CPU, else bf16). The others have half as many, with values twice as wide:
    ``padded`` pads queries and keys for two calls of PyTorch's attention, ``four calls`` halves the
    values as public libraries do, and ``diffx`` is one fused operation.
    """
    torch_device, report = begin(out, device, heads=heads, width=width, rounds=rounds)
    require(heads % 2 == 0, "heads", heads, "even: two heads make one differential head")
    lacking = torch_device.type == "cuda" and find_spec("triton") is None
    refuse(lacking, "device=cuda", "it needs Triton; pip install 'diffx[triton]' installs it")
    kind = torch.float32 if torch_device.type == "cpu" else torch.bfloat16
    kind = DTYPES.get(Dtype(dtype), kind)
    precision = Precision.fp32 if kind is torch.float32 else Precision.bf16
    ceiling, dtype = matmul_ceiling(torch_device, precision), str(kind).removeprefix("torch.")
    rates: dict[str, dict[str, float]] = {}
    report |= {"dtype": dtype, "flops_per_second": rates, "matmul_ceiling": ceiling}
    rows: list[Row] = []
    for seq_len in seq_lens:
        work = f"T={seq_len}"
        inputs = heads, width, seq_len, kind, torch_device
        builders = {name: partial(_step, name, *inputs) for name in FLOPS}
        seconds = measure(report, work, builders, rounds, torch_device)
        flops = width * heads // 2 * seq_len * (seq_len + 1) / 2
        rates[work] = {name: FLOPS[name] * flops / min(seconds[name]) for name in FLOPS}
        for to in ("four calls", "padded", "baseline"):
            key = (to, torch_device.type)
            highest = TARGETS.get((*key, seq_len), TARGETS.get((*key, None)))
            rows.append((work, "time", "diffx", to, (None, highest)))
        rows.append((work, "peak memory", "diffx", "padded", NO_TARGET))
    shares = {work: {name: rates[work][name] / ceiling for name in FLOPS} for work in rates}
    title = f"attention of {heads} heads, d={width}, {dtype}, {torch_device}"
    show_figures(title, {"FLOPs/s": rates, "of a plain matrix product's": shares})
    return show_ratios(report, rows, title, out)


def _step(
    name: str, heads: int, width: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> Call:
    """A call of the forward and backward pass of a contestant."""
    calls: dict[str, Any] = {
        "baseline": partial(attention, impl="sdpa"),
        "padded": partial(differential_attention, impl="sdpa"),
        "four calls": _four_calls,
        "diffx": partial(differential_attention, impl=FUSED.get(device.type, "sdpa")),
    }
    operation = "attention" if name == "baseline" else "differential_attention"
    tensors = attention_inputs(heads, width, seq_len, device, dtype)[operation]
    call, inputs = calls[name], [x.requires_grad_() for x in tensors]
    d_out = torch.ones_like(call(*inputs))
    return lambda: torch.autograd.grad(call(*inputs), inputs, d_out)


def _four_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """Differential attention as public libraries compute it, in calls of equal widths."""
    halves, maps = v.chunk(2, dim=-1), [(q[:, :, s::2], k[:, :, s::2]) for s in (0, 1)]
    first, second = (
        torch.cat([attention(*queries_keys, half, impl="sdpa") for half in halves], -1)
        for queries_keys in maps
    )
    return first - lam.to(first.dtype) * second
