"""The picture of compared evaluations: every difference with its interval, one panel a score."""

import math
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from diffx.report.picture import COLOURS, TITLE

_COLUMNS = 3
_LABEL = 24  # characters of a group's name in a line
_NOTE = 13  # characters of the legend's title in an inch


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw what ``analyse_evaluations`` returned, in the format of the path's suffix."""
    scores = list(dict.fromkeys(row["score"] for rival in report["comparisons"] for row in rival["rows"]))
    groups = {score: _groups(report, score) for score in scores}
    columns = min(_COLUMNS, len(scores))
    lines = math.ceil(len(scores) / columns)
    tallest = [max(len(groups[score]) for score in scores[line * columns : (line + 1) * columns]) for line in range(lines)]
    rivals = len(report["comparisons"])
    heights = [1.3 + n * (0.3 + 0.14 * (rivals - 1)) for n in tallest]
    width = 1 + 4.6 * columns
    examples = "rounds" if report["what"] == "ratio" else "examples"
    what = f"against {report['baseline']['checkpoint']}; lines: 95% bootstrap intervals over {examples}; hollow: none; diamonds: averages"
    note = fill(what, int(_NOTE * width))
    canvas = Figure(figsize=(width, 0.9 + 0.15 * note.count("\n") + sum(heights)), layout="constrained")
    panels = list(canvas.subplots(lines, columns, squeeze=False, height_ratios=heights).flat)
    for axes, score in zip(panels, scores, strict=False):
        _panel(axes, report, score, groups[score])
    for axes in panels[len(scores) :]:
        axes.set_axis_off()
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    legend = canvas.legend(
        handles, labels, loc="outside lower center", ncols=min(rivals, 3), frameon=False, fontsize=9.5, title=note, title_fontsize=9
    )
    legend.get_title().set_multialignment("center")
    canvas.suptitle(report["suite"], x=0.01, ha="left", fontweight="bold")
    canvas.savefig(path, dpi=150)


def _groups(report: dict[str, Any], score: str) -> list[str]:
    return list(dict.fromkeys(row["group"] for rival in report["comparisons"] for row in rival["rows"] if row["score"] == score))


def _panel(axes: Axes, report: dict[str, Any], score: str, groups: list[str]) -> None:
    rivals, ratio = report["comparisons"], report["what"] == "ratio"
    step = 0.7 / len(rivals)
    for number, rival in enumerate(rivals):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot([], [], "o", color=colour, label=rival["checkpoint"])
        for row in rival["rows"]:
            if row["score"] != score:
                continue
            y = groups.index(row["group"]) + (number - (len(rivals) - 1) / 2) * step
            known = row["low"] is not None
            if known:
                axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.8, solid_capstyle="round")
            marker = "D" if row["groups"] > 1 else "o"
            axes.plot(row["difference"], y, marker, color=colour, markersize=5.5, markerfacecolor=colour if known else "white")
    axes.axvline(1 if ratio else 0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(groups)), [fill(group, _LABEL) for group in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    axes.set_title(score, **TITLE)
    axes.set_xlabel("ratio to the baseline" if ratio else "difference to the baseline")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
