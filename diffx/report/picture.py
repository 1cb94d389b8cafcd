"""The picture of a comparison: loss curves, and beside them the scaling fit or the difference to the baseline."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

from diffx.console import figure

FORMATS = (".png", ".pdf", ".svg")

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the comparison that ``analyse`` returned, in the format of the path's suffix."""
    groups, scaling = report["groups"], report["scaling"]
    looks = _looks(groups, by_kind=scaling is not None)
    differences = any(group["difference_curve"] for group in groups)
    panels = 2 if scaling or differences else 1
    columns = min(panels, len(groups))
    canvas = Figure(figsize=(6.4 * panels, 5 + 0.2 * len(groups) / columns), layout="constrained")
    left, *right = canvas.subplots(1, panels, squeeze=False)[0]
    _loss_panel(left, groups, looks)
    what = "final validation loss: mean ± standard deviation over seeds; bands: lowest to highest seed"
    canvas.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, handlelength=3, title=what, title_fontsize=9)
    if scaling:
        _scaling_panel(right[0], scaling, {group["kind"]: look["color"] for group, look in zip(groups, looks, strict=True)})
    elif differences:
        _difference_panel(right[0], groups, looks)
    for axes in (left, *right):
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(path, dpi=150)


def _looks(groups: list[dict[str, Any]], by_kind: bool) -> list[dict[str, Any]]:
    """A colour and a line for each group; in a scaling picture the colour is the architecture and the line the size."""
    if by_kind:
        kinds = list(dict.fromkeys(group["kind"] for group in groups))
        first = [kinds.index(group["kind"]) for group in groups]
        second = [sum(g["kind"] == group["kind"] for g in groups[:i]) for i, group in enumerate(groups)]
    else:
        first, second = list(range(len(groups))), [i // len(COLOURS) for i in range(len(groups))]
    return [{"color": COLOURS[a % len(COLOURS)], "linestyle": _LINES[b % len(_LINES)]} for a, b in zip(first, second, strict=True)]


def _band(axes: Axes, curve: dict[str, list[float]], look: dict[str, Any], label: str) -> None:
    marker = "o" if len(curve["tokens"]) <= 25 else ""
    axes.plot(curve["tokens"], curve["mean"], label=label, linewidth=1.8, marker=marker, markersize=3.5, **look)
    axes.fill_between(curve["tokens"], curve["low"], curve["high"], color=look["color"], alpha=0.18, linewidth=0)


def _loss_panel(axes: Axes, groups: list[dict[str, Any]], looks: list[dict[str, Any]]) -> None:
    for group, look in zip(groups, looks, strict=True):
        loss = group["val/loss"]
        spread = f" ± {loss['std']:.3f}" if loss["std"] is not None else ""
        _band(axes, group["curve"], look, f"{group['label']}: {loss['mean']:.3f}{spread}")
    # The first steps fall from ln(vocabulary) and would flatten all that follows, so the view starts at a tenth of the way.
    curves = [group["curve"] for group in groups]
    early = 0.1 * max(curve["tokens"][-1] for curve in curves)
    top = max(max((y for t, y in zip(c["tokens"], c["high"], strict=True) if t >= early), default=c["high"][-1]) for c in curves)
    bottom = min(min(c["low"]) for c in curves)
    margin = 0.05 * (top - bottom)
    if margin:
        axes.set_ylim(bottom - margin, top + margin)
    axes.set_title("Validation loss", **TITLE)
    axes.set(xlabel="training tokens", ylabel="nats per token")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: figure(tokens)))


def _difference_panel(axes: Axes, groups: list[dict[str, Any]], looks: list[dict[str, Any]]) -> None:
    shown = [(group, look) for group, look in zip(groups, looks, strict=True) if group["difference_curve"]]
    for group, look in shown:
        _band(axes, group["difference_curve"], look, "_")  # the loss panel's legend serves both
    axes.axhline(0, color="#444444", linewidth=1)
    late = [np.array([c["low"], c["high"]])[:, len(c["tokens"]) // 5 :] for c in (group["difference_curve"] for group, _ in shown)]
    bottom, top = min(0.0, *(part.min() for part in late)), max(0.0, *(part.max() for part in late))
    margin = 0.1 * (top - bottom) or 0.01
    axes.set_ylim(bottom - margin, top + margin)
    baselines = list(dict.fromkeys(group["baseline"] for group, _ in shown))
    axes.set_title(f"Difference to {baselines[0] if len(baselines) == 1 else 'the baseline'}, seed by seed", **TITLE)
    axes.set(xlabel="training tokens", ylabel="nats per token (below 0 is better)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: figure(tokens)))


def _scaling_panel(axes: Axes, scaling: dict[str, Any], colours: dict[str, str]) -> None:
    for law in scaling["laws"]:
        colour = colours[law["kind"]]
        grid = np.geomspace(min(law["parameters"]) / 1.15, max(law["parameters"]) * 1.15, 100)
        formula = f"{law['a']:.3g}·N$^{{{-law['b']:.3f}}}$" + (f" + {law['c']:.2f}" if law["c"] else "")
        axes.plot(grid, law["a"] * grid ** -law["b"] + law["c"], color=colour, linewidth=1.8, label=f"{law['kind']}: {formula}")
        axes.plot(law["parameters"], law["losses"], "o", color=colour, markersize=5.5)
    axes.set(xscale="log", yscale="log", xlabel="parameters N without embeddings", ylabel="final validation loss, nats per token")
    axes.set_title("Loss against size", **TITLE)
    sizes = scaling["laws"][0]["parameters"]
    axes.set_xticks(sizes, [figure(n) for n in sizes])
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=10)
