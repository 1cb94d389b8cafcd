"""Speed and memory of a model: training, reading a prompt, and decoding after it.

A figure is the median over rounds. Training is forward and backward in the run's
``train.precision`` (else ``auto``), the rest runs in ``dtype``. Memory is the peak of tensors, with
the weights. Notation: B sequences, T tokens.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffx.config.train import Precision
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record
from diffx.files import read_json
from diffx.models import Decoder
from diffx.results.declare import Average, Declaration, Picture, Table, metrics
from diffx.results.published import published
from diffx.train.checkpoint import STATE
from diffx.train.parallel import autocast
from diffx.train.throughput import peak_allocation, synchronize

TRAIN, PREFILL, DECODE = "train tokens/s", "prefill tokens/s", "decode tokens/s"
TRAIN_MEMORY, MEMORY = "train peak memory MB", "inference peak memory MB"  # of 10^6 bytes
# Shorter calls are repeated within a round, so that the clock's error does not count.
_ROUND_SECONDS = 0.2

Call = Callable[[], tuple[float, ...]]  # does its work once and returns the seconds of each phase


def plan(context: Context) -> list[Example]:
    """One example for each number and length of sequences."""
    suite = context.suite
    for length in suite.lengths:
        context.check_length("suite.lengths", length, suite.decode_tokens)
    shapes = [(batch, length) for batch in suite.batches for length in suite.lengths]
    return [
        Example(f"B={batch} T={length}", {"shape": (batch, length)}) for batch, length in shapes
    ]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Measure each shape; what does not fit in memory has no score, and there is a warning."""
    suite, lm = context.suite, context.lm
    weights = sum(tensor.nbytes for tensor in (*lm.model.parameters(), *lm.model.buffers()))
    for example in examples:
        batch, length = example.data["shape"]
        ids = _tokens(lm, batch, length + 1, context.seed)
        read, steps = batch * length, suite.decode_tokens
        parts: list[tuple[dict[str, int], str, Call, Call]] = []  # tokens, memory, calls
        if suite.train:
            call = training(lm, ids)
            parts.append(({TRAIN: read}, TRAIN_MEMORY, call, call))
        calls = reading(lm, ids[:, 1:], steps), reading(lm, ids[:, 1:], 1)
        parts.append(({PREFILL: read, DECODE: batch * steps}, MEMORY, *calls))
        rounds: dict[str, list[float]] = {}
        failed: list[str] = []
        for tokens, memory, call, short in parts:
            measured = _measure(call, short, suite.rounds, lm.device)
            if measured is None:
                failed += [*tokens, memory]
                names = " and ".join(tokens)
                context.reporter.warn(f"{example.id}: {names} cannot be measured: out of memory")
                continue
            seconds, peak = measured
            for (name, count), phase in zip(tokens.items(), seconds.T, strict=True):
                rounds[name] = (count / phase).tolist()
            if peak is not None:
                rounds[memory] = [(peak + weights) / 1e6]
        rows = [
            {"metric": name, "value": value, "example": f"{example.id}, round {number}"}
            for name, values in rounds.items()
            for number, value in enumerate(values)
        ]
        by = {"variant": f"B={batch}", "length": length}
        yield {"id": example.id, "by": by, "scores": {}, "rows": rows, "out_of_memory": failed}


def declare(context: Context) -> Declaration:
    """Medians over rounds of each shape; parameters, and the validation loss of a run."""
    speeds, memories = [PREFILL, DECODE], [MEMORY]
    if context.suite.train:
        speeds, memories = [TRAIN, *speeds], [TRAIN_MEMORY, *memories]
    names = [*speeds, *memories]
    median: dict[str, Any] = {"aggregate": "median", "ratio": True}
    average = Average(over=["variant", "length"])
    axis: Any = {"x": "length", "xlabel": "T, tokens of a sequence", "log": "x"}
    axis |= {"series": "variant", "limits": [0, None]}
    return Declaration(
        metrics=[
            *metrics(speeds, unit="tokens/s", **median),
            *metrics(memories, unit="MB", better="lower", **median),
            *metrics(["parameters"], unit="parameters", better="none", aggregate="given"),
            *metrics(["validation loss"], unit="nats", better="lower", aggregate="given"),
        ],
        tables=[
            Table(by=[], label="model", metrics=["parameters", "validation loss"], compared=False),
            Table(by=average.over, label="{variant} T={length}", metrics=names, average=average),
        ],
        pictures=[Picture(kind="curve", title=name, metrics=[name], **axis) for name in names],
        references=published("speed"),
    )


def figures(context: Context, records: list[Record]) -> Iterator[Record]:
    """Parameters, and the held-out loss that a run measured at the checkpoint's step."""
    loaded = context.lm.loaded
    count = sum(parameter.numel() for parameter in context.lm.model.parameters())
    yield {"metric": "parameters", "aggregate": "sum", "value": count}
    if loaded.job is not None:
        path = loaded.folder / "checkpoints" / f"step_{loaded.step:08d}" / STATE
        loss = read_json(path, {"val_loss": float | None})["val_loss"]
        if loss is not None:
            yield {"metric": "validation loss", "aggregate": "mean", "value": loss}


def training(lm: LanguageModel, ids: Tensor) -> Call:
    """A call that computes the loss of ids (B, T + 1) and its gradients; one phase."""
    job = lm.loaded.job
    precision = job.train.precision if job else Precision.auto
    options = {} if isinstance(lm.model, Decoder) else {"use_cache": False}

    def call() -> tuple[float]:
        lm.model.train()
        try:
            start = _now(lm.device)
            with autocast(lm.device, precision):
                logits = lm.model(ids[:, :-1], **options)  # (B, T, V)
                logits = logits if isinstance(logits, Tensor) else logits.logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
            return (_now(lm.device) - start,)
        finally:
            lm.model.zero_grad(set_to_none=True)
            lm.model.eval()

    return call


def reading(lm: LanguageModel, ids: Tensor, steps: int) -> Call:
    """A call that reads ids (B, T) into a cache, and decodes ``steps`` tokens; two phases."""

    def call() -> tuple[float, float]:
        begin = _now(lm.device)
        prefix = lm.read(ids, free=steps)
        chosen = prefix.logits.argmax(-1)
        read = _now(lm.device)
        for _ in range(steps):
            lm.step(prefix, chosen)
            chosen = prefix.logits.argmax(-1)
        return read - begin, _now(lm.device) - read

    return call


def _measure(
    call: Call, short: Call, rounds: int, device: torch.device
) -> tuple[np.ndarray, int | None] | None:
    """Seconds of ``call`` by round and phase, peak bytes of ``short``; None if out of memory."""
    try:
        peak = peak_allocation(short, device)
        calls = max(1, round(_ROUND_SECONDS / sum(call())))
        seconds = [np.mean([call() for _ in range(calls)], axis=0) for _ in range(rounds)]
        return np.array(seconds), peak
    except RuntimeError as error:  # the CPU's allocator has no class for it
        known = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not known:
            raise
    gc.collect()  # after the except clause, whose traceback holds the tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _tokens(lm: LanguageModel, batch: int, length: int, seed: int) -> Tensor:
    config: Any = lm.model.config
    config = config if isinstance(lm.model, Decoder) else config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator).to(lm.device)
