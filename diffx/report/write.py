"""The end of a report: its sentences, its picture, and its figures in a JSON file beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffx.console import Reporter
from diffx.errors import storage_errors
from diffx.files import replacing, write_json


def write_report(
    report: dict[str, Any],
    out: Path | None,
    draw: Callable[[dict[str, Any], Path], None],
    reporter: Reporter,
) -> None:
    """Print a report's sentences, draw it, and write its figures; without ``out`` only print.

    Raises:
        RunError: the files cannot be written.
    """
    for line in report.get("warnings", ()):
        reporter.warn(line)
    for part in (report, *report.get("comparisons", ())):
        for line in part.get("sentences", ()):
            reporter.line(line)
    if report.get("published"):
        reporter.line(f"published: {report['published']}")
    if out is None:
        reporter.line("--out compare.png draws it, and writes every figure to compare.json")
        return
    figures = out.with_suffix(".json")
    with storage_errors(f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out, out.suffix) as temporary:
            draw(report, temporary)
        write_json(figures, report)
    reporter.line(f"picture: {out}   figures: {figures}")
