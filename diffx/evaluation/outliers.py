"""The largest attention logits and hidden states of a model, and their medians (arXiv 2410.05258, table 5).

Absolute values are counted: of the scaled causal logits of every query map (both maps of a differential head), as they enter the
softmax, and of every layer's output. Ranks are exact. A median is read off a histogram whose bins are 1/64 wide at most in relation to
their value, linearly within a bin, so it is off by less than 1.6%; magnitudes below 2^-20 count as 2^-20.

Notation: B batch, T tokens, D model width. Maps are formed a block of rows at a time, so memory grows with T and not with T x T.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffx.config import RunError, UserError
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record
from diffx.models.view import AttentionView
from diffx.results.declare import Declaration, Picture, Table, metrics
from diffx.results.published import published

LOGITS, STATES = _GROUPS = ("attention logits", "hidden states")

_SHIFT = 17  # a bin is all floats that share sign, exponent and the first 6 bits of the fraction
_INFINITE = 255 << 6  # the bin of what is masked
_LOWEST = (127 - 20) << 6  # the bin of 2^-20
_ELEMENTS = 2**18  # of a map that are formed at once
_WINDOWS = "mean over windows"


@dataclass
class Tally:
    """Magnitudes of one layer, or of several: the largest ones and a histogram of all.

    Attributes:
        keep: how many of the largest are kept.
        top: the largest, from the first.
        counts: magnitudes in each bin of float32 patterns.
    """

    keep: int
    top: list[float] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(_INFINITE, dtype=np.int64))

    def add(self, values: Tensor) -> None:
        """Count |values|, of any shape; infinite ones are masked and do not count."""
        values = values.float().abs().flatten()
        counts = (
            torch.bincount(values.view(torch.int32) >> _SHIFT, minlength=_INFINITE)
            .cpu()
            .numpy()[:_INFINITE]
        )  # device sync
        self.counts += counts
        floor = self.top[-1] if len(self.top) == self.keep else -1.0
        used = counts.nonzero()[0]
        if not len(used) or _edge(used[-1] + 1) <= floor:  # as in most blocks
            return
        candidates = values[(values > floor) & (values < torch.inf)]
        self._keep(candidates.topk(min(self.keep, len(candidates))).values.tolist())

    def merge(self, layer: dict[str, Any]) -> None:
        """Add what another tally's ``record`` gave."""
        self._keep(layer["top"])
        self.counts[layer["first"] : layer["first"] + len(layer["counts"])] += layer["counts"]

    def record(self) -> dict[str, Any]:
        """What merges again: the largest, and the histogram from its first bin in use to its last."""
        counts = self.counts.copy()
        counts[_LOWEST] += counts[:_LOWEST].sum()
        counts[:_LOWEST] = 0
        used = counts.nonzero()[0]
        first, last = int(used[0]), int(used[-1])
        return {
            "top": [float(f"{value:.7g}") for value in self.top],
            "first": first,
            "counts": counts[first : last + 1].tolist(),
        }

    def figures(self, ranks: list[int]) -> dict[str, float]:
        """The magnitudes of these ranks, where there are so many, and the median."""
        figures = {f"top-{rank}": self.top[rank - 1] for rank in ranks if rank <= len(self.top)}
        below = self.counts.cumsum()
        middle = below[-1] / 2
        found = np.searchsorted(below, middle)
        low, high = _edge(found), _edge(found + 1)
        return figures | {
            "median": low
            + (high - low) * (middle - (below[found] - self.counts[found])) / self.counts[found]
        }

    def _keep(self, values: list[float]) -> None:
        self.top = list(heapq.merge(self.top, values, reverse=True))[: self.keep]


