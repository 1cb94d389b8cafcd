"""The cost of a step: the device's matrix-product ceiling and peak memory."""

import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffx.config.train import Precision
from diffx.train.parallel import autocast

SIDES = {"cuda": 8192, "mps": 1024, "cpu": 1024}  # rows of the matrices that are multiplied


def matmul_ceiling(device: torch.device, precision: Precision) -> float:
    """Measure the FLOPs a second of a large square matrix product, to which MFU refers."""
    n, times = SIDES[device.type], list[float]()
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    with torch.no_grad(), autocast(device, precision):
        # A CPU without bf16 takes seconds for one product.
        while len(times) < 10 and sum(times) < 1:
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes, of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_allocation(call: Callable[[], Any], device: torch.device) -> int | None:
    """Measure the most bytes of tensors that ``call`` adds at one time; on MPS, ``None``."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    # The profiler prints a line when it starts and one when it stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in events), initial=0))
