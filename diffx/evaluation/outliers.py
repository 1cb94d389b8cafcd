"""The largest attention logits and hidden states, and medians (arXiv 2410.05258, table 5).

Magnitudes of the scaled causal logits of every query map, and of every layer's output (B, T, D).
Ranks are exact. A median is interpolated in a histogram, whose bins have a relative width of at
most 1/64; magnitudes below 2^-20 count as 2^-20. Memory grows with T, the tokens of a window.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffx.config import RunError
from diffx.config.checks import refuse, require
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record
from diffx.models.view import AttentionView
from diffx.results.declare import Declaration, Picture, Table, metrics
from diffx.results.published import published

LOGITS, STATES = _GROUPS = ("attention logits", "hidden states")

_SHIFT = 17  # a bin is all floats that share exponent and the first 6 bits of the fraction
_INFINITE = 255 << 6  # the bin of masked logits
_LOWEST = (127 - 20) << 6  # the bin of 2^-20
_ELEMENTS = 2**18  # of a map that are formed at once
_WINDOWS = "mean over windows"


@dataclass
class Tally:
    """Magnitudes: the ``keep`` largest, from the first, and counts in bins of float32 patterns."""

    keep: int
    top: list[float] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(_INFINITE, dtype=np.int64))

    def add(self, values: Tensor) -> None:
        """Count |values|, of any shape, but for infinite ones, which are masked."""
        values = values.float().abs().flatten()
        bins = torch.bincount(values.view(torch.int32) >> _SHIFT, minlength=_INFINITE)
        self.counts += bins.cpu().numpy()[:_INFINITE]  # device sync
        floor = self.top[-1] if len(self.top) == self.keep else -1.0
        values = values[(values > floor) & (values < torch.inf)]
        self._keep(values.topk(min(self.keep, len(values))).values.tolist())

    def merge(self, layer: dict[str, Any]) -> None:
        """Add another tally's ``record``."""
        self._keep(layer["top"])
        self.counts[layer["first"] : layer["first"] + len(layer["counts"])] += layer["counts"]

    def record(self) -> dict[str, Any]:
        """The largest, and the used part of the histogram, as JSON."""
        counts = self.counts.copy()
        counts[_LOWEST] += counts[:_LOWEST].sum()
        counts[:_LOWEST] = 0
        first = int(counts.nonzero()[0][0])
        top = [float(f"{value:.7g}") for value in self.top]
        return {"top": top, "first": first, "counts": np.trim_zeros(counts).tolist()}

    def figures(self, ranks: list[int]) -> dict[str, float]:
        """The magnitudes of the ranks that exist, and the median."""
        figures = {f"top-{rank}": self.top[rank - 1] for rank in ranks if rank <= len(self.top)}
        sums = self.counts.cumsum()
        middle = sums[-1] / 2
        index = np.searchsorted(sums, middle)
        share = 1 - (sums[index] - middle) / self.counts[index]
        edges = (np.array([index, index + 1], dtype=np.int32) << _SHIFT).view(np.float32)
        low, high = edges.tolist()
        return figures | {"median": low + (high - low) * share}

    def _keep(self, values: list[float]) -> None:
        self.top = sorted(self.top + values, reverse=True)[: self.keep]


