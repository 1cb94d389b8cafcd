"""Speed and memory of a model: training (forward and backward), reading a prompt into a cache, and decoding behind it.

Each figure is the median over rounds of the clock, so it holds for the machine and the moment; a call that is short is repeated within
its round. Training runs under the autocast of the run's own ``train.precision`` (of ``auto`` for a model that is no run), without an
optimizer step; reading and decoding run in the model's ``dtype``. Memory is the peak of tensors, the weights among them.

Notation: B sequences, T tokens of each.
"""

import gc
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from diffx.config import UserError
from diffx.config.train import Precision
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record
from diffx.files import read_json
from diffx.hub.attention import cache_keyword
from diffx.models import Decoder, KVCache
from diffx.results.declare import Average, Declaration, Metric, Picture, Table, metrics
from diffx.results.published import published
from diffx.train.checkpoint import STATE
from diffx.train.parallel import autocast
from diffx.train.throughput import peak_allocation, synchronize

TRAIN, PREFILL, DECODE = "train tokens/s", "prefill tokens/s", "decode tokens/s"
TRAIN_MEMORY, MEMORY = "train peak memory MB", "inference peak memory MB"  # of 10^6 bytes

_ROUND_SECONDS = (
    0.2  # a round lasts at least about so long, so that the clock and the queue do not count
)

Call = Callable[
    [], tuple[float, ...]
]  # does its work once and gives the seconds of each of its phases


def plan(context: Context) -> list[Example]:
    """One cell for each number and length of sequences.

    Raises:
        UserError: a length that the model cannot read.
    """
    suite, limit = context.suite, context.lm.limit
    for length in suite.lengths:
        if limit is not None and length + suite.decode_tokens > limit:
            raise UserError(
                f"suite.lengths={length} cannot be used with {context.lm.name}: with suite.decode_tokens={suite.decode_tokens} it must be "
                f"{limit} at most, which is all that the model reads"
            )
    return [
        Example(f"B={batch} T={length}", {"shape": [batch, length]})
        for batch in suite.batches
        for length in suite.lengths
    ]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Measure each cell; what does not fit in memory is said in its record and on the terminal, and has no score."""
    suite, lm = context.suite, context.lm
    for example in examples:
        batch, length = example.data["shape"]
        ids = _tokens(lm, batch, length + 1, context.seed)
        steps = suite.decode_tokens
        parts: list[tuple[tuple[str, ...], tuple[int, ...], str, Call, Call]] = [
            (
                (PREFILL, DECODE),
                (batch * length, batch * steps),
                MEMORY,
                reading(lm, ids[:, 1:], steps),
                reading(lm, ids[:, 1:], 1),
            )
        ]
        if suite.train:
            parts.insert(
                0, ((TRAIN,), (batch * length,), TRAIN_MEMORY, training(lm, ids), training(lm, ids))
            )
        rounds: dict[str, list[float]] = {}
        failed: list[str] = []
        for names, tokens, memory, call, short in parts:
            measured = _measure(call, short, suite.rounds, lm.device)
            if measured is None:
                failed += [*names, memory]
                context.reporter.warn(
                    f"{example.id}: {' and '.join(names)} cannot be measured: out of memory"
                )
                continue
            seconds, peak = measured
            rounds |= {
                name: (count / seconds[:, phase]).tolist()
                for phase, (name, count) in enumerate(zip(names, tokens, strict=True))
            }
            if peak is not None:
                rounds[memory] = [(peak + _weights(lm)) / 1e6]
        rows = [
            {"metric": name, "value": value, "example": f"{example.id}, round {number}"}
            for name, values in rounds.items()
            for number, value in enumerate(values)
        ]
        columns = {"variant": f"B={batch}", "length": length}
        record = {"id": example.id, "by": columns, "scores": {}, "rows": rows}
        yield record | {"out_of_memory": failed}


def declare(context: Context) -> Declaration:
    """Medians over rounds of each cell; parameters, and the validation loss of a run."""
    speeds = [name for name in (TRAIN, PREFILL, DECODE) if context.suite.train or name != TRAIN]
    memories = [name for name in (TRAIN_MEMORY, MEMORY) if context.suite.train or name == MEMORY]
    median: dict[str, Any] = {"aggregate": "median", "ratio": True}
    return Declaration(
        metrics=[
            *metrics(speeds, unit="tokens/s", better="higher", **median),
            *metrics(memories, unit="MB", better="lower", **median),
            Metric(name="parameters", unit="parameters", better="none", aggregate="given"),
            Metric(name="validation loss", unit="nats", better="lower", aggregate="given"),
        ],
        tables=[
            Table(by=[], label="model", metrics=["parameters", "validation loss"], compared=False),
            Table(
                by=["variant", "length"],
                label="{variant} T={length}",
                metrics=[*speeds, *memories],
                average=Average(over=["variant", "length"]),
            ),
        ],
        pictures=[
            Picture(
                kind="curve",
                title=name,
                metrics=[name],
                x="length",
                series="variant",
                xlabel="T, tokens of a sequence",
                log="x",
                limits=[0, None],
            )
            for name in (*speeds, *memories)
        ],
        references=published("speed"),
    )


def figures(context: Context, records: list[Record]) -> list[Record]:
    """Parameters, and the run's validation loss where it measured one."""
    count = sum(parameter.numel() for parameter in context.lm.model.parameters())
    rows: list[Record] = [{"metric": "parameters", "aggregate": "sum", "value": count}]
    loss = _validation_loss(context.lm)
    if loss is not None:
        rows.append({"metric": "validation loss", "aggregate": "mean", "value": loss})
    return rows


