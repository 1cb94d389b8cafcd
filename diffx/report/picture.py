"""The picture of a comparison of runs: loss curves, and the scaling fit or the difference."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from diffx.console import figure
from diffx.results import plot

Group = Mapping[str, Any]
Look = Mapping[str, Any]


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the comparison that ``analyse`` returned, in the format of the path's suffix."""
    groups, scaling = report["groups"], report["scaling"]
    looks = _looks(groups, by_kind=scaling is not None)
    differences = any(group["difference_curve"] for group in groups)
    panels = 2 if scaling or differences else 1
    columns = min(panels, len(groups))
    height = 5 + 0.2 * len(groups) / columns
    canvas, axes = plot.canvas(1, panels, width=6.4, height=height)
    _loss_panel(axes[0], groups, looks)
    note = (
        "final validation loss: mean ± standard deviation over seeds; bands: lowest to highest seed"
    )
    plot.shared_legend(canvas, axes[0], note, columns)
    if scaling:
        pairs = zip(groups, looks, strict=True)
        _scaling_panel(axes[1], scaling, {group["kind"]: look["color"] for group, look in pairs})
    elif differences:
        _difference_panel(axes[1], groups, looks)
    plot.save(canvas, path)


def _looks(groups: Sequence[Group], by_kind: bool) -> list[Look]:
    """A colour and a line for each group; in a scaling picture by architecture and by size."""
    if not by_kind:
        return [plot.look(number) for number in range(len(groups))]
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    sizes = [sum(g["kind"] == group["kind"] for g in groups[:i]) for i, group in enumerate(groups)]
    return [plot.look(kinds.index(g["kind"]), n) for g, n in zip(groups, sizes, strict=True)]


def _band(axes: Axes, curve: Mapping[str, Any], label: str, look: Look) -> None:
    plot.curve(axes, curve["tokens"], curve["mean"], curve["low"], curve["high"], label, look)
    plot.token_axis(axes)


def _loss_panel(axes: Axes, groups: Sequence[Group], looks: Sequence[Look]) -> None:
    for group, look in zip(groups, looks, strict=True):
        loss = group["val/loss"]
        spread = f" ± {loss['std']:.3f}" if loss["std"] is not None else ""
        _band(axes, group["curve"], f"{group['label']}: {loss['mean']:.3f}{spread}", look)
    # The first steps fall from ln(vocabulary) and would flatten the rest of the curve, so the view
    # starts at a tenth of the way.
    curves = [group["curve"] for group in groups]
    early = 0.1 * max(curve["tokens"][-1] for curve in curves)
    late = [
        [y for t, y in zip(c["tokens"], c["high"], strict=True) if t >= early] or c["high"][-1:]
        for c in curves
    ]
    _limit(axes, min(min(curve["low"]) for curve in curves), max(map(max, late)), 0.05)
    plot.style(axes, "Validation loss", "training tokens", "nats per token")


def _limit(axes: Axes, bottom: float, top: float, share: float, least: float = 0.0) -> None:
    margin = share * (top - bottom) or least
    if margin:
        axes.set_ylim(bottom - margin, top + margin)


def _difference_panel(axes: Axes, groups: Sequence[Group], looks: Sequence[Look]) -> None:
    pairs = zip(groups, looks, strict=True)
    shown = [(group, look) for group, look in pairs if group["difference_curve"]]
    late = [0.0]
    for group, look in shown:
        curve = group["difference_curve"]
        _band(axes, curve, "_", look)  # the loss panel's legend serves both
        late += [y for end in ("low", "high") for y in curve[end][len(curve["tokens"]) // 5 :]]
    axes.axhline(0, color="#444444", linewidth=1)
    _limit(axes, min(late), max(late), 0.1, 0.01)
    baselines = list(dict.fromkeys(group["baseline"] for group, _ in shown))
    base = baselines[0] if len(baselines) == 1 else "the baseline"
    ylabel = "nats per token (below 0 is better)"
    plot.style(axes, f"Difference to {base}, seed by seed", "training tokens", ylabel)


def _scaling_panel(axes: Axes, scaling: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    for law in scaling["laws"]:
        colour, sizes = colours[law["kind"]], law["parameters"]
        grid = np.geomspace(min(sizes) / 1.15, max(sizes) * 1.15, 100)
        floor = f" + {law['c']:.2f}" if law["c"] else ""
        label = f"{law['kind']}: {law['a']:.3g}·N$^{{{-law['b']:.3f}}}${floor}"
        fitted = law["a"] * grid ** -law["b"] + law["c"]
        axes.plot(grid, fitted, color=colour, linewidth=1.8, label=label)
        axes.plot(sizes, law["losses"], "o", color=colour, markersize=5.5)
    axes.set(xscale="log", yscale="log")
    ylabel = "final validation loss, nats per token"
    plot.style(axes, "Loss against size", "parameters N without embeddings", ylabel)
    sizes = scaling["laws"][0]["parameters"]
    axes.set_xticks(sizes, [figure(n) for n in sizes])
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=10)
