"""Shared by the benches: ratios with targets, tables, and the files of figures."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffx.config import require
from diffx.console import Reporter, figure, make_table
from diffx.files import write_json
from diffx.results.table import EXAMPLE, make_frame, write_frame

Target = tuple[float | None, float | None]  # the lowest and the highest accepted median
NO_TARGET: Target = (None, None)
Row = tuple[str, str, str, str, Target]  # work, figure, contestant, compared with, target


def check_file(key: str, path: Path | None) -> None:
    """Raise ``UserError`` before measuring if ``path`` cannot be a JSON file."""
    usable = path is None or (path.suffix == ".json" and path.parent.is_dir() and not path.is_dir())
    require(usable, key, path, "the name of a .json file in a folder that exists")


def target_ratio(
    report: Mapping[str, Any], work: str, figure: str, of: str, to: str, target: Target
) -> dict[str, Any]:
    """The ratio of one contestant to another in every round, and whether it meets its target.

    ``figure`` is ``time`` or ``speed``, by the ``seconds`` of the report; any other is of its
    ``bytes``, which are None where they cannot be measured.
    """
    if figure in ("time", "speed"):
        over, under = (to, of) if figure == "speed" else (of, to)
        seconds = report["seconds"][work]
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    else:
        size = report["bytes"][work]
        ratios = [size[of] / size[to]] if size[of] else []
    ratio: dict[str, Any] = {"work": work, "figure": figure, "of": of, "to": to, "target": target}
    if not ratios:
        return ratio | dict.fromkeys(("median", "low", "high", "met"))
    median = statistics.median(ratios)
    met = (target[0] or 0) <= median <= (target[1] or math.inf) if target != NO_TARGET else None
    return ratio | {"median": median, "low": min(ratios), "high": max(ratios), "met": met}


def show_figures(title: str, columns: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print a table with a row for each work and contestant of the first column."""
    rows = [
        [work, name, *(_number(figures[work].get(name)) for figures in columns.values())]
        for work, contestants in next(iter(columns.values())).items()
        for name in contestants
    ]
    Reporter().table(make_table(title, ("work", "contestant", *columns), rows))


def show_ratios(
    report: dict[str, Any], rows: Iterable[Row], title: str, out: Path | None
) -> dict[str, Any]:
    """Add the ratios to the report, print a table of them and the missed targets, and write it.

    The Parquet file beside ``out`` holds the seconds and bytes as rows of the table of results: the
    work is the task, the contestant the variant, and a round an example.
    """
    ratios = report["ratios"] = [target_ratio(report, *row) for row in rows]
    reporter = Reporter()
    columns = ("work", "figure", "", "median ratio", "lowest to highest round", "target", "met")
    reporter.table(make_table(title, columns, map(_cells, ratios)))
    if any(row["met"] is not None for row in ratios):
        missed = [row for row in ratios if row["met"] is False]
        names = "; ".join(f"{row['work']}, {row['figure']} of {row['of']}" for row in missed)
        reporter.line(f"targets not met: {names}" if missed else "all targets are met")
    if out is not None:
        write_json(out, report)
        write_frame(make_frame(_result_rows(report)), out.with_suffix(".parquet"))
        reporter.line(f"figures: {out}, and as rows {out.with_suffix('.parquet').name}")
    return report


def _result_rows(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    facts = {"checkpoint": report.get("checkpoint"), "source": "bench", "better": "lower"}
    for metric, unit in (("seconds", "s"), ("bytes", "bytes")):
        for work, contestants in report.get(metric, {}).items():
            for name, figures in contestants.items():
                place = facts | {"task": work, "variant": name, "metric": metric, "unit": unit}
                for number, value in enumerate(figures if metric == "seconds" else [figures]):
                    yield place | {"aggregate": EXAMPLE, "example": str(number), "value": value}


def _cells(ratio: dict[str, Any]) -> list[str]:
    low, high = ratio["target"]
    target = f"at least {low:.2f}" if low else f"at most {high:.2f}" if high else "-"
    if low and high:
        target = f"{low:.2f} to {high:.2f}"
    once = ratio["low"] == ratio["high"]
    return [
        ratio["work"],
        ratio["figure"],
        f"{ratio['of']} / {ratio['to']}",
        "-" if ratio["median"] is None else f"{ratio['median']:.3f}",
        "-" if once else f"{ratio['low']:.3f} to {ratio['high']:.3f}",
        target,
        {None: "-", True: "yes", False: "no"}[ratio["met"]],
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else figure(value)
