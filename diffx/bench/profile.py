"""``diffx bench profile``: the time of the parts of a training step, as a table and a trace."""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from diffx.bench.targets import check_file
from diffx.bench.timing import machine
from diffx.config import RunError
from diffx.config.launch import compose
from diffx.console import Reporter, make_table
from diffx.data import cu_seqlens, open_data
from diffx.train import parallel
from diffx.train.checkpoint import save_checkpoint
from diffx.train.loop import token_losses
from diffx.train.optimizer import build_optimizer
from diffx.train.scratch import Scratch
from diffx.train.throughput import matmul_ceiling, synchronize

PARTS = ("data", "forward", "backward", "clip", "optimizer")
TRACED, _WARM = 2, 3  # steps in the trace, and before the timed ones
LOADER = 10.0  # target: tokens per second of the loader, relative to the model
SAVING = 0.02  # target: share of the time for checkpoints


def bench_profile(words: list[str], trace: Path, steps: int) -> dict[str, Any]:
    """Time the parts of ``steps`` training steps of a job, and trace some further steps.

    ``words`` are the arguments of ``diffx train``; ``trace`` is a JSON file for
    https://ui.perfetto.dev.

    Raises:
        UserError: the job cannot be trained, or ``trace`` cannot be a file.
        RunError: the trace cannot be written.
    """
    check_file("trace", trace)
    job = compose("train", words)
    train, device = job.train, parallel.pick_device(job.device)
    reporter, world = Reporter(), parallel.World(device)
    parallel.fused_kernels(train, device)  # refused before the corpus is read
    scratch = Scratch(job, words, None, world, reporter)
    corpus = open_data(job.data, job.tokenizer)
    scratch.build(corpus, initial=False)
    model = scratch.model.train()
    parallel.parallelize(model, model.layers, train, world)
    optimizer = build_optimizer(model, train)
    seq_len, tokens = train.seq_len, int(train.batch_tokens)
    batches = corpus.batches(seq_len, tokens // seq_len, job.seed)
    spent: list[dict[str, float]] = []  # seconds of the parts of each step

    @contextmanager
    def part(name: str) -> Iterator[None]:
        synchronize(device)
        start = time.perf_counter()
        with record_function(name):
            yield
            synchronize(device)
        spent[-1][name] += time.perf_counter() - start

    def step() -> None:
        spent.append(dict.fromkeys(PARTS, 0.0))
        with part("data"):
            batch = next(batches)
        rows = train.micro_batch_size or len(batch.inputs)
        pairs = zip(batch.inputs.split(rows), batch.targets.split(rows), strict=True)
        for inputs, targets in pairs:
            with part("data"):
                inputs, targets = inputs.to(device), targets.to(device)
                eot_id = corpus.tokenizer.eot_id
                bounds = cu_seqlens(inputs, eot_id) if train.mask_documents else None
            with part("forward"), parallel.autocast(device, train.precision):
                loss = token_losses(model, inputs, targets, bounds) / batch.targets.numel()
            with part("backward"):
                loss.backward()
        with part("clip"):
            parallel.clip_gradients(model.parameters(), train.grad_clip)
        with part("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    for _ in range(_WARM + steps):
        step()
    timed = spent[_WARM:]
    medians = {name: statistics.median(seconds[name] for seconds in timed) for name in PARTS}
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + cuda * [ProfilerActivity.CUDA]) as recorded:
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
    whole = sum(medians.values())
    speed, loader = tokens / whole, tokens / medians["data"]
    share = saving / (saving + train.save_every * whole)
    flops = scratch.flops_per_token * speed
    ceiling = matmul_ceiling(device, train.precision)
    rows = [[name, f"{1000 * s:.2f}", f"{s / whole:.1%}"] for name, s in medians.items()]
    title = f"{job.model.kind}, {tokens} tokens a step, T={seq_len}, {device}"
    reporter.table(make_table(title, ("part of a step", "ms", "share"), rows))
    order = f"self_{'device' if cuda else 'cpu'}_time_total"
    operators = recorded.key_averages().table(order, row_limit=15, max_name_column_width=40)
    for line in (
        f"operators of {TRACED} steps, by self time\n{operators}",
        f"model {speed:,.0f} tokens/s",
        f"loader {loader / speed:,.0f} times that (wanted: {LOADER:.0f} or more)",
        f"checkpoints {share:.2%} of the time (wanted: {SAVING:.0%} at most)",
        f"model {flops / 1e9:,.1f} GFLOPs/s, {flops / ceiling:.1%} of a plain matrix product's",
        f"trace: {trace} (open it at https://ui.perfetto.dev)",
    ):
        reporter.line(line)
    report: dict[str, Any] = {"machine": machine(device), "words": words, "seconds": medians}
    report |= {"tokens_per_second": speed, "loader_tokens_per_second": loader}
    report |= {"checkpoint_seconds": saving, "checkpoint_share": share}
    return report | {"flops_per_second": flops, "matmul_ceiling": ceiling}
