"""``diffx compare A B suite=S``: differences between checkpoints over the same examples."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from diffx.config import UserError
from diffx.console import Reporter, make_table
from diffx.report.write import write_report
from diffx.results import plot
from diffx.results.aggregate import aggregate, references_of
from diffx.results.compare import compare, examples_apart
from diffx.results.draw import COLUMNS, cells, draw_results
from diffx.results.evaluations import Evaluation, find_evaluations, share
from diffx.results.published import source
from diffx.results.runs import read_run
from diffx.results.verdict import headline, on_difference, on_speed


def compare_evaluations(words: Sequence[str], out: Path | None = None) -> None:
    """Print the differences between evaluations of one suite with the same settings.

    Args:
        words: two checkpoints or more, the baseline first, and ``suite=S``; one checkpoint's
            evaluation is shown again. A checkpoint is what ``diffx eval`` takes, or a folder
            ``runs/hub/<name>@<revision>``.
        out: the picture; beside it a JSON file of its name holds every figure. None draws nothing.

    Raises:
        UserError: a checkpoint has no finished evaluation of the suite, they share no settings, or
            a word cannot be used.
        RunError: the picture cannot be written.
    """
    suites = [word.removeprefix("suite=") for word in words if word.startswith("suite=")]
    specs = list(dict.fromkeys(word for word in words if not word.startswith("suite=")))
    if len(suites) > 1:
        raise UserError(
            f"suite={suites[1]} cannot be used beside suite={suites[0]}: give one suite at a time"
        )
    suite = suites[0]
    if out is not None:
        plot.check_picture("out", out)
    if not specs:
        raise UserError(
            f"suite={suite} cannot be compared with no checkpoint: give two or more, the baseline "
            "first, or one to see its evaluation again"
        )
    reporter = Reporter()
    if len(specs) == 1:
        return _show_one(find_evaluations(specs[0], suite)[0], out, reporter)
    report = analyse_evaluations(
        share([find_evaluations(spec, suite) for spec in specs], reporter.line)
    )
    for line in report["warnings"]:
        reporter.warn(line)
    for rival in report["comparisons"]:
        models = f"{_place(rival)} against {_place(report['baseline'])}"
        title = f"{suite}: {models}, settings {report['settings_hash']}"
        reporter.table(make_table(title, *_table(report, rival)))
        for line in rival["sentences"]:
            reporter.line(line)
    if report["published"]:
        reporter.line(f"published: {report['published']}")
    write_report(report, out, draw, reporter)


def _show_one(evaluation: Evaluation, out: Path | None, reporter: Reporter) -> None:
    """Print an evaluation's table, and draw its picture, again: from its rows alone."""
    frame, declaration = evaluation.rows(), evaluation.declaration
    rows = aggregate(frame, declaration)
    title = f"{evaluation.results['suite']}: {evaluation.label}"
    reporter.table(make_table(title, COLUMNS, map(cells, rows)))
    examples = frame.to_dict("records")
    report = _identity(evaluation) | {"rows": rows}
    write_report(
        report,
        out,
        lambda _, path: draw_results(rows, examples, declaration, title, path),
        reporter,
    )


