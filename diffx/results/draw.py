"""An evaluation's table, and the pictures that its suite declares, out of rows alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from diffx.results import plot
from diffx.results.aggregate import Row, references_of
from diffx.results.declare import Declaration, Picture
from diffx.results.table import AVERAGE, BY

_MOST_COLUMNS = 3
COLUMNS = ("", "metric", "value", "standard\nerror", "95% interval", "n", "published")


def cells(row: Row) -> list[str]:
    """A row of ``aggregate``, with its ``published`` figures, as the texts of ``COLUMNS``."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"

    low, high = row["low"], row["high"]
    interval = "-" if low is None else f"{text(low)} to {text(high)}"
    published = ", ".join(f"{name}: {value:g}" for name, value in row["published"].items())
    figures = [text(row["value"]), text(row["stderr"]), interval, str(row["n"] or "-")]
    return [row["label"], row["metric"], *figures, published or "-"]


def draw_results(
    rows: Sequence[Row], examples: Sequence[Row], declaration: Declaration, title: str, path: Path
) -> None:
    """Draw every picture of a declaration in one figure.

    Args:
        rows: what ``aggregate`` gave.
        examples: rows of single examples, for ``dots``.
        declaration: the suite's.
        title: names the model.
        path: the picture; its suffix is the format.
    """
    panels = [
        (picture, key, chosen)
        for picture in declaration.pictures
        for key, chosen in _panels(picture, examples if picture.kind == "dots" else rows)
    ]
    columns = min(_MOST_COLUMNS, max(1, len(panels)))
    lines = math.ceil(len(panels) / columns)
    tallest = max((_height(picture, chosen) for picture, _, chosen in panels), default=4.2)
    figure, axes = plot.canvas(lines, columns, height=tallest)
    for place, (picture, key, chosen) in zip(axes, panels, strict=False):
        _PANELS[picture.kind](place, picture, chosen, declaration)
        plot.style(
            place,
            fill(picture.title.format(panel=", ".join(map(str, key))), 48),
            picture.xlabel or (_unit(chosen) if picture.kind == "intervals" else ""),
            picture.ylabel or (_unit(chosen) if picture.kind != "intervals" else ""),
            grid={"bars": "y", "dots": "y", "intervals": "x"}.get(picture.kind, "both"),
        )
        if picture.kind == "heat":
            place.grid(visible=False)
        plot.legend(place, columns=1 if picture.kind == "curve" else 2)
    for place in axes[len(panels) :]:
        place.set_axis_off()
    note = "\n".join(fill(note, 60 * columns) for note in declaration.notes)
    if note:
        figure.supxlabel(note, fontsize=8.5, color="#444444")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    plot.save(figure, path)


def _panels(picture: Picture, rows: Sequence[Row]) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    """The rows of each panel, by what the panel is of; a picture without rows has no panel."""
    needed = {picture.x, picture.y, *picture.panels, picture.series} & BY.keys()
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if picture.metrics is not None and row["metric"] not in picture.metrics:
            continue
        present = {name for name in BY if row.get(name) is not None}
        free = picture.x not in BY
        if (not free and present != needed) or not needed <= present:
            continue
        if row["aggregate"] == AVERAGE and picture.kind != "intervals":
            continue
        if row["value"] is not None:
            panels.setdefault(tuple(row[name] for name in picture.panels), []).append(row)
    return panels.items()


def _height(picture: Picture, rows: Sequence[Row]) -> float:
    places = len({row.get("label") for row in rows})
    return 2.2 + 0.42 * places if picture.kind == "intervals" else 4.4


def _unit(rows: Sequence[Row]) -> str:
    units = {row["unit"] for row in rows}
    return units.pop() if len(units) == 1 else ""


def _place(row: Row, name: str) -> str:
    value = row[name]
    return f"{value:.0%}" if name == "depth" else str(value)


def _by_series(picture: Picture, rows: Sequence[Row]) -> dict[str, list[Row]]:
    series: dict[str, list[Row]] = {}
    for row in rows:
        series.setdefault(str(row[picture.series]), []).append(row)
    return series


