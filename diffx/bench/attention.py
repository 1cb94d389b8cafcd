"""``diffx bench attention``: forward and backward of differential attention in several ways."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.bench.targets import Target, check_out, show_ratios, target_ratio
from diffx.bench.timing import machine, peak_bytes, time_in_turns
from diffx.config import UserError
from diffx.config.train import Device, Precision
from diffx.console import Reporter
from diffx.ops import attention, differential_attention
from diffx.train.parallel import pick_device
from diffx.train.throughput import matmul_ceiling

LAMBDA = 0.5
FUSED = {"cpu": "blocks", "cuda": "triton"}
# The highest accepted ratio of time, by contestant compared with, device and T (None is any).
TARGETS: dict[tuple[str, str, int | None], float] = {
    ("padded", "cpu", 1024): 0.65,
    ("padded", "cpu", 2048): 0.70,
    ("padded", "cpu", 4096): 0.70,
    ("four calls", "cuda", None): 0.70,
    ("baseline", "cuda", None): 1.25,
}
# Floating-point operations of forward and backward, per query-key pair and differential head, in
# units of d.
FLOPS = {"baseline": 28, "padded": 56, "four calls": 56, "ours": 32}


def bench_attention(
    out: Path | None,
    heads: int,
    width: int,
    seq_lens: list[int],
    rounds: int,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    """Measure forward and backward of causal attention, on one random sequence.

    All contestants have equally many weights: ``heads`` heads of the baseline, or half of them with
    values twice as wide. ``padded`` is two calls of PyTorch's attention with queries and keys
    padded to the width of the values, ``four calls`` that of public libraries, with values in
    halves, ``baseline`` ordinary attention, and ``ours`` one fused operation.

    Args:
        out: where to write the figures as JSON; None writes none.
        heads: the baseline's heads.
        width: d of a query and key.
        seq_lens: context lengths T.
        rounds: turns of each contestant.
        dtype: ``auto`` (fp32 on a CPU, else bf16), ``fp32``, ``bf16`` or ``fp16``.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        The report: the machine, peak memory, the seconds of every round, floating-point operations
            a second with those of a plain
        matrix product, and the ratios with their targets.

    Raises:
        UserError: an odd number of heads, a missing device, no Triton on a GPU, or ``out`` cannot
            be a file.
    """
    check_out(out)
    torch_device = pick_device(Device(device))
    if heads % 2:
        raise UserError(
            f"heads={heads} cannot be used: it must be even, for two make one differential head"
        )
    if torch_device.type == "cuda" and find_spec("triton") is None:
        raise UserError(
            "device=cuda cannot be used: the fused kernels need Triton; pip install "
            "'diffx[triton]' installs it"
        )
    kind = {
        "auto": torch.float32 if torch_device.type == "cpu" else torch.bfloat16,
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
    }.get(dtype, torch.float16)
    report: dict[str, Any] = {
        "machine": machine(torch_device),
        "heads": heads,
        "width": width,
        "dtype": str(kind).removeprefix("torch."),
        "rounds": rounds,
        "seconds": {},
        "bytes": {},
        "ratios": [],
        "flops_per_second": {
            "matrix product": matmul_ceiling(
                torch_device, Precision.fp32 if kind is torch.float32 else Precision.bf16
            )
        },
    }
    for seq_len in seq_lens:
        work = f"T={seq_len}"
        builds = {
            name: partial(_step, name, heads, width, seq_len, kind, torch_device) for name in FLOPS
        }
        report["bytes"][f"peak memory, {work}"] = {
            name: peak_bytes(build, torch_device) for name, build in builds.items()
        }
        seconds = report["seconds"][work] = time_in_turns(
            {name: build() for name, build in builds.items()}, rounds, torch_device
        )
        pairs = heads // 2 * seq_len * (seq_len + 1) / 2
        report["flops_per_second"][work] = {
            name: FLOPS[name] * width * pairs / min(times) for name, times in seconds.items()
        }
        for to in ("four calls", "padded", "baseline"):
            target: Target = (
                None,
                TARGETS.get(
                    (to, torch_device.type, seq_len), TARGETS.get((to, torch_device.type, None))
                ),
            )
            report["ratios"].append(target_ratio(report, work, "time", "ours", to, target))
        report["ratios"].append(
            target_ratio(report, work, f"peak memory, {work}", "ours", "padded", (None, None))
        )
    ceiling = report["flops_per_second"]["matrix product"]
    for work in report["seconds"]:
        reached = ", ".join(
            f"{name} {rate / ceiling:.0%}"
            for name, rate in report["flops_per_second"][work].items()
        )
        Reporter().line(f"{work}, of a plain matrix product's operations a second: {reached}")
    show_ratios(
        report["ratios"],
        f"attention of {heads} heads, d={width}, {report['dtype']}, {torch_device}",
        report,
        out,
    )
    return report


def _step(
    name: str, heads: int, width: int, seq_len: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """A call of the forward and backward pass of a contestant."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, seq_len, heads, width, generator=generator).to(device, dtype)
        for _ in range(3)
    )
    wide = v.view(1, seq_len, heads // 2, 2 * width)
    lam = torch.tensor(LAMBDA, device=device)
    inputs = [
        x.requires_grad_()
        for x in ((q, k, v) if name == "baseline" else (q, k, wide.detach(), lam))
    ]
    impl = {"ours": FUSED.get(device.type, "sdpa"), "padded": "sdpa"}.get(name)
    call: Any
    if name == "baseline":
        call = partial(attention, impl="sdpa")
    elif name == "four calls":
        call = _four_calls
    else:
        call = partial(differential_attention, impl=impl)
    d_out = torch.randn(call(*inputs).shape, generator=generator).to(device, dtype)

    def step() -> None:
        torch.autograd.grad(call(*inputs), inputs, d_out)

    return step


def _four_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    """Differential attention as public libraries compute it, in calls of equal widths."""
    first, second = v.chunk(2, dim=-1)
    one, two = (
        torch.cat(
            [
                attention(q[:, :, s::2], k[:, :, s::2], half, impl="sdpa")
                for half in (first, second)
            ],
            -1,
        )
        for s in (0, 1)
    )
    return one - lam.to(one.dtype) * two
