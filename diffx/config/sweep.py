"""The end of a sweep: a table of its jobs, the best trial, the command that compares its runs."""

import os
import shlex
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from diffx.console import Reporter, make_table
from diffx.errors import one_line

BEST = "optimization_results.yaml"  # written by Hydra's optuna sweeper


def _apart(overrides: list[str], given: list[str]) -> str:
    return " ".join(word for word in overrides if word not in given)


def job_label(number: int, overrides: list[str], given: list[str]) -> str:
    """Name a job by its number and the overrides that set it apart from the sweep's other jobs."""
    apart = _apart(overrides, given)
    return f"{number} ({apart})" if apart else f"{number}"


def show_sweep(sweep: Path, entries: list[dict[str, Any]], given: list[str]) -> None:
    """Print what became of the jobs of the sweep in a folder.

    Each of the ``entries`` has ``job``, ``overrides``, and ``result`` or ``error``; ``given`` are
    the overrides of the command line.
    """
    rows, runs, losses = [], [], []
    for entry in entries:
        result, run = entry.get("result"), sweep / str(entry["job"])
        if "error" in entry:
            state = "failed: " + shorten(one_line(entry["error"]), 60)
        else:
            losses += [result] if isinstance(result, float) else []
            state = f"{result:.4f}" if isinstance(result, float) else "done"
            runs += [run] if run.is_dir() else []
        results = result.values() if isinstance(result, dict) else [result]
        paths = [folder for folder in results if isinstance(folder, str)]
        folder = run if run.is_dir() else os.path.commonpath(paths) if paths else ""
        rows.append([entry["job"], _apart(entry["overrides"], given), state, folder])
    columns = ["job", "overrides", "val/loss" if losses else "result", "folder"]
    table = make_table("Sweep", columns, rows)
    table.columns[1].justify = table.columns[3].justify = "left"
    reporter = Reporter()
    reporter.table(table)
    if (sweep / BEST).is_file():
        best = yaml.safe_load((sweep / BEST).read_text(encoding="utf-8"))
        if "best_params" in best:  # of one objective
            value = best["best_value"]
            words = " ".join(f"{key}={setting}" for key, setting in best["best_params"].items())
            number = next((entry["job"] for entry in entries if entry.get("result") == value), "?")
            reporter.line(f"best trial of {best['name']}: job {number} ({words}), {value:.4f}")
    if len(runs) > 1:
        reporter.line(f"diffx compare {shlex.quote(str(sweep))}")
