"""One style and four kinds of panel: curves with bands, bars, heat maps and intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from diffx.config.checks import new_path, refuse
from diffx.console import figure
from diffx.results.table import AVERAGE

FORMATS = (".png", ".pdf", ".svg")

# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, which is
# faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
REFERENCE = "#666666"
_LINES = ("-", "--", "-.", ":")
_MARKERS = "DsXP^v"
_LABEL = 24  # characters in a line of a label

Rows = Mapping[str, Mapping[str, Any]]  # by place: `value`, `low`, `high`


def check_picture(key: str, path: Path | None) -> None:
    """Raise ``UserError`` for a path that cannot be written, or has none of ``FORMATS``."""
    if path is not None:
        new_path(key, path)
        accepted = f"a picture's name must end in {', '.join(FORMATS)}"
        refuse(path.suffix not in FORMATS, f"{key}={path}", accepted)


def canvas(
    rows: int, columns: int, width: float = 5.2, height: float = 4.2
) -> tuple[Figure, list[Axes]]:
    """A figure of panels, each ``width`` by ``height`` inches, and the panels in reading order."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def style(axes: Axes, title: str, xlabel: str = "", ylabel: str = "", grid: str = "both") -> None:
    """Give a panel its title, its labels, a grid and two spines."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set(xlabel=xlabel, ylabel=ylabel, axisbelow=True)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)  # type: ignore[arg-type]  # "x", "y" or "both"
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Axes, columns: int = 1) -> None:
    """Put a panel's legend below it, if it has entries."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            [fill(label, 48) for label in labels],
            loc="upper left",
            bbox_to_anchor=(0, -0.16),
            ncols=columns,
            frameon=False,
            fontsize=8.5,
        )


def shared_legend(made: Figure, axes: Axes, title: str, columns: int) -> None:
    """Put one legend for all panels below them: that of ``axes``, with a note above it."""
    box = made.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=title,
        title_fontsize=9,
    )
    box.get_title().set_multialignment("center")


def look(number: int, line: int | None = None) -> dict[str, Any]:
    """Colour and line of the series of this number."""
    line = number // len(COLOURS) if line is None else line
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": _LINES[line % len(_LINES)]}


def curve(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    label: str,
    appearance: Mapping[str, Any],
) -> None:
    """A line with a band where the interval is known; a single point has an error bar."""
    marker = "o" if len(x) <= 25 else ""
    axes.plot(x, values, label=label, linewidth=1.8, marker=marker, markersize=3.5, **appearance)
    ends = np.array([low, high], dtype=float)  # None becomes NaN
    known, colour = np.isfinite(ends).all(0), appearance["color"]
    if known.any() and len(x) == 1:
        axes.plot([x[0], x[0]], ends[:, 0], color=colour, linewidth=1.6)
    elif known.any():
        axes.fill_between(np.asarray(x)[known], *ends[:, known], color=colour, alpha=0.18, lw=0)


def bars(
    axes: Axes,
    places: Sequence[str],
    series: Mapping[str, Rows],
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """Bars side by side at each place, with intervals and values.

    ``references`` have a value at some of the places, which is a hollow marker.
    """
    most = max((sum(place in rows for rows in series.values()) for place in places), default=1)
    width = 0.8 / max(1, most)
    named: set[str] = set()
    for at, place in enumerate(places):
        present = [(name, rows[place]) for name, rows in series.items() if place in rows]
        for index, (name, row) in enumerate(present):
            x = at + (index - (len(present) - 1) / 2) * width
            colour = COLOURS[list(series).index(name) % len(COLOURS)]
            top = row["value"]
            axes.bar(x, top, 0.92 * width, color=colour, label="_" if name in named else name)
            named.add(name)
            text = f"{top:.3g}"
            if row.get("low") is not None:
                axes.plot([x, x], [row["low"], row["high"]], color="#333333", linewidth=1.4)
                top = max(top, row["high"])
            axes.annotate(text, (x, top), (0, 2), textcoords="offset points", ha="center", size=7)
    _mark(axes, places, references)
    axes.set_xticks(range(len(places)), [fill(place, _LABEL) for place in places])
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.axhline(0, color="#444444", linewidth=0.8)


def _mark(
    axes: Axes,
    places: Sequence[str],
    references: Mapping[str, Mapping[str, float]],
    flat: bool = False,
) -> None:
    """Draw each reference as hollow markers; ``flat``: values lie along the horizontal axis."""
    for number, (name, values) in enumerate(references.items()):
        points = [(at, values[place]) for at, place in enumerate(places) if place in values]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(
                *((y, x) if flat else (x, y)),
                label=name,
                marker=_MARKERS[number % len(_MARKERS)],
                facecolors="none",
                edgecolors=REFERENCE,
                s=34,
                zorder=3,
            )


def heat(
    axes: Axes,
    grid: np.ndarray,
    columns: Sequence[str],
    rows: Sequence[str],
    label: str,
    limits: Sequence[float | None] | None = None,
) -> None:
    """A heat map of grid (rows, columns), with a colour bar and, in a small grid, its figures."""
    low, high = limits or (None, None)
    low = min(0.0, float(np.nanmin(grid))) if low is None else low
    high = float(np.nanmax(grid)) if high is None else high
    image = axes.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
    for y, x in np.argwhere(np.isfinite(grid)) if grid.size <= 80 else ():
        colour = "w" if grid[y, x] < low + 0.6 * (high - low) else "k"
        text = f"{grid[y, x]:.2f}"
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
    for names, set_ticks in ((columns, axes.set_xticks), (rows, axes.set_yticks)):
        every = max(1, len(names) // 12)
        set_ticks(range(0, len(names), every), names[::every])
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label=label)


def intervals(
    axes: Axes,
    places: Sequence[str],
    series: Mapping[str, Rows],
    references: Mapping[str, Mapping[str, float]] | None = None,
    zero: float | None = None,
) -> None:
    """Points with intervals, a line for each place, the first on top; hollow without interval."""
    step = 0.7 / max(1, len(series))
    for number, (name, rows) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([], [], "o", color=colour, label=name)
        for place, row in rows.items():
            y = places.index(place) + (number - (len(series) - 1) / 2) * step
            known = row.get("low") is not None
            if known:
                axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.8)
            marker = "D" if row.get("aggregate") == AVERAGE else "o"
            face = colour if known else "white"
            axes.plot(row["value"], y, marker, color=colour, ms=5.5, markerfacecolor=face)
    _mark(axes, places, references or {}, flat=True)
    if zero is not None:
        axes.axvline(zero, color="#444444", linewidth=1)
    axes.set_yticks(range(len(places)), [fill(place, _LABEL) for place in places])
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def token_axis(axes: Axes) -> None:
    """Write the counts along the horizontal axis short: 2.6M."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: figure(tokens)))


def number_axis(axes: Axes, numbers: Sequence[float], logarithmic: bool) -> None:
    """Ticks at the numbers that were measured, on a scale by powers of two where that helps."""
    shown = sorted(set(numbers))
    if logarithmic and len(shown) > 1:
        scale: dict[str, Any] = {"linthresh": 1, "linscale": 0.7} if shown[0] == 0 else {}
        axes.set_xscale("symlog" if scale else "log", base=2, **scale)
    shown = shown[:: math.ceil(len(shown) / 8)]
    texts = [f"{n / 1024:.0f}K" if n and n % 1024 == 0 else f"{n:.10g}" for n in shown]
    axes.set_xticks(shown, texts)
    axes.xaxis.set_minor_locator(NullLocator())


def save(made: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix."""
    made.savefig(path, dpi=150)
