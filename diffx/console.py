"""Output of a command: rich tables and progress on a terminal, plain lines elsewhere.

The lines of a run are also written to its log.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def make_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Build a table: text in the first column, figures aligned right in the others."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


class Reporter:
    """Prints lines, tables and progress; ``quiet`` (ranks above 0) prints nothing.

    Attributes:
        console: the ``rich`` console.
    """

    def __init__(self, quiet: bool = False):
        # A pipe or a log file gets full lines, not ones cut at 80 columns.
        width = None if sys.stdout.isatty() else 160
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet, width=width)
        self._log: TextIO | None = None

    def open_log(self, path: Path) -> None:
        """Append every later line to ``path`` too."""
        self._log = path.open("a", encoding="utf-8")

    def close_log(self) -> None:
        """Close the log file, if there is one."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def line(self, text: str = "") -> None:
        """Print one line, without markup."""
        self.console.print(text, markup=False)
        self._write_log(text)

    def warn(self, text: str) -> None:
        """Print one line that begins with ``warning:``."""
        self.console.print(f"warning: {text}", markup=False, style="yellow")
        self._write_log(f"warning: {text}")

    def table(self, table: Table) -> None:
        """Print a table."""
        self.console.print(table)
        if self._log is not None:
            Console(file=self._log, width=160, highlight=False).print(table)
            self._log.flush()

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
            self._log.flush()

    @contextmanager
    def progress(
        self, name: str, total: int | None, done: int = 0, unit: str = "steps"
    ) -> Iterator["Bar"]:
        """Show progress while the block runs: a bar with ETA on a terminal, else plain lines.

        Args:
            name: of the work.
            total: units in all; ``None`` if unknown.
            done: units done before (a resumed run).
            unit: name of a unit.
        """
        if self.console.is_terminal and not self.console.quiet:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            ]
            with Progress(*columns, console=self.console, transient=True) as bars:
                task = bars.add_task(name, total=total, completed=done, note="")
                yield Bar(
                    self,
                    name,
                    total,
                    done,
                    lambda n, note: bars.update(task, completed=n, note=note),
                )
        else:
            yield Bar(self, name, total, done, None)


class Bar:
    """The progress of one piece of work; made by ``Reporter.progress``."""

    def __init__(self, reporter: Reporter, name: str, total: int | None, done: int, update):
        self._reporter, self._name, self._total, self._update = reporter, name, total, update
        self._first, self._start = done, time.monotonic()
        self._printed = self._start

    def at(self, done: int, note: str = "", always: bool = False) -> None:
        """Show that ``done`` units are done.

        Args:
            done: units done.
            note: figures to show beside it.
            always: print a line now; by default one is printed every ten seconds at most, and
                none on a terminal.
        """
        now = time.monotonic()
        total = f"/{self._total}" if self._total else ""
        line = f"{self._name} {done}{total}" + (f"  {note}" if note else "")
        if self._total and done > self._first:
            rest = (now - self._start) / (done - self._first) * (self._total - done)
            line += f"  ETA {duration(rest)}"
        if self._update is not None:
            self._update(done, note)
        if always or (self._update is None and now - self._printed > 10):
            self._printed = now
            self._reporter.line(line)


def duration(seconds: float) -> str:
    """Format seconds as ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def figure(value: float) -> str:
    """Format a large number: ``1.41B``, ``2.6M``, ``12.3K``."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"
