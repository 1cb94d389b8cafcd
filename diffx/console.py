"""Output of a command: rich tables and progress on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

SWEEP_JOB = ContextVar("SWEEP_JOB", default="")  # `3 (seed=1)`: the job of a sweep that runs now


def make_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Build a table: text in the first column, figures aligned right in the others."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


class Reporter:
    """Prints lines, tables and progress, and writes them to a run's log.

    ``quiet`` (ranks above 0) prints nothing. In a job of a sweep, every line and table begins with
    the job's number and overrides.
    """

    def __init__(self, quiet: bool = False):
        # A pipe or a log file gets full lines, not ones cut at 80 columns.
        width = None if sys.stdout.isatty() else 160
        self.console = Console(highlight=False, soft_wrap=True, quiet=quiet, width=width)
        self._log: TextIO | None = None
        self._bars: Progress | None = None
        self._job = f"job {SWEEP_JOB.get()}: " if SWEEP_JOB.get() else ""

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
        self.console.print(self._job + text.lstrip("\n") if self._job else text, markup=False)
        self.log(text)

    def warn(self, text: str) -> None:
        """Print one line that begins with ``warning:``."""
        self.console.print(f"{self._job}warning: {text}", markup=False, style="yellow")
        self.log(f"warning: {text}")

    def table(self, table: Table) -> None:
        """Print a table."""
        title = table.title
        if self._job:  # which is wider than many a table
            self.console.print(f"{self._job}{title}", markup=False, style="bold")
            table.title = None
        self.console.print(table)
        table.title = title
        if self._log is not None:
            Console(file=self._log, width=160, highlight=False).print(table)
            self._log.flush()

    def log(self, text: str) -> None:
        """Write one line to the log file alone, if there is one."""
        if self._log is not None:
            self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
            self._log.flush()

    @contextmanager
    def progress(
        self, name: str, total: int | None, done: int = 0, unit: str = ""
    ) -> Iterator["Bar"]:
        """Show progress while the block runs: a bar with ETA on a terminal, else plain lines.

        ``total`` units are to be done (``None`` if unknown), ``done`` were done before (a resumed
        run). A bar that begins while another one is shown stands below it.
        """
        if not self.console.is_terminal or self.console.quiet:
            yield Bar(self, name, total, done)
            return
        if first := self._bars is None:
            whole = Column(no_wrap=True)
            columns = [
                TextColumn("{task.description}", markup=False, table_column=whole),
                BarColumn(bar_width=None),  # the one column that shrinks
                MofNCompleteColumn(table_column=whole),
                TextColumn("ETA", table_column=whole),
                TimeRemainingColumn(table_column=whole),
                TextColumn("{task.fields[note]}", markup=False, table_column=whole),
            ]
            self._bars = Progress(*columns, console=self.console, transient=True, expand=True)
            self._bars.start()
        bars, number = self._bars, SWEEP_JOB.get().partition(" ")[0]
        text = (f"job {number} " if number else "") + name + (f" ({unit})" if unit else "")
        task = bars.add_task(text, total=total, completed=done, note="")
        try:
            yield Bar(self, name, total, done, partial(bars.update, task))
        finally:
            bars.remove_task(task)
            if first:
                bars.stop()
                self._bars = None


class Bar:
    """The progress of one piece of work; made by ``Reporter.progress``."""

    def __init__(
        self, reporter: Reporter, name: str, total: int | None, done: int, update: Any = None
    ):
        self._reporter, self._name, self._total, self._update = reporter, name, total, update
        self._first, self._start = done, time.monotonic()
        self._printed = self._start

    def at(self, done: int, note: str = "", always: bool = False) -> None:
        """Show that ``done`` units are done, with the figures ``note``.

        A line goes to the log, and is printed where there is no terminal, every ten seconds at
        most; with ``always`` it is printed now.
        """
        now = time.monotonic()
        total = f"/{self._total}" if self._total else ""
        line = f"{self._name} {done}{total}" + (f"  {note}" if note else "")
        if self._total and done > self._first:
            rest = (now - self._start) / (done - self._first) * (self._total - done)
            line += f"  ETA {duration(rest)}"
        if self._update:
            self._update(completed=done, note=note)
        if always or now - self._printed > 10:
            self._printed = now
            (self._reporter.log if self._update and not always else self._reporter.line)(line)


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
