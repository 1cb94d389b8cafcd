"""Shared by the benches: contestants in turns, their peak memory, inference, the machine."""

import inspect
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.bench.targets import check_file
from diffx.config import require
from diffx.config.train import Device
from diffx.hub.attention import cache_keyword
from diffx.train.folder import environment
from diffx.train.parallel import pick_device
from diffx.train.throughput import peak_allocation, synchronize

ROUND_SECONDS = 0.2  # least duration of a turn, so that the overhead of timing is negligible
DECODED = 32  # tokens
Call = Callable[[], Any]
Builders = Mapping[str, Callable[[], Call]]  # by contestant
Seconds = dict[str, list[float]]  # of a call, by contestant, one for each round


def time_in_turns(contestants: Mapping[str, Call], rounds: int, device: torch.device) -> Seconds:
    """Time contestants in turn, so that a drift of the machine affects them equally.

    Each is called twice before it counts. Every second round is in reverse order.
    """

    def turn(name: str, calls: int = 1) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            contestants[name]()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name in contestants:
        turn(name)
        calls[name] = max(1, round(ROUND_SECONDS / turn(name)))
    seconds: Seconds = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            seconds[name].append(turn(name, calls[name]))
    return seconds


def peak_bytes(builders: Builders, device: torch.device) -> dict[str, int | None]:
    """Measure ``peak_allocation`` of each contestant alone, while it is built and called twice."""

    def build_and_call(build: Callable[[], Call]) -> None:
        call = build()
        call()
        call()

    return {
        name: peak_allocation(partial(build_and_call, build), device)
        for name, build in builders.items()
    }


def measure(
    report: dict[str, Any], work: str, builders: Builders, rounds: int, device: torch.device
) -> Seconds:
    """Add to a report the peak bytes of each contestant alone, then its seconds in turns."""
    report["bytes"][work] = peak_bytes(builders, device)
    calls = {name: build() for name, build in builders.items()}
    report["seconds"][work] = seconds = time_in_turns(calls, rounds, device)
    return seconds


def inference(models: Mapping[str, Any], ids: Tensor, rounds: int) -> dict[str, Seconds]:
    """Time the ``prefill`` of ``ids`` (B, T) and the ``decoding`` of ``DECODED`` tokens."""

    @torch.inference_mode()
    def prefill(model: Any) -> None:
        parameters = inspect.signature(model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        model(input_ids=ids, use_cache=True, **last)

    @torch.inference_mode()
    def decode(model: Any) -> None:
        keyword, cache, token = cache_keyword(model), None, ids[:, :1]
        for _ in range(DECODED):
            output = model(input_ids=token, use_cache=True, **{keyword: cache})
            cache, token = output[keyword], output.logits[:, -1:].argmax(-1)

    def seconds(call: Callable[[Any], None]) -> Seconds:
        calls = {name: partial(call, model) for name, model in models.items()}
        return time_in_turns(calls, rounds, ids.device)

    return {"prefill": seconds(prefill), "decoding": seconds(decode)}


def random_tokens(vocabulary: int, batch: int, length: int, device: torch.device) -> Tensor:
    """The same random tokens (B, T) at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(device)


def attention_inputs(
    heads: int, width: int, seq_len: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[Tensor, ...]]:
    """Random inputs of one sequence for two operations of ``diffx.ops``, by their names."""
    generator, shape = torch.Generator().manual_seed(0), (1, seq_len, heads, width)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    wide, lam = v.view(1, seq_len, heads // 2, 2 * width), torch.tensor(0.5, device=device)
    return {"attention": (q, k, v), "differential_attention": (q, k, wide, lam)}


def begin(out: Path | None, device: str, **settings: Any) -> tuple[torch.device, dict[str, Any]]:
    """Check ``out`` and ``device``, and begin a report with its settings."""
    check_file("out", out)
    torch_device = pick_device(Device(device))
    return torch_device, {"machine": machine(torch_device), **settings, "seconds": {}, "bytes": {}}


def model_settings(model: Any, seq_len: int, batch: int) -> dict[str, Any]:
    """The settings of inference by a loaded model; it must read ``seq_len`` tokens."""
    accepted = f"{model.limit} tokens at most, which {model.name} reads"
    require(model.limit is None or seq_len <= model.limit, "seq_len", seq_len, accepted)
    dtype = str(model.model.dtype).removeprefix("torch.")
    sizes = {"seq_len": seq_len, "batch_size": batch, "decoded_tokens": DECODED}
    return {"checkpoint": model.name, "dtype": dtype, **sizes}


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    return environment(seed=0) | {"device": str(device), "cpu_capability": capability}
