"""``diffx compare A B suite=S``: differences between checkpoints over the same examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffx.config.checks import refuse
from diffx.console import Reporter, make_table
from diffx.report.write import write_report
from diffx.results.aggregate import Row, aggregate, references_of
from diffx.results.compare import compare, examples_apart
from diffx.results.declare import Declaration, Picture
from diffx.results.draw import COLUMNS, cells, draw_results
from diffx.results.evaluations import Evaluation, find_evaluations, share
from diffx.results.plot import check_picture
from diffx.results.published import source
from diffx.results.runs import read_run
from diffx.results.verdict import decimal, ends, headline, on_difference, on_speed, signed


def compare_evaluations(words: Sequence[str], out: Path | None = None) -> None:
    """Print the differences between evaluations of one suite with the same settings.

    Args:
        words: ``suite=S`` and two checkpoints or more, the baseline first: as ``diffx eval`` takes
            them, or folders ``runs/hub/<name>@<revision>``. The evaluation of one is shown again.
        out: the picture, with every figure in a JSON file beside it; None draws nothing.

    Raises:
        UserError: a checkpoint has no finished evaluation of the suite, they share no settings, or
            a word cannot be used.
        RunError: the picture cannot be written.
    """
    suite, *others = [word.removeprefix("suite=") for word in words if word.startswith("suite=")]
    specs = list(dict.fromkeys(word for word in words if not word.startswith("suite=")))
    for other in others:
        refuse(True, f"suite={other}", "give one suite at a time", f"suite={suite}")
    check_picture("out", out)
    accepted = "give two or more checkpoints, the baseline first, or one to see it again"
    refuse(not specs, f"suite={suite}", accepted)
    reporter = Reporter()
    evaluations = [find_evaluations(spec, suite) for spec in specs]
    if len(specs) == 1:
        return _show_one(evaluations[0][0], out, reporter)
    report = analyse_evaluations(share(evaluations, reporter.line))
    base, settings = report["baseline"], f"settings {report['settings_hash']}"
    for rival in report["comparisons"]:
        title = f"{suite}: {_place(rival)} against {_place(base)}, {settings}"
        reporter.table(make_table(title, *_table(base["checkpoint"], rival)))
    write_report(report, out, draw, reporter)


def _show_one(evaluation: Evaluation, out: Path | None, reporter: Reporter) -> None:
    """Print an evaluation's table, and draw its picture, again: from its rows alone."""
    frame, declaration = evaluation.rows(), evaluation.declaration
    rows = aggregate(frame, declaration)
    title = f"{evaluation.results['suite']}: {evaluation.label}"
    reporter.table(make_table(title, COLUMNS, map(cells, rows)))

    def draw_one(_: Row, path: Path) -> None:
        draw_results(rows, frame.to_dict("records"), declaration, title, path)

    write_report(_identity(evaluation) | {"rows": rows}, out, draw_one, reporter)


def analyse_evaluations(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Compute every figure and sentence, JSON-able; the first evaluation is the baseline."""
    base, *rivals = evaluations
    suite, declaration, base_rows = base.results["suite"], base.declaration, base.rows()
    timed = any(metric.ratio for metric in declaration.metrics)
    warnings: list[str] = []
    comparisons, beside = [], False  # whether published figures stand beside a row
    for rival in rivals:
        rival_rows = rival.rows()
        rows = compare(base_rows, rival_rows, declaration)
        reason = f"they have no example and no figure of {suite} in common"
        refuse(not rows, f"RUN={rival.label}", reason, base.label)
        for row in rows:
            row["published_gain"] = references_of(row, declaration, gains=True)
            beside |= bool(row["published_gain"] or row["ratio"])
        both = f"{base.label} and {rival.label}"
        if apart := examples_apart(base_rows, rival_rows):
            warnings.append(f"{apart} scores that not both of {both} have are left out")
        warnings += [
            f"not comparable: {both} had different {key}s"
            for key in (("judge", "device") if timed else ("judge",))
            if base.results.get(key) != rival.results.get(key)
        ]
        if any(row["ratio"] for row in rows):
            sizes = [float(frame["parameters"].iloc[0]) for frame in (base_rows, rival_rows)]
            runs = (e.run for e in (base, rival) if (e.run / "config.yaml").is_file())
            curves = [read_run(run).curve("val/loss") for run in runs]
            sentences = on_speed(base.label, rival.label, rows, sizes, curves)
        else:
            several = len({row["label"] for row in rows if row["n"]}) > 1
            sentences = [
                on_difference(suite, base.label, rival.label, row, several)
                for row in headline(rows)
            ]
        comparisons.append(_identity(rival) | {"rows": rows, "sentences": sentences})
    return {
        "suite": suite,
        "settings_hash": base.results["settings_hash"],
        "settings": base.results["settings"],
        "published": source(suite) if beside else "",
        "baseline": _identity(base),
        "comparisons": comparisons,
        "warnings": warnings,
    }


def _place(checkpoint: Row) -> str:
    step = f" (step {checkpoint['step']})" if checkpoint["step"] else ""
    return f"{checkpoint['checkpoint']}{step}"


def _identity(evaluation: Evaluation) -> Row:
    step = evaluation.results["checkpoint"]["step"]
    return {"checkpoint": evaluation.label, "step": step, "folder": str(evaluation.folder)}


def _table(base: str, rival: Row) -> tuple[list[str], list[list[str]]]:
    papers = list(dict.fromkeys(label for row in rival["rows"] for label in row["published_gain"]))
    ratio = any(row["ratio"] for row in rival["rows"])
    difference = f"{'ratio' if ratio else 'difference'}\n[95% interval]"
    columns = ["", "metric", base, rival["checkpoint"], difference, "n"]
    rows = []
    for row in rival["rows"]:
        text = decimal if row["ratio"] else signed
        gains = row["published_gain"]
        figures = [decimal(row["baseline"]), decimal(row["value"])]
        figures += [text(row["difference"]) + ends(row, text), str(row["n"] or "-")]
        figures += [signed(gains[label]) if label in gains else "-" for label in papers]
        rows.append([row["label"], row["metric"], *figures])
    return [*columns, *(label.replace(" (paper)", "\n(paper)") for label in papers)], rows


def draw(report: Row, path: Path) -> None:
    """Draw every difference with its interval, a panel for each metric."""
    base, rivals = report["baseline"]["checkpoint"], report["comparisons"]
    rows = [
        row | {"value": row["difference"], "checkpoint": rival["checkpoint"]}
        for rival in rivals
        for row in rival["rows"]
    ]
    pictures = [
        Picture(
            kind="intervals",
            title="{panel}",
            metrics=[row["metric"] for row in rows if row["ratio"] == ratio],
            panels=["metric"],
            series="checkpoint",
            xlabel=f"{'ratio' if ratio else 'difference'} to {base}",
        )
        for ratio in (False, True)
    ]
    note = "lines: 95% intervals over examples; hollow: no interval; diamonds: averages"
    declaration = Declaration(metrics=[], tables=[], pictures=pictures, notes=[note])
    names = " and ".join(rival["checkpoint"] for rival in rivals)
    draw_results(rows, (), declaration, f"{report['suite']}: {names} against {base}", path)
