"""An evaluation's table, and the pictures that its suite declares, out of rows alone."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from diffx.results import plot
from diffx.results.aggregate import Row
from diffx.results.declare import Declaration, Picture
from diffx.results.table import AVERAGE, BY, by_columns
from diffx.results.verdict import decimal

COLUMNS = ("", "metric", "value", "standard\nerror", "95% interval", "n", "published")


def cells(row: Row) -> list[str]:
    """A row of ``aggregate``, with its ``published`` figures, as the texts of ``COLUMNS``."""
    value, stderr, low, high = (
        "-" if row[key] is None else decimal(row[key], 4)
        for key in ("value", "stderr", "low", "high")
    )
    interval = "-" if row["low"] is None else f"{low} to {high}"
    published = ", ".join(f"{name}: {value:g}" for name, value in row["published"].items())
    figures = [value, stderr, interval, str(row["n"] or "-")]
    return [row["label"], row["metric"], *figures, published or "-"]


def draw_results(
    rows: Sequence[Row], examples: Sequence[Row], declaration: Declaration, title: str, path: Path
) -> None:
    """Draw every picture of a declaration in one figure.

    ``rows`` are of ``aggregate`` or ``compare``, and ``examples`` are for ``dots``.
    """
    panels = [
        (picture, key, chosen)
        for picture in declaration.pictures
        for key, chosen in _panels(picture, examples if picture.kind == "dots" else rows)
    ]
    columns = min(3, max(1, len(panels)))
    heights = [
        2.2 + 0.42 * len({row["label"] for row in chosen}) if picture.kind == "intervals" else 4.4
        for picture, _, chosen in panels
    ]
    lines = math.ceil(len(panels) / columns)
    figure, axes = plot.canvas(lines, columns, height=max(heights, default=4.2))
    for place, (picture, key, chosen) in zip(axes, panels, strict=False):
        flat = picture.kind == "intervals"
        plot.style(
            place,
            fill(picture.title.format(panel=", ".join(map(str, key))), 48),
            fill(picture.xlabel, 48) or (_unit(chosen) if flat else ""),
            picture.ylabel or ("" if flat else _unit(chosen)),
            grid={"bars": "y", "dots": "y", "intervals": "x"}.get(picture.kind, "both"),
        )
        _draw(place, picture, chosen, declaration)
        plot.legend(place, columns=1 if picture.kind == "curve" else 2)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    note = "\n".join(fill(note, 60 * columns) for note in declaration.notes)
    if note:
        figure.supxlabel(note, fontsize=8.5, color="#444444")
    title = fill(title, 52 * columns)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    plot.save(figure, path)


def _panels(picture: Picture, rows: Sequence[Row]) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    """The rows of each panel, by the panel's values; a picture without rows has no panel."""
    needed = {picture.x, picture.y, *picture.panels, picture.series} & BY.keys()
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        average = row["aggregate"] == AVERAGE and picture.kind != "intervals"
        chosen = picture.metrics is None or row["metric"] in picture.metrics
        if average or not chosen or pd.isna(row["value"]):
            continue
        present = by_columns(row).keys()
        if present == needed if picture.x in BY else needed <= present:
            panels.setdefault(tuple(row[name] for name in picture.panels), []).append(row)
    return panels.items()


def _unit(rows: Sequence[Row]) -> str:
    units = {row["unit"] for row in rows}
    return units.pop() if len(units) == 1 else ""


def _place(name: str, value: Any) -> str:
    return f"{value:.0%}" if name == "depth" else str(value)


def _draw(axes: Axes, picture: Picture, rows: Sequence[Row], declaration: Declaration) -> None:
    placed = [(_place(picture.x, row.get(picture.x)), row) for row in rows]
    series: dict[str, dict[str, Row]] = {}
    for place, row in placed:
        series.setdefault(str(row[picture.series]), {})[place] = row
    if picture.kind == "heat":
        _heat(axes, picture, rows)
    elif picture.kind == "dots":
        _dots(axes, rows)
    elif picture.kind == "curve":
        _curve(axes, picture, rows, series, declaration)
    else:
        places = list(dict.fromkeys(place for place, _ in placed))
        references = _references(placed)
        if picture.kind == "bars":
            plot.bars(axes, places, series, references)
        else:  # a comparison is of ratios or of differences
            zero = float(rows[0]["ratio"]) if "ratio" in rows[0] else None
            plot.intervals(axes, places, series, references, zero)
    if picture.limits and picture.kind in ("curve", "bars", "dots") and "y" not in picture.log:
        axes.set_ylim(*picture.limits)


def _references(placed: Sequence[tuple[str, Row]]) -> dict[str, dict[str, float]]:
    """Each published value at each place, named with its metric where the panel has several."""
    several = len({row["metric"] for _, row in placed}) > 1
    values: dict[str, dict[str, float]] = {}
    for place, row in placed:
        for label, value in row.get("published", {}).items():
            name = f"{label}, {row['metric']}" if several else label
            values.setdefault(name, {})[place] = value
    return values


def _curve(
    axes: Axes,
    picture: Picture,
    rows: Sequence[Row],
    series: dict[str, dict[str, Row]],
    declaration: Declaration,
) -> None:
    place = {name: rows[0][name] for name in picture.panels if name in BY}, False, False
    shown = [r for r in declaration.references if (r.by, r.gain, r.average) == place]
    labels = list(dict.fromkeys(reference.label for reference in shown))
    for number, (name, of_series) in enumerate(series.items()):
        line = sorted(of_series.values(), key=lambda row: row[picture.x])
        x, value, low, high = (
            [row[key] for row in line] for key in (picture.x, "value", "low", "high")
        )
        plot.curve(axes, x, value, low, high, name, plot.look(number))
        for reference in shown:
            if reference.metric == line[0]["metric"]:
                dashes = plot.look(number, 1 + labels.index(reference.label))
                label = f"{reference.label}, {reference.metric}"
                axes.axhline(reference.value, lw=1.1, label=label, **dashes)
    if "y" in picture.log:
        axes.set_yscale("log")
    plot.number_axis(axes, [row[picture.x] for row in rows], "x" in picture.log)


def _dots(axes: Axes, rows: Sequence[Row]) -> None:
    """Every example's figure, and their mean as a line."""
    values: dict[str, list[float]] = {}
    for row in rows:
        place = " ".join(map(str, by_columns(row).values()))
        values.setdefault(fill(place, 24), []).append(row["value"])
    for x, of_place in enumerate(values.values()):
        spread = np.linspace(-0.2, 0.2, len(of_place)) if len(of_place) > 1 else np.zeros(1)
        axes.plot(x + spread, of_place, "o", color=plot.COLOURS[0], alpha=0.55, markersize=5)
        axes.plot([x], [np.mean(of_place)], "_", color="#000000", markersize=30, mew=2)
    axes.set_xticks(range(len(values)), list(values))
    axes.set_xlim(-0.6, len(values) - 0.4)


def _heat(axes: Axes, picture: Picture, rows: Sequence[Row]) -> None:
    names = (picture.y or "", picture.x)
    down, across = (sorted({row[name] for row in rows}) for name in names)
    grid = np.full((len(down), len(across)), np.nan)
    for row in rows:
        grid[down.index(row[names[0]]), across.index(row[names[1]])] = row["value"]
    lines = [_place(names[0], value) for value in down]
    columns = [_place(names[1], value) for value in across]
    plot.heat(axes, grid, columns, lines, _unit(rows), picture.limits)
