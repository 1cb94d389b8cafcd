"""The tracker of a run's figures: ``metrics.jsonl``, and Weights & Biases if it works."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffx.config.checks import MOST
from diffx.config.train import WandbConfig, WandbMode
from diffx.errors import RunError, UserError, reason
from diffx.files import read_json_lines, write_text


class Tracker:
    """Writes one JSON object a line to ``<run>/metrics.jsonl`` and sends it to W&B.

    W&B gets the ``name``, the resolved ``config`` and the ``tags`` of the run; where it fails,
    ``warn`` is called with one line. A resumed run gives the step of its checkpoint, to which the
    file is cut back, and the training ``seconds`` before this process.

    Attributes:
        constants: figures that W&B draws as horizontal lines: they are sent with each validation.
    """

    constants: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        run_dir: Path,
        wandb: WandbConfig,
        name: str,
        config: dict[str, Any],
        warn: Callable[[str], None],
        resume_step: int | None = None,
        seconds: float = 0.0,
        tags: Sequence[str] = (),
    ):
        self._path = run_dir / "metrics.jsonl"
        if resume_step is not None:
            cut_back(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._start, self._warn = time.monotonic() - seconds, warn
        self._run: Any = None
        if wandb.mode is not WandbMode.disabled:
            self._safely(lambda: self._begin(_open(run_dir, wandb, name, config, "train", tags)))

    def _begin(self, run: Any) -> None:
        self._run = run
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")

    @property
    def seconds(self) -> float:
        """Seconds since the run started, those before a resume included."""
        return time.monotonic() - self._start

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Write one line; ``metrics`` have flat names (``train/loss``).

        Raises:
            RunError: the run folder was deleted or moved.
        """
        if not self._path.exists():  # else the lines would be lost without an error
            end = f"deleted or moved while the run was going; it ends at step {step}"
            raise RunError(f"{self._path} was {end}")
        row = {"step": step, "tokens": tokens, "time": round(self.seconds, 3), **metrics}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._run is not None:
            lines = self.constants if "val/loss" in metrics else {}
            self._safely(lambda: self._run.log({"tokens": tokens, **metrics, **lines}, step=step))

    def samples(self, step: int, rows: Sequence[tuple[str, str]]) -> None:
        """Show (prompt, continuation) pairs as a W&B table."""
        if self._run is not None:
            columns, data = ["step", "prompt", "continuation"], [[step, *row] for row in rows]
            self._safely(lambda: self._run.log({"samples": _table(columns, data)}, step=step))

    def summary(self, figures: dict[str, Any]) -> None:
        """Give W&B the run's final figures."""
        if self._run is not None:
            self._safely(lambda: self._run.summary.update(figures))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if self._run is not None:  # waits for an upload, two minutes at most
            self._safely(lambda: self._run.finish(exit_code=int(kind is not None)))

    def _safely(self, call: Callable[[], None]) -> None:
        """Run a W&B call; on any failure say so once and go on without W&B."""
        try:
            call()
        except Exception as error:  # W&B raises many kinds; none is worth a run
            self._run = None
            self._warn(f"{_stopped(error)}; metrics.jsonl goes on")


class NullTracker(Tracker):
    """Keeps no figures; for every process but the main one."""

    def __init__(self) -> None:
        self._start, self._run = time.monotonic(), None

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Keep nothing."""

    def __exit__(self, *_: object) -> None:
        """Close nothing."""


def show_evaluation(
    folder: Path,
    wandb: WandbConfig,
    name: str,
    config: dict[str, Any],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    figures: dict[str, float],
    picture: Path | None,
    warn: Callable[[str], None],
) -> None:
    """Show a finished evaluation as a W&B run of job type ``eval``, one run for each folder.

    The run has the settings ``config``, a table of ``columns`` and ``rows``, a ``picture`` (PNG)
    and the summary ``figures``. ``warn`` is called with one line when W&B fails.
    """
    if wandb.mode is WandbMode.disabled:
        return
    try:
        from wandb import Image

        run = _open(folder, wandb, name, config, "eval")
        shown = {"picture": Image(str(picture))} if picture is not None else {}
        run.log({"metrics": _table(columns, rows), **shown})
        run.summary.update(figures)
        run.finish()
    except Exception as error:  # W&B raises many kinds; none is worth an evaluation
        warn(f"{_stopped(error)}; the evaluation's files are whole")


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    from wandb import Table

    return Table(columns=list(columns), data=[list(row) for row in rows])


def _open(
    folder: Path,
    config: WandbConfig,
    name: str,
    resolved: dict[str, Any],
    job_type: str,
    tags: Sequence[str] = (),
) -> Any:
    """Start the W&B run of a folder, or go on with it."""
    import wandb

    id_file = folder / "wandb_id.txt"
    # Without a key, init would wait at a prompt.
    if config.mode is WandbMode.online and not wandb.login(prompt=False):
        raise RuntimeError("no API key: `wandb login`, or set WANDB_API_KEY")
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        init_timeout=30,
        finish_timeout=120,
        finish_timeout_raises=False,
    )
    run = wandb.init(
        id=id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None,
        resume="allow",
        project=config.project,
        entity=config.entity,
        group=config.group,
        job_type=job_type,
        name=name,
        tags=list(tags),
        dir=str(folder),
        mode=config.mode.value,
        config=resolved,
        settings=settings,
    )
    id_file.write_text(f"{run.id}\n", encoding="utf-8")
    return run


def _stopped(error: Exception) -> str:
    return f"W&B stopped ({type(error).__name__}: {reason(error)})"


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after ``step``, and a last line that was torn by a kill, from a metrics file.

    Raises:
        UserError: another line is damaged.
    """
    if path.exists():
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file without a last line torn by a kill; a missing file has no lines.

    Raises:
        UserError: a line is damaged.
    """
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        counts = [row.get("step"), row.get("tokens")]
        if not all(isinstance(value, int | float) and abs(value) < MOST for value in counts):
            raise UserError(f"{path} is damaged: line {number} has no `step` or no `tokens`")
    return rows
