"""Shared by the benches: alternating rounds, ratios within a round, peak memory, the machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffx.train.folder import environment
from diffx.train.throughput import peak_allocation, synchronize

ROUND_SECONDS = 0.2  # least duration of a turn, so that the overhead of timing is negligible


def time_in_turns(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time contestants in turn, so that a drift of the machine affects them equally.

    Each is called twice before it counts. Every second round is in reverse order.

    Args:
        contestants: by name, a call that does the same work each time.
        rounds: turns of each contestant.
        device: the device to synchronize.

    Returns:
        Seconds per call, by name, one for each round.
    """

    def turn(call: Callable[[], Any], calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, call in contestants.items():
        turn(call, 1)
        calls[name] = max(1, round(ROUND_SECONDS / turn(call, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants if number % 2 == 0 else reversed(list(contestants)):
            seconds[name].append(turn(contestants[name], calls[name]))
    return seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """The speed of one contestant relative to another; above 1 is faster.

    Attributes:
        median: over the rounds.
        low: the lowest round.
        high: the highest round.
    """

    median: float
    low: float
    high: float


def speed_ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> Ratio:
    """Compare the speed ``of`` one contestant ``to`` another, given ``time_in_turns``."""
    rounds = [
        baseline / contestant for contestant, baseline in zip(seconds[of], seconds[to], strict=True)
    ]
    return Ratio(median=statistics.median(rounds), low=min(rounds), high=max(rounds))


def peak_bytes(build: Callable[[], Callable[[], Any]], device: torch.device) -> int | None:
    """Peak bytes of tensors while a contestant is built and called twice (``peak_allocation``).

    Args:
        build: makes the contestant.
        device: device of the contestant.
    """

    def build_and_call() -> None:
        call = build()
        call()
        call()

    return peak_allocation(build_and_call, device)


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and threads."""
    return environment(seed=0) | {
        "device": str(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
