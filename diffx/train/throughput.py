"""What a step costs: the device's matrix-product ceiling, for the model-FLOPs utilisation, and peak memory."""

import resource
import sys
import time

import torch

from diffx.config.train import Precision
from diffx.train.parallel import autocast


def matmul_ceiling(device: torch.device, precision: Precision) -> float:
    """Measure the FLOPs a second of a large square matrix product in the type that training uses.

    The utilisation is against this measured ceiling, on every device alike, and not against a data sheet.
    """
    n, rounds = (8192, 10) if device.type == "cuda" else (1024, 8)
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    fastest = float("inf")
    with torch.no_grad(), autocast(device, precision):
        for _ in range(rounds):
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            fastest = min(fastest, time.perf_counter() - start)
    return 2 * n**3 / fastest


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Give the peak memory in bytes: of the allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
