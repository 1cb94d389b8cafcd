"""Attention to the answer and to the noise in the retrieval task (arXiv 2410.05258, table 3).

The row of the last position before the answer's number, in every layer and head. The paper does not say how a differential head's signed
map is normalised: here a row is divided by its sum (``answer``, ``noise``), and beside it |A| by the sum of |A| (``|answer|``,
``|noise|``); for ordinary heads they are the same. The answer is the whole sentence of the first queried needle, which is what is put in
at a depth; noise is the rest of the context, the other needles included. The first token, where heads park their attention, and the
question belong to neither. A figure is the mean over heads and layers; records keep each head's.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from diffx.data.needles import Sample
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.published import published
from diffx.evaluation.retrieval import haystack_of, hide, long_enough
from diffx.evaluation.suite import Context, Example, Metric, Record, mean_metrics
from diffx.models.view import AttentionView

_NAMES = ("answer", "noise", "|answer|", "|noise|")
_OURS, _THEIRS = ("#0072B2", "#56B4E9"), ("#999999", "#D55E00")


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
        data = {"group": f"depth {depth:.0%}", "needles": needles, "asked": asked, "length": length, "depth": depth}
        name = f"N={needles} R={asked}/T={length}/depth={depth:g}"
        examples += context.limited([Example(f"{name}/{number}", data | {"number": number}) for number in range(suite.samples)])
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
            "group": example.data["group"],
            "scores": dict(zip(_NAMES, heads.mean((1, 2)).tolist(), strict=True)),
            "needles": dict(zip(sample.needles.cities, sample.needles.numbers, strict=True)),
            "heads": {name: np.round(part, 5).tolist() for name, part in zip(_NAMES, heads, strict=True)},
            "prompt": sample.prompt,
        }


def _allocate(lm: LanguageModel, sample: Sample) -> np.ndarray:
    """Shares of the last position's attention by name, layer and head: (4, layers, heads)."""
    start, end = (len(tokens) for tokens in lm.encode_batch([sample.context[:place] for place in sample.span]))
    question = len(lm.prefix) + len(lm.encode(sample.context))
    tokens = lm.prefix + lm.encode(sample.prompt)
    last = len(tokens) - 1
    span = slice(max(len(lm.prefix) + start, 1), len(lm.prefix) + end)
    layers: dict[int, list[list[float]]] = {}

    def attention(layer: int, view: AttentionView) -> None:
        rows = torch.stack([view.head_map(head, last, last + 1)[0, 0] for head in range(view.num_heads)])  # (heads, T)
        shares = []
        for part in (rows, rows.abs()):
            part = part / part.sum(-1, keepdim=True)
            found = part[:, span].sum(-1)
            shares += [found, part[:, 1:question].sum(-1) - found]
        layers[layer] = torch.stack(shares).tolist()  # device sync: once a layer

    lm.observe(torch.tensor([tokens]), attention)
    return np.array([layers[layer] for layer in sorted(layers)]).swapaxes(0, 1)


def summarize(context: Context, records: list[Record]) -> list[Metric]:
    """Means by depth."""
    return mean_metrics(records, lambda group, name: published("attention_allocation", group, name))


def draw(context: Context, records: list[Record], metrics: list[Metric], path: Path) -> None:
    """Draw the shares by depth, the papers' beside ours, and the answer's by layer and head."""
    groups = list(dict.fromkeys(record["group"] for record in records))
    canvas = Figure(figsize=(15, 4.8), layout="constrained")
    *bars, heads = canvas.subplots(1, 3)
    for axes, name in zip(bars, ("answer", "noise"), strict=True):
        shown = {metric.group: metric for metric in metrics if metric.name == name}
        absolute = {metric.group: metric.value for metric in metrics if metric.name == f"|{name}|"}
        ours = {context.lm.name: [shown[group].value for group in groups]}
        if any(abs(absolute[group] - shown[group].value) > 1e-6 for group in groups):
            ours[f"{context.lm.name}, |A|"] = [absolute[group] for group in groups]
        names = dict.fromkeys(label for group in groups for label in shown[group].published)
        theirs = {f"{label}, 4K": [shown[group].published.get(label, np.nan) for group in groups] for label in names}
        series = [*zip(ours.items(), _OURS, strict=False), *zip(theirs.items(), _THEIRS, strict=True)]
        width = 0.8 / len(series)
        for number, ((label, values), colour) in enumerate(series):
            places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * width
            axes.bar(places, values, width, label=label, color=colour, alpha=0.55 if label in theirs else 1.0)
        axes.set_xticks(range(len(groups)), [group.removeprefix("depth ") for group in groups])
        axes.set(xlabel="depth of the answer", ylabel="share of attention")
        axes.set_title(f"Attention to the {name}", loc="left", fontsize=11, fontweight="bold")
        axes.axhline(0, color="#444444", linewidth=1)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(*bars[0].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False, fontsize=9.5)
    grid = np.mean([record["heads"]["answer"] for record in records], axis=0)
    image = heads.imshow(grid, aspect="auto", cmap="viridis", vmin=min(0.0, grid.min()))
    heads.set(xlabel="head", ylabel="layer", xticks=range(grid.shape[1]), yticks=range(grid.shape[0]))
    heads.set_title("Attention to the answer, by layer and head", loc="left", fontsize=11, fontweight="bold")
    canvas.colorbar(image, ax=heads)
    canvas.savefig(path, dpi=150)