def analyse_evaluations(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Work out every figure and sentence, JSON-able; the first evaluation is the baseline."""
    base, *rivals = evaluations
    suite, declaration, base_rows = base.results["suite"], base.declaration, base.rows()
    warnings: list[str] = []
    comparisons = []
    for rival in rivals:
        rival_rows = rival.rows()
        rows = compare(base_rows, rival_rows, declaration)
        if not rows:
            raise UserError(
                f"RUN={rival.label} cannot be compared with {base.label}: they have no example and "
                f"no figure of {suite} in common"
            )
        for row in rows:
            row["published_gain"] = references_of(row, declaration, gains=True)
        warnings += _warnings(base, rival, examples_apart(base_rows, rival_rows))
        if any(row["ratio"] for row in rows):
            sizes = tuple(float(rows["parameters"].iloc[0]) for rows in (base_rows, rival_rows))
            runs = [e.run for e in (base, rival) if (e.run / "config.yaml").is_file()]
            curves = [read_run(run).curve("val/loss") for run in runs]
            pair = (curves[0], curves[1]) if len(curves) == 2 else None
            sentences = on_speed(base.label, rival.label, rows, (sizes[0], sizes[1]), pair)
        else:
            several = len({row["label"] for row in rows if row["n"]}) > 1
            sentences = [
                on_difference(suite, base.label, rival.label, row, several)
                for row in headline(rows)
            ]
        comparisons.append({**_identity(rival), "rows": rows, "sentences": sentences})
    every = [row for rival in comparisons for row in rival["rows"]]
    shown = any(row["published_gain"] or row["ratio"] for row in every)
    return {
        "suite": suite,
        "settings_hash": base.results["settings_hash"],
        "settings": base.results["settings"],
        "published": source(suite) if shown else "",
        "baseline": _identity(base),
        "comparisons": comparisons,
        "warnings": warnings,
    }


def _place(checkpoint: dict[str, Any]) -> str:
    step = f" (step {checkpoint['step']})" if checkpoint["step"] else ""
    return f"{checkpoint['checkpoint']}{step}"


def _identity(evaluation: Evaluation) -> dict[str, Any]:
    step = evaluation.results["checkpoint"].get("step")
    return {"checkpoint": evaluation.label, "step": step, "folder": str(evaluation.folder)}


def _warnings(base: Evaluation, rival: Evaluation, apart: int) -> list[str]:
    """What makes the two less comparable than the table looks."""
    lines = []
    if apart:
        both = f"both of {base.label} and {rival.label}"
        lines.append(f"{apart} scores that not {both} have are left out")
    timed = any(metric.ratio for metric in base.declaration.metrics)
    keys = ("judge", "device") if timed else ("judge",)
    changed = [key for key in keys if base.results.get(key) != rival.results.get(key)]
    models = f"{base.label} and {rival.label}"
    return lines + [f"not comparable: {models} had different {key}s" for key in changed]


def _table(report: dict[str, Any], rival: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one comparison."""
    papers = list(dict.fromkeys(label for row in rival["rows"] for label in row["published_gain"]))
    ratio = any(row["ratio"] for row in rival["rows"])
    difference = f"{'ratio' if ratio else 'difference'}\n[95% interval]"
    models = [report["baseline"]["checkpoint"], rival["checkpoint"]]
    columns = ["", "metric", *models, difference, "n"]
    rows = []
    for row in rival["rows"]:
        sign, ends = "" if row["ratio"] else "+", ""
        if row["low"] is not None:
            ends = f" [{_text(row['low'], sign)}, {_text(row['high'], sign)}]"
        gains = row["published_gain"]
        cells = [row["label"], row["metric"], _text(row["baseline"]), _text(row["value"])]
        cells += [_text(row["difference"], sign) + ends, str(row["n"] or "-")]
        rows.append(cells + [_text(gains[k], "+") if k in gains else "-" for k in papers])
    return [*columns, *(label.replace(" (paper)", "\n(paper)") for label in papers)], rows


def _text(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw every difference with its interval, a panel for each metric."""
    rivals = report["comparisons"]
    metrics = list(dict.fromkeys(row["metric"] for rival in rivals for row in rival["rows"]))
    columns = min(3, len(metrics))
    places = {
        metric: list(
            dict.fromkeys(r["label"] for v in rivals for r in v["rows"] if r["metric"] == metric)
        )
        for metric in metrics
    }
    tallest = max(map(len, places.values()))
    height = 2.2 + tallest * (0.3 + 0.14 * (len(rivals) - 1))
    figure, panels = plot.canvas(math.ceil(len(metrics) / columns), columns, height=height)
    base = report["baseline"]["checkpoint"]
    for axes, metric in zip(panels, metrics, strict=False):
        rows = {v["checkpoint"]: [r for r in v["rows"] if r["metric"] == metric] for v in rivals}
        ratio = any(row["ratio"] for of_rival in rows.values() for row in of_rival)
        series = {
            name: {row["label"]: row | {"value": row["difference"]} for row in of_rival}
            for name, of_rival in rows.items()
        }
        plot.intervals(axes, places[metric], series, zero=1.0 if ratio else 0.0)
        what = "ratio to" if ratio else "difference to"
        plot.style(axes, fill(metric, 40), fill(f"{what} {base}", 48), grid="x")
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    note = "lines: 95% intervals over examples; hollow: no interval; diamonds: averages"
    plot.shared_legend(figure, panels[0], fill(note, 40 * columns), min(len(rivals), 3))
    names = " and ".join(rival["checkpoint"] for rival in rivals)
    title = fill(f"{report['suite']}: {names} against {base}", 52 * columns)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    plot.save(figure, path)