def plan(context: Context) -> list[Example]:
    """Windows of the joined documents, each twice: for its logits and for its states."""
    suite, lm = context.suite, context.lm
    length = suite.length or min(lm.context, 2048)
    context.check_length("suite.length", length)
    require(length > len(lm.prefix), "suite.length", length, f"more than {len(lm.prefix)}")
    documents = iter(context.documents())
    context.sources["tokenizer"] = lm.tokenizer.fingerprint  # windows are cut in tokens
    text: list[int] = []
    windows: list[list[int]] = []
    remaining = suite.tokens
    while remaining > len(lm.prefix):
        size = min(length, remaining) - len(lm.prefix)
        while len(text) < size and (document := next(documents, None)) is not None:
            text += [*lm.encode(document), lm.tokenizer.eot_id]
        if not text:
            few = f"the text has only {suite.tokens - remaining} tokens, which are all measured"
            context.reporter.warn(f"suite.tokens={suite.tokens}: {few}")
            break
        windows.append(lm.prefix + text[:size])
        text = text[size:]
        remaining -= len(windows[-1])
    refuse(not windows, "data=", "it has no text")
    return [
        Example(f"{group}/{number:05d}", {"task": group, "tokens": window})
        for group in _GROUPS
        for number, window in enumerate(context.limited(windows))
    ]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Read each window once and yield a record for its logits and one for its states."""
    lm, ranks = context.lm, context.suite.top
    keep = max(ranks)
    windows: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        windows.setdefault(tuple(example.data["tokens"]), []).append(example)
    for window, asked in windows.items():
        tallies = _read(lm, list(window), {example.data["task"] for example in asked}, keep)
        for example in asked:
            # a layer without attention has no logits
            layers = [tally.record() for tally in tallies[example.data["task"]] if tally.top]
            magnitudes = _merged(layers, keep).figures(ranks)
            scores = {f"{name}, {_WINDOWS}": value for name, value in magnitudes.items()}
            by = {"task": example.data["task"]}
            record: Record = {"id": example.id, "by": by, "scores": scores, "tokens": len(window)}
            yield record | {"text": lm.decode(list(window)), "layers": layers}


def declare(context: Context) -> Declaration:
    """Ranks and median of all layers and of each, and means over windows."""
    names = [*(f"top-{rank}" for rank in context.suite.top), "median"]
    shown = [name for name in names if name in ("top-1", "top-10", "top-100", "median")] or names
    options = {"unit": "magnitude", "better": "lower"}
    axes: Any = {"x": "layer", "xlabel": "layer", "ylabel": "magnitude", "log": "y"}
    title = "{panel} by layer"
    curves = Picture(kind="curve", title=title, metrics=shown, panels=["task"], **axes)
    return Declaration(
        metrics=[
            *metrics(names, aggregate="given", **options),
            *metrics([f"{name}, {_WINDOWS}" for name in names], **options),
        ],
        tables=[
            Table(by=["task"], label="{task}"),
            Table(by=["task", "layer"], label="{task}, layer {layer}", compared=False),
        ],
        pictures=[curves],
        references=published("outliers"),
        notes=["Dashed and dotted lines: published figures over all layers."],
    )


def figures(context: Context, records: list[Record]) -> Iterator[Record]:
    """The ranks and the median over all windows, of all layers together and of each."""
    ranks = context.suite.top
    for task in _GROUPS:
        windows = [record["layers"] for record in records if record["by"]["task"] == task]
        layers = list(zip(*windows, strict=True))
        for layer, tallies in [(None, chain.from_iterable(layers)), *enumerate(layers)]:
            place = {"task": task, "layer": layer, "n": len(windows)}
            for name, value in _merged(tallies, max(ranks)).figures(ranks).items():
                how = "median" if name == "median" else "rank"
                yield {"metric": name, "aggregate": how, "value": value, **place}


def _read(
    lm: LanguageModel, window: list[int], groups: set[str], keep: int
) -> dict[str, list[Tally]]:
    """Count logits, states or both in one pass, by layer."""
    tallies = {group: [Tally(keep) for _ in range(lm.num_layers)] for group in groups}

    def attention(layer: int, view: AttentionView) -> None:
        _require_finite(layer, view.q, view.k)
        rows = max(1, _ELEMENTS // len(window))
        for m, start in product(range(view.num_maps), range(0, len(window), rows)):
            stop = min(start + rows, len(window))
            tallies[LOGITS][layer].add(view.logits(m, start, stop)[..., :stop])

    def hidden(layer: int, states: Tensor) -> None:
        _require_finite(layer, states)
        tallies[STATES][layer].add(states)

    callbacks = (attention if LOGITS in groups else None, hidden if STATES in groups else None)
    lm.observe(torch.tensor([window]), *callbacks)
    return tallies


def _merged(layers: Iterable[dict[str, Any]], keep: int) -> Tally:
    whole = Tally(keep)
    for layer in layers:
        whole.merge(layer)
    return whole


def _require_finite(layer: int, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):  # device sync
        causes = "the weights are broken, or dtype= is too narrow for them"
        raise RunError(f"layer {layer} gives values that are not finite: {causes}")
