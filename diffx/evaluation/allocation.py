"""Attention to the answer and to the noise in the retrieval task (arXiv 2410.05258, table 3).

Shares of the row of the last position before the answer's number: of the row A divided by its sum
(``answer``, ``noise``), and of |A| divided by its sum (``|answer|``, ``|noise|``), since the paper
does not say how it normalises signed maps. The answer is the sentence of the first queried needle,
noise is the rest of the context; the first token and the question are neither.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from diffx.data.needles import Sample
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.retrieval import haystack_of, hide, long_enough
from diffx.evaluation.suite import Context, Example, Record
from diffx.models.view import AttentionView
from diffx.results.declare import Average, Declaration, Picture, Table, metrics
from diffx.results.published import published

_NAMES = ("answer", "noise", "|answer|", "|noise|")


def plan(context: Context) -> list[Example]:
    """Depths and samples of one case and length; needles depend on the seed and the depth only."""
    suite, examples = context.suite, []
    needles, asked = suite.case
    length = suite.length or min(context.lm.context, 4096)
    for depth in suite.depths:
        name = f"N={needles} R={asked}/T={length}/depth={depth:g}"
        data = {"needles": needles, "asked": asked, "length": length, "depth": depth}
        data["draw"] = f"depth {depth:.0%}"
        for number in context.limited(range(suite.samples)):
            examples.append(Example(f"{name}/{number}", data | {"number": number}))
    return long_enough(context, haystack_of(context), examples, "suite.length")


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Read one sample at a time."""
    haystack = haystack_of(context)
    for example in examples:
        sample = hide(context, haystack, example)
        shares = dict(zip(_NAMES, _allocate(context.lm, sample), strict=True))  # (layers, heads)
        yield {
            "id": example.id,
            "by": {"depth": example.data["depth"]},
            "scores": {name: float(heads.mean()) for name, heads in shares.items()},
            "needles": dict(zip(sample.needles.cities, sample.needles.numbers, strict=True)),
            "heads": {name: np.round(heads, 5).tolist() for name, heads in shares.items()},
            "prompt": sample.prompt,
        }


def _allocate(lm: LanguageModel, sample: Sample) -> np.ndarray:
    """Shares of the last position's attention by name, layer and head: (4, layers, heads)."""
    parts = [sample.context[:place] for place in sample.span]
    start, end = (len(lm.prefix) + len(tokens) for tokens in lm.encode_batch(parts))
    question = len(lm.prefix) + len(lm.encode(sample.context))
    tokens = lm.prefix + lm.encode(sample.prompt)
    last, span = len(tokens) - 1, slice(max(start, 1), end)
    layers: dict[int, list[list[float]]] = {}

    def attention(layer: int, view: AttentionView) -> None:
        heads = range(view.num_heads)
        rows = torch.stack([view.head_map(j, last, last + 1)[0, 0] for j in heads])  # (heads, T)
        shares = []
        for part in (rows, rows.abs()):
            part = part / part.sum(-1, keepdim=True)
            to_answer = part[:, span].sum(-1)
            shares += [to_answer, part[:, 1:question].sum(-1) - to_answer]
        layers[layer] = torch.stack(shares).tolist()  # device sync: once a layer

    lm.observe(torch.tensor([tokens]), attention)
    return np.array([layers[layer] for layer in sorted(layers)]).swapaxes(0, 1)


def declare(context: Context) -> Declaration:
    """Means by depth, and by layer and head."""
    axes: Any = {"x": "depth", "xlabel": "depth of the answer", "ylabel": "share of attention"}
    bars = [
        Picture(kind="bars", title=f"Attention to the {name}", metrics=[name, f"|{name}|"], **axes)
        for name in ("answer", "noise")
    ]
    axes = {"x": "head", "y": "layer", "xlabel": "head", "ylabel": "layer"}
    title = "Attention to the answer, by layer and head"
    heads = Picture(kind="heat", title=title, metrics=["answer"], **axes)
    return Declaration(
        metrics=[
            *metrics(["answer", "|answer|"]),
            *metrics(["noise", "|noise|"], better="lower"),
        ],
        tables=[
            Table(by=["depth"], label="depth {depth:.0%}", average=Average(over=["depth"])),
            Table(by=["layer", "head"], label="layer {layer} head {head}", compared=False),
        ],
        pictures=[*bars, heads],
        references=published("attention_allocation"),
    )


def figures(context: Context, records: list[Record]) -> Iterator[Record]:
    """Each head's shares, means over the samples."""
    for name in _NAMES:
        grid = np.mean([record["heads"][name] for record in records], axis=0)  # (layers, heads)
        for (layer, head), value in np.ndenumerate(grid):
            place = {"layer": layer, "head": head, "n": len(records)}
            yield {"metric": name, "aggregate": "mean", "value": float(value), **place}