def training(lm: LanguageModel, ids: Tensor) -> Call:
    """A call that takes the loss of ids (B, T + 1) and its gradients, which it then frees; it gives the seconds of both together."""
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
    """A call that reads ids (B, T) into a new cache and decodes ``steps`` tokens a sequence greedily; it gives the seconds of each."""
    model = lm.model
    options: dict[str, Any] = {}
    if (
        not isinstance(model, Decoder)
        and "logits_to_keep" in inspect.signature(model.forward).parameters
    ):
        options["logits_to_keep"] = 1

    @torch.inference_mode()
    def call() -> tuple[float, float]:
        start = _now(lm.device)
        if isinstance(model, Decoder):
            cache = KVCache(
                model.config, len(ids), ids.shape[1] + steps, lm.device, model.output_weight.dtype
            )

            def step(tokens: Tensor) -> Tensor:
                return F.linear(
                    model.forward_hidden(tokens, cache=cache)[:, -1:], model.output_weight
                ).argmax(-1)  # (B, 1)
        else:
            options[cache_keyword(model)] = DynamicCache(config=model.config)

            def step(tokens: Tensor) -> Tensor:
                return model(input_ids=tokens, use_cache=True, **options).logits[:, -1:].argmax(-1)

        token = step(ids)
        read = _now(lm.device)
        for _ in range(steps):
            token = step(token)
        return read - start, _now(lm.device) - read

    return call


def _measure(
    call: Call, short: Call, rounds: int, device: torch.device
) -> tuple[np.ndarray, int | None] | None:
    """The seconds of ``call`` by round and phase, and the peak memory of ``short`` in bytes; None if they do not fit in memory."""
    try:
        peak = peak_allocation(short, device)
        calls = max(1, round(_ROUND_SECONDS / sum(call())))
        return np.array(
            [np.mean([call() for _ in range(calls)], axis=0) for _ in range(rounds)]
        ), peak
    except (
        RuntimeError
    ) as error:  # torch.OutOfMemoryError is one; the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(
            error
        ):
            raise
    gc.collect()  # behind the except clause: the traceback held on to the tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def _tokens(lm: LanguageModel, batch: int, length: int, seed: int) -> Tensor:
    config = lm.model.config
    vocabulary = (
        config.vocab_size if isinstance(lm.model, Decoder) else config.get_text_config().vocab_size
    )
    return torch.randint(
        vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)
    ).to(lm.device)


def _weights(lm: LanguageModel) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*lm.model.parameters(), *lm.model.buffers())
    )


def _validation_loss(lm: LanguageModel) -> float | None:
    """The held-out loss in nats a token that a run measured at the checkpoint's step; None where it measured none."""
    if lm.loaded.job is None:
        return None
    path = lm.loaded.folder / "checkpoints" / f"step_{lm.loaded.step:08d}" / STATE
    return read_json(path, {"val_loss": float | None})["val_loss"]
