"""``diffx bench profile``: the time of the parts of a training step, as a table and a trace."""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from diffx.bench.timing import machine
from diffx.config import RunError, UserError
from diffx.config.launch import compose
from diffx.console import Reporter, make_table
from diffx.data import cu_seqlens, open_data
from diffx.models import build_model, init_weights
from diffx.train.checkpoint import save_checkpoint
from diffx.train.loop import token_losses
from diffx.train.optimizer import build_optimizer
from diffx.train.parallel import (
    World,
    autocast,
    clip_gradients,
    fused_kernels,
    parallelize,
    pick_device,
)
from diffx.train.throughput import matmul_ceiling, synchronize

PARTS = ("data", "forward", "backward", "clip", "optimizer")
TRACED = 2  # steps in the trace
_WARM = 3  # steps before the timed ones
_SHOWN = 15  # operators in the table
LOADER = 10.0  # target: tokens per second of the loader, relative to the model
SAVING = 0.02  # target: share of the time for checkpoints


def bench_profile(words: list[str], trace: Path, steps: int) -> dict[str, Any]:
    """Time the parts of the training steps of a job, and trace some steps.

    Args:
        words: arguments of ``diffx train``.
        trace: the trace to write, a JSON file for https://ui.perfetto.dev.
        steps: number of timed steps.

    Returns:
        The machine, the median seconds of each part, tokens per second of the model and of the
        loader, seconds of a checkpoint, model FLOPs per second and those of a plain matrix product.

    Raises:
        UserError: the job cannot be trained, or ``trace`` cannot be a file.
        RunError: the trace cannot be written.
    """
    if trace.suffix != ".json" or not trace.parent.is_dir():
        raise UserError(
            f"trace={trace} cannot be used: it must be the name of a .json file in a folder that "
            "exists"
        )
    job = compose("train", words)
    reporter, world = Reporter(), World(pick_device(job.device))
    fused_kernels(job.train, world.device)  # refused before the corpus is read
    corpus = open_data(job.data, job.tokenizer)
    model = build_model(
        dataclasses.replace(
            job.model, vocab_size=job.model.vocab_size or corpus.tokenizer.vocab_size
        )
    )
    init_weights(model, job.seed)
    model = model.to(world.device).train()
    parallelize(model, model.layers, job.train, world)
    optimizer = build_optimizer(model, job.train)
    batches = corpus.batches(
        job.train.seq_len, int(job.train.batch_tokens) // job.train.seq_len, job.seed
    )
    spent: list[dict[str, float]] = []  # seconds of the parts of each step

    @contextmanager
    def part(name: str) -> Iterator[None]:
        synchronize(world.device)
        start = time.perf_counter()
        with record_function(name):
            yield
            synchronize(world.device)
        spent[-1][name] += time.perf_counter() - start

    def step() -> None:
        spent.append(dict.fromkeys(PARTS, 0.0))
        with part("data"):
            batch = next(batches)
        rows = batch.inputs.shape[0]
        size = job.train.micro_batch_size or rows
        for start in range(0, rows, size):
            with part("data"):
                inputs, targets = (
                    x[start : start + size].to(world.device) for x in (batch.inputs, batch.targets)
                )
                boundaries = (
                    cu_seqlens(inputs, corpus.tokenizer.eot_id)
                    if job.train.mask_documents
                    else None
                )
            with part("forward"), autocast(world.device, job.train.precision):
                loss = token_losses(model, inputs, targets, boundaries) / batch.targets.numel()
            with part("backward"):
                loss.backward()
        with part("clip"):
            clip_gradients(model.parameters(), job.train.grad_clip)
        with part("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(_WARM + steps):
        step()
    medians = {
        name: statistics.median(seconds[name] for seconds in spent[_WARM:]) for name in PARTS
    }
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    kinds = [
        ProfilerActivity.CPU,
        *([ProfilerActivity.CUDA] if world.device.type == "cuda" else []),
    ]
    with profile(activities=kinds) as recorded:
        for _ in range(TRACED):
            step()
    try:
        recorded.export_chrome_trace(str(trace))
    except (OSError, RuntimeError) as error:
        raise RunError(f"trace={trace} cannot be written: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        save_checkpoint(Path(folder), 1, model, optimizer, {})
        saving = time.perf_counter() - start
    whole, tokens = sum(medians.values()), int(job.train.batch_tokens)
    report = {
        "machine": machine(world.device),
        "words": words,
        "seconds": medians,
        "tokens_per_second": tokens / whole,
        "loader_tokens_per_second": tokens / medians["data"],
        "checkpoint_seconds": saving,
        "checkpoint_share": saving / (saving + job.train.save_every * whole),
        "flops_per_second": model.flops_per_token(job.train.seq_len) * tokens / whole,
        "matmul_ceiling": matmul_ceiling(world.device, job.train.precision),
    }
    _show(
        report,
        recorded,
        reporter,
        f"{job.model.kind}, {tokens} tokens a step, T={job.train.seq_len}, {world.device}",
    )
    reporter.line(f"trace: {trace} (open it at https://ui.perfetto.dev)")
    return report


def _show(report: dict[str, Any], recorded: profile, reporter: Reporter, title: str) -> None:
    whole = sum(report["seconds"].values())
    rows = [
        [name, f"{1000 * seconds:.2f}", f"{seconds / whole:.1%}"]
        for name, seconds in report["seconds"].items()
    ]
    reporter.table(make_table(title, ("part of a step", "ms", "share"), rows))
    gpu = "device_time" if report["machine"]["device"].startswith("cuda") else "cpu_time"
    events = [event for event in recorded.key_averages() if event.key not in PARTS]
    total = sum(getattr(event, f"self_{gpu}_total") for event in events) or 1.0
    events.sort(key=lambda event: -getattr(event, f"self_{gpu}_total"))
    rows = []
    for event in events[:_SHOWN]:
        microseconds = getattr(event, f"self_{gpu}_total")
        rows.append(
            [
                event.key[:60],
                str(event.count // TRACED),
                f"{microseconds / 1000 / TRACED:.2f}",
                f"{microseconds / total:.1%}",
            ]
        )
    reporter.table(
        make_table(
            "operators, by their own time", ("operator", "calls a step", "ms a step", "share"), rows
        )
    )
    loader = report["loader_tokens_per_second"] / report["tokens_per_second"]
    reporter.line(f"model {report['tokens_per_second']:,.0f} tokens/s")
    reporter.line(
        f"loader {loader:,.0f} times that "
        f"(wanted: {LOADER:.0f} or more{'' if loader >= LOADER else ', missed'})"
    )
    share = report["checkpoint_share"]
    reporter.line(
        f"checkpoints {share:.2%} of the time "
        f"(wanted: {SAVING:.0%} at most{'' if share <= SAVING else ', missed'})"
    )
    utilisation = report["flops_per_second"] / report["matmul_ceiling"]
    reporter.line(
        f"model FLOPs {report['flops_per_second'] / 1e9:,.1f} G/s, {utilisation:.1%} of what a "
        "plain matrix product reaches"
    )
