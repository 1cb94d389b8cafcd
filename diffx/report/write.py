"""A report's picture, and its figures in a JSON file beside it."""

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
    """Draw a report, and write its figures beside the picture; None as ``out`` writes nothing.

    Raises:
        RunError: they cannot be written.
    """
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
