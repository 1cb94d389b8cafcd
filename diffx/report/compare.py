"""``diffx compare``: one table, one picture and one JSON file out of several runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffx.config import RunError, UserError
from diffx.console import Reporter, figure, make_table
from diffx.report.findings import analyse
from diffx.report.picture import FORMATS, draw
from diffx.report.runs import group_runs, read_runs, sweep_jobs

_COLUMNS = (
    "runs",
    "seeds",
    "parameters\n(embedding + rest)",
    "tokens",
    "final val loss",
    "bpb",
    "difference\n[95% interval]",
    "tokens at\nequal loss",
    "tokens/s",
)


def compare_runs(paths: list[Path], out: Path | None = None) -> None:
    """Print a table over runs, and draw their loss curves.

    Runs that differ only in their seed form a group. Beside the picture a JSON file of its name holds every figure.

    Args:
        paths: run folders of ``diffx train``; a sweep folder stands for the job folders in it.
        out: the picture; None is ``compare.png`` in the sweep folder if one alone was given, else in the current folder.

    Raises:
        UserError: a folder is no run, a file in it is damaged, none of the runs has a validation, or ``out`` is no picture's name.
        RunError: the picture cannot be written.
    """
    if out is None:
        out = (paths[0] if len(paths) == 1 and sweep_jobs(paths[0]) else Path()) / "compare.png"
    if out.suffix not in FORMATS:
        raise UserError(f"out={out} cannot be used: it is the picture, so its name must end in {', '.join(FORMATS)}")
    reporter = Reporter()
    runs = read_runs(paths)
    measured = [run for run in runs if run.curve("val/loss")[0].size]
    for run in runs:
        if run not in measured:
            reporter.warn(f"{run.path} is left out: it has no validation yet")
    if not measured:
        raise UserError(f"RUN={paths[0]} cannot be compared: no run given has a validation loss yet")
    report = analyse(group_runs(measured))

    reporter.table(make_table(f"runs: {len(measured)}, groups: {len(report['groups'])}", _COLUMNS, map(_row, report["groups"])))
    for line in report["warnings"]:
        reporter.warn(line)
    for line in report["sentences"]:
        reporter.line(line)
    write_report(report, out, draw, reporter)


def write_report(report: dict[str, Any], out: Path, draw: Callable[[dict[str, Any], Path], None], reporter: Reporter) -> None:
    """Write the picture of a report, and its figures in a JSON file beside it.

    Raises:
        RunError: they cannot be written.
    """
    figures = out.with_suffix(".json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, write in ((out, draw), (figures, _write_json)):
            temporary = path.with_name(f".{os.getpid()}-{path.name}")
            write(report, temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error
    reporter.line(f"picture: {out}   figures: {figures}")


def _write_json(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _row(group: dict[str, Any]) -> list[str]:
    count, gap, equal = group["parameters"], group["difference"], group["tokens_at_equal_loss"]
    loss = group["val/loss"]
    if gap is None:
        difference = "baseline" if group["baseline"] == group["label"] else "-"
    else:
        difference = f"{gap['mean']:+.4f}" + (f" [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap["low"] is not None else "")
    return [
        group["label"],
        " ".join(map(str, group["seeds"])),
        f"{figure(count['embedding'])} + {figure(count['rest'])}" if count else "-",
        figure(group["tokens"]),
        f"{loss['mean']:.4f}" + (f" ± {loss['std']:.4f} (n={len(loss['by_seed'])})" if loss["std"] is not None else ""),
        f"{group['val/bpb']['mean']:.4f}" if group["val/bpb"] else "-",
        difference,
        f"{equal['ratio']:.1%}" if equal else "-",
        figure(group["tokens_per_second"]) if group["tokens_per_second"] else "-",
    ]
