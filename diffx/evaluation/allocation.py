"""Attention to the answer and to the noise in the retrieval task (arXiv 2410.05258, table 3).

The row of the last position before the answer's number, in every layer and head. The paper does not say how a differential head's signed
map is normalised: here a row is divided by its sum (``answer``, ``noise``), and beside it |A| by the sum of |A| (``|answer|``,
``|noise|``); for ordinary heads they are the same. The answer is the whole sentence of the first queried needle, which is what is put in
at a depth; noise is the rest of the context, the other needles included. The first token, where heads park their attention, and the
question belong to neither. A figure is the mean over heads and layers; records keep each head's.
"""

from collections.abc import Iterator

import numpy as np
import torch

from diffx.data.needles import Sample
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.retrieval import haystack_of, hide, long_enough
from diffx.evaluation.suite import Context, Example, Record
from diffx.models.view import AttentionView
from diffx.results.declare import Average, Declaration, Metric, Picture, Table
from diffx.results.published import published

_NAMES = ("answer", "noise", "|answer|", "|noise|")


def plan(context: Context) -> list[Example]:
    """Depths and samples of one case and length; the needles depend on the seed and the depth, not on the model.

    Raises:
        UserError: a length that the model cannot read, that does not hold the needles, or is more than the text.
    """
    suite = context.suite
    needles, asked = suite.case
    length = suite.length or min(context.lm.context, 4096)
    examples = []
    for depth in suite.depths:
        data = {
            "draw": f"depth {depth:.0%}",
            "needles": needles,
            "asked": asked,
            "length": length,
            "depth": depth,
        }
        name = f"N={needles} R={asked}/T={length}/depth={depth:g}"
        examples += context.limited(
            [
                Example(f"{name}/{number}", data | {"number": number})
                for number in range(suite.samples)
            ]
        )
    return long_enough(context, haystack_of(context), examples, "suite.length")


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Read one sample at a time.

    Raises:
        UserError: the model's attention cannot be seen.
    """
    haystack = haystack_of(context)
    for example in examples:
        sample = hide(context, haystack, example)
        heads = _allocate(context.lm, sample)  # (4, layers, heads)
        yield {
            "id": example.id,
            "by": {"depth": example.data["depth"]},
            "scores": dict(zip(_NAMES, heads.mean((1, 2)).tolist(), strict=True)),
            "needles": dict(zip(sample.needles.cities, sample.needles.numbers, strict=True)),
            "heads": {
                name: np.round(part, 5).tolist() for name, part in zip(_NAMES, heads, strict=True)
            },
            "prompt": sample.prompt,
        }


def _allocate(lm: LanguageModel, sample: Sample) -> np.ndarray:
    """Shares of the last position's attention by name, layer and head: (4, layers, heads)."""
    start, end = (
        len(tokens) for tokens in lm.encode_batch([sample.context[:place] for place in sample.span])
    )
    question = len(lm.prefix) + len(lm.encode(sample.context))
    tokens = lm.prefix + lm.encode(sample.prompt)
    last = len(tokens) - 1
    span = slice(max(len(lm.prefix) + start, 1), len(lm.prefix) + end)
    layers: dict[int, list[list[float]]] = {}

    def attention(layer: int, view: AttentionView) -> None:
        rows = torch.stack(
            [view.head_map(head, last, last + 1)[0, 0] for head in range(view.num_heads)]
        )  # (heads, T)
        shares = []
        for part in (rows, rows.abs()):
            part = part / part.sum(-1, keepdim=True)
            found = part[:, span].sum(-1)
            shares += [found, part[:, 1:question].sum(-1) - found]
        layers[layer] = torch.stack(shares).tolist()  # device sync: once a layer

    lm.observe(torch.tensor([tokens]), attention)
    return np.array([layers[layer] for layer in sorted(layers)]).swapaxes(0, 1)


def declare(context: Context) -> Declaration:
    """Means by depth, and by layer and head."""
    better = {"answer": "higher", "|answer|": "higher", "noise": "lower", "|noise|": "lower"}
    metrics = [Metric(name=name, better=better[name]) for name in _NAMES]
    bars = [
        Picture(
            kind="bars",
            title=f"Attention to the {name}",
            metrics=[name, f"|{name}|"],
            x="depth",
            xlabel="depth of the answer",
            ylabel="share of attention",
        )
        for name in ("answer", "noise")
    ]
    heads = Picture(
        kind="heat",
        title="Attention to the answer, by layer and head",
        metrics=["answer"],
        x="head",
        y="layer",
        xlabel="head",
        ylabel="layer",
    )
    return Declaration(
        metrics=metrics,
        tables=[
            Table(by=["depth"], label="depth {depth:.0%}", average=Average(over=["depth"])),
            Table(by=["layer", "head"], label="layer {layer} head {head}", compared=False),
        ],
        pictures=[*bars, heads],
        references=published("attention_allocation"),
    )


def figures(context: Context, records: list[Record]) -> list[Record]:
    """Each head's shares, means over the samples."""
    rows = []
    for name in _NAMES:
        grid = np.mean([record["heads"][name] for record in records], axis=0)  # (layers, heads)
        for (layer, head), value in np.ndenumerate(grid):
            columns = {"layer": layer, "head": head, "n": len(records)}
            rows.append({"metric": name, "aggregate": "mean", "value": float(value), **columns})
    return rows
