"""``diffx compare``: one table, one picture and one JSON file out of several runs."""

from pathlib import Path
from typing import Any

from diffx.config import UserError
from diffx.console import Reporter, figure, make_table
from diffx.report.picture import draw
from diffx.report.write import write_report
from diffx.results.plot import check_picture
from diffx.results.runs import group_runs, read_runs, sweep_jobs
from diffx.results.training import analyse

_INTERVAL = "[95% interval]"


def compare_runs(paths: list[Path], out: Path | None = None) -> None:
    """Print a table over runs, and draw their loss curves.

    Runs that differ only in their seed form a group. Beside the picture a JSON file of its name
    holds every figure.

    Args:
        paths: run folders of ``diffx train`` or of ``diffx adapt-dex``; a sweep folder stands for
            the job folders in it.
        out: the picture; None is ``compare.png`` in the sweep folder if one alone was given, and
            no picture otherwise.

    Raises:
        UserError: a folder is no run, a file in it is damaged, none of the runs has a validation,
            or ``out`` is no picture's name.
        RunError: the picture cannot be written.
    """
    if out is None and len(paths) == 1 and sweep_jobs(paths[0]):
        out = paths[0] / "compare.png"
    if out is not None:
        check_picture("out", out)
    reporter = Reporter()
    runs = read_runs(paths)
    measured = [run for run in runs if run.curve("val/loss")[0].size]
    for run in runs:
        if run not in measured:
            reporter.warn(f"{run.path} is left out: it has no validation yet")
    if not measured:
        raise UserError(
            f"RUN={paths[0]} cannot be compared: no run given has a validation loss yet"
        )
    report = analyse(group_runs(measured))

    rows = [_row(group) for group in report["groups"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    title = f"runs: {len(measured)}, groups: {len(rows)}"
    reporter.table(
        make_table(title, columns, [[row.get(name, "-") for name in columns] for row in rows])
    )
    for line in report["warnings"]:
        reporter.warn(line)
    for line in report["sentences"]:
        reporter.line(line)
    write_report(report, out, draw, reporter)


def _row(group: dict[str, Any]) -> dict[str, str]:
    """Cells of a group by column.

    An adaptation has the parameters that it trains, and its difference to the base.
    """
    count, equal, loss = group["parameters"] or {}, group["tokens_at_equal_loss"], group["val/loss"]
    cells = {"runs": group["label"], "seeds": " ".join(map(str, group["seeds"]))}
    if group["adapted"]:
        cells["trained\nparameters"] = figure(count["trained"]) if count else "-"
    else:
        cells["parameters\n(embedding + rest)"] = (
            f"{figure(count['embedding'])} + {figure(count['rest'])}" if count else "-"
        )
    cells |= {
        "tokens": figure(group["tokens"]),
        "final val loss": f"{loss['mean']:.4f}"
        + (f" ± {loss['std']:.4f} (n={len(loss['by_seed'])})" if loss["std"] is not None else ""),
        "bpb": f"{group['val/bpb']['mean']:.4f}" if group["val/bpb"] else "-",
        f"difference\n{_INTERVAL}": "baseline"
        if group["baseline"] == group["label"]
        else _gap(group["difference"]),
    }
    if group["adapted"]:
        cells[f"to the base\n{_INTERVAL}"] = _gap(group["difference_to_base"])
    else:
        cells["tokens at\nequal loss"] = f"{equal['ratio']:.1%}" if equal else "-"
    return cells | {
        "tokens/s": figure(group["tokens_per_second"]) if group["tokens_per_second"] else "-"
    }


def _gap(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return "-"
    return f"{gap['mean']:+.4f}" + (
        f" [{gap['low']:+.4f}, {gap['high']:+.4f}]" if gap["low"] is not None else ""
    )