def plan(context: Context) -> list[Example]:
    """Windows of the documents laid end to end, each twice: for its logits and for its states.

    Raises:
        UserError: a window does not fit in the model, or there is no text.
    """
    suite, lm = context.suite, context.lm
    length = suite.length or min(lm.context, 2048)
    if length > (lm.limit or length) or length <= len(lm.prefix):
        most = f" and {lm.limit} at most, which is all that the model reads" if lm.limit else ""
        raise UserError(
            f"suite.length={length} cannot be used with {lm.name}: it must be more than {len(lm.prefix)}{most}"
        )
    documents = iter(context.documents())
    context.sources["tokenizer"] = context.lm.tokenizer.fingerprint  # windows are cut in tokens
    text: list[int] = []
    windows: list[list[int]] = []
    left = suite.tokens
    while left > len(lm.prefix):
        size = min(length, left) - len(lm.prefix)
        while len(text) < size and (document := next(documents, None)) is not None:
            text += [*lm.encode(document), lm.tokenizer.eot_id]
        if not text:
            context.reporter.warn(
                f"suite.tokens={suite.tokens}: the text has only {suite.tokens - left} tokens, which are all measured"
            )
            break
        windows.append(lm.prefix + text[:size])
        text = text[size:]
        left -= len(windows[-1])
    if not windows:
        raise UserError("data= cannot be used: it has no text")
    return [
        Example(f"{group}/{number:05d}", {"task": group, "tokens": window})
        for group in _GROUPS
        for number, window in enumerate(context.limited(windows))
    ]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Read each window once and yield what was counted in it.

    Raises:
        RunError: queries, keys or states that are not finite.
    """
    lm, ranks = context.lm, context.suite.top
    keep = max(ranks)
    windows: dict[tuple[int, ...], list[Example]] = {}
    for example in examples:
        windows.setdefault(tuple(example.data["tokens"]), []).append(example)
    for window, asked in windows.items():
        tallies = _read(lm, list(window), {example.data["task"] for example in asked}, keep)
        for example in asked:
            layers = [
                tally.record() for tally in tallies[example.data["task"]] if tally.top
            ]  # a layer without attention has no logits
            whole = _merged(layers, keep)
            yield {
                "id": example.id,
                "by": {"task": example.data["task"]},
                "scores": {f"{k}, {_WINDOWS}": v for k, v in whole.figures(ranks).items()},
                "tokens": len(window),
                "text": lm.decode(list(window)),
                "layers": layers,
            }


def declare(context: Context) -> Declaration:
    """Ranks and median of everything, of each layer, and means over windows, which have an interval."""
    names = [*(f"top-{rank}" for rank in context.suite.top), "median"]
    shown = [name for name in names if name in ("top-1", "top-10", "top-100", "median")] or names
    return Declaration(
        metrics=[
            *metrics(names, unit="magnitude", better="lower", aggregate="given"),
            *metrics([f"{name}, {_WINDOWS}" for name in names], unit="magnitude", better="lower"),
        ],
        tables=[
            Table(by=["task"], label="{task}"),
            Table(by=["task", "layer"], label="{task}, layer {layer}", compared=False),
        ],
        pictures=[
            Picture(
                kind="curve",
                title="{panel} by layer",
                metrics=shown,
                x="layer",
                panels=["task"],
                xlabel="layer",
                ylabel="magnitude",
                log="y",
            )
        ],
        references=published("outliers"),
        notes=["Dashed and dotted lines: published figures over all layers."],
    )


def figures(context: Context, records: list[Record]) -> list[Record]:
    """The ranks and the median over all windows, of all layers together and of each."""
    ranks, rows = context.suite.top, []
    parts: list[tuple[int | None, list[Any]]]
    for task in _GROUPS:
        of_task = [record["layers"] for record in records if record["by"]["task"] == task]
        parts = [(None, [layer for layers in of_task for layer in layers])]
        parts += enumerate(map(list, zip(*of_task, strict=True)))  # layer by layer
        for layer, tallies in parts:
            for name, value in _merged(tallies, max(ranks)).figures(ranks).items():
                how = "median" if name == "median" else "rank"
                place = {"task": task, "layer": layer, "n": len(of_task)}
                rows.append({"metric": name, "aggregate": how, "value": value, **place})
    return rows


def _read(
    lm: LanguageModel, window: list[int], groups: set[str], keep: int
) -> dict[str, list[Tally]]:
    """Count logits, states or both in one pass, by layer."""
    tallies = {group: [Tally(keep) for _ in range(lm.num_layers)] for group in groups}

    def attention(layer: int, view: AttentionView) -> None:
        _require_finite(layer, view.q, view.k)
        rows = max(1, _ELEMENTS // len(window))
        for m in range(view.num_maps):
            for start in range(0, len(window), rows):
                stop = min(start + rows, len(window))
                tallies[LOGITS][layer].add(view.logits(m, start, stop)[..., :stop])

    def hidden(layer: int, states: Tensor) -> None:
        _require_finite(layer, states)
        tallies[STATES][layer].add(states)

    lm.observe(
        torch.tensor([window]),
        attention if LOGITS in groups else None,
        hidden if STATES in groups else None,
    )
    return tallies


def _edge(number: np.intp) -> float:
    """The lower edge of a bin."""
    return float((np.array([number], dtype=np.int32) << _SHIFT).view(np.float32)[0])


def _merged(layers: list[dict[str, Any]], keep: int) -> Tally:
    whole = Tally(keep)
    for layer in layers:
        whole.merge(layer)
    return whole


def _require_finite(layer: int, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):  # device sync
        raise RunError(
            f"layer {layer} gives values that are not finite: the weights are broken, or dtype= is too narrow for them"
        )