def _references(
    picture: Picture, rows: Sequence[Row], declaration: Declaration
) -> dict[str, dict[str, float]]:
    """Each reference's value at each place, named with its metric where the panel has several."""
    several = len({row["metric"] for row in rows}) > 1
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        for label, value in references_of(row, declaration).items():
            name = f"{label}, {row['metric']}" if several else label
            values.setdefault(name, {})[_place(row, picture.x)] = value
    return values


def _curve(axes: Axes, picture: Picture, rows: Sequence[Row], declaration: Declaration) -> None:
    columns = {name: rows[0][name] for name in picture.panels if name in BY}
    shown = [
        reference
        for reference in declaration.references
        if reference.by == columns and not reference.gain and not reference.average
    ]
    labels = list(dict.fromkeys(reference.label for reference in shown))
    for number, (name, line) in enumerate(_by_series(picture, rows).items()):
        line = sorted(line, key=lambda row: row[picture.x])
        x = [row[picture.x] for row in line]
        value, low, high = ([row[key] for row in line] for key in ("value", "low", "high"))
        plot.curve(axes, x, value, low, high, name, plot.look(number))
        for reference in shown:
            if reference.metric == line[0]["metric"]:
                dashes = plot.look(number, 1 + labels.index(reference.label))
                label = f"{reference.label}, {reference.metric}"
                axes.axhline(reference.value, lw=1.1, label=label, **dashes)
    if "y" in picture.log:
        axes.set_yscale("log")
    elif picture.limits:
        axes.set_ylim(*picture.limits)
    plot.number_axis(axes, [row[picture.x] for row in rows], "x" in picture.log)


def _bars(axes: Axes, picture: Picture, rows: Sequence[Row], declaration: Declaration) -> None:
    places = list(dict.fromkeys(_place(row, picture.x) for row in rows))
    series: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, of_series in _by_series(picture, rows).items():
        series[name] = {_place(row, picture.x): row for row in of_series}
    plot.bars(axes, places, series, _references(picture, rows, declaration))
    if picture.limits:
        axes.set_ylim(*picture.limits)


def _dots(axes: Axes, picture: Picture, rows: Sequence[Row], declaration: Declaration) -> None:
    """Every example's figure, and their mean as a line."""
    columns = list(
        dict.fromkeys(tuple(row[n] for n in BY if row.get(n) is not None) for row in rows)
    )
    for place, key in enumerate(columns):
        values = [
            row["value"]
            for row in rows
            if tuple(row[n] for n in BY if row.get(n) is not None) == key
        ]
        spread = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(place + spread, values, "o", color=plot.COLOURS[0], alpha=0.55, markersize=5)
        axes.plot([place], [np.mean(values)], "_", color="#000000", markersize=30, mew=2)
    axes.set_xticks(range(len(columns)), [fill(" ".join(map(str, key)), 24) for key in columns])
    axes.set_xlim(-0.6, len(columns) - 0.4)
    if picture.limits:
        axes.set_ylim(*picture.limits)


def _heat(axes: Axes, picture: Picture, rows: Sequence[Row], declaration: Declaration) -> None:
    assert picture.y is not None
    across = sorted({row[picture.x] for row in rows})
    down = sorted({row[picture.y] for row in rows})
    grid = np.full((len(down), len(across)), np.nan)
    for row in rows:
        grid[down.index(row[picture.y]), across.index(row[picture.x])] = row["value"]
    columns = [_place({picture.x: value}, picture.x) for value in across]
    lines = [_place({picture.y: value}, picture.y) for value in down]
    plot.heat(axes, grid, columns, lines, _unit(rows), picture.limits)


def _intervals(axes: Axes, picture: Picture, rows: Sequence[Row], declaration: Declaration) -> None:
    places = list(dict.fromkeys(row["label"] for row in rows))
    series = {
        name: {row["label"]: row for row in of_series}
        for name, of_series in _by_series(picture, rows).items()
    }
    plot.intervals(axes, places, series, _references(picture, rows, declaration))


_PANELS = {"curve": _curve, "bars": _bars, "dots": _dots, "heat": _heat, "intervals": _intervals}
