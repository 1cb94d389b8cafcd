"""Finished evaluations, and which of several checkpoints' evaluations can be compared."""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.config.composition import CONFIGS
from diffx.config.suite import SUITE_CONFIGS
from diffx.files import read_json
from diffx.results.declare import Declaration
from diffx.results.runs import as_word, dotted
from diffx.results.table import ROWS, read_frame

_RESULTS = {"suite": str, "settings_hash": str, "settings": dict, "checkpoint": dict}
_AGAIN = "make the evaluation again with force=true"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation of one checkpoint."""

    label: str  # the checkpoint as the user typed it
    folder: Path  # of `results.json` and `rows.parquet`
    results: dict[str, Any]  # the former

    @property
    def run(self) -> Path:
        """The run's folder, or that of a model of the hub."""
        return self.folder.parents[3]

    @property
    def time(self) -> float:
        """When it was finished."""
        return (self.folder / "results.json").stat().st_mtime

    @property
    def declaration(self) -> Declaration:
        """The declaration of the suite; ``UserError`` if it is damaged or of an older version."""
        try:
            return Declaration.from_json(self.results["declaration"])
        except (KeyError, ValueError) as error:
            path, reason = self.folder / "results.json", "its suite's declaration is damaged"
            raise UserError(f"{path} cannot be used: {reason}; {_AGAIN}") from error

    def rows(self) -> pd.DataFrame:
        """Rows of the table of results; ``UserError`` if they are damaged or not as declared."""
        frame = read_frame(self.folder / ROWS)
        unknown = {*frame["metric"]} - {metric.name for metric in self.declaration.metrics}
        reason = f"it declares no metric {min(unknown, default='')}; {_AGAIN}"
        refuse(bool(unknown), f"{self.folder / 'results.json'}", reason)
        return frame


def read_evaluation(folder: Path) -> Evaluation:
    """A finished evaluation by its checkpoint's name; ``UserError`` if it is missing or damaged."""
    results = _read(folder)
    refuse(not results, str(folder), f"its results.json is missing or damaged; {_AGAIN}")
    return Evaluation(label=results["checkpoint"]["name"], folder=folder, results=results)


def find_evaluations(spec: str, suite: str) -> list[Evaluation]:
    """The finished evaluations of a suite at one step of a checkpoint, the newest first.

    A checkpoint without a step is its last step that has a finished evaluation.

    Raises:
        UserError: there are none, or the suite or the checkpoint does not exist.
    """
    run, step = _find_folder(spec)
    every = [folder for folder in run.glob("evals/*/*/*") if folder.is_dir()]
    named = {path.stem for path in (CONFIGS / "suite").glob("*.yaml")}
    known = sorted({*SUITE_CONFIGS, *named, *(folder.parent.name for folder in every)})
    reason = f"there is no such suite; accepted: {', '.join(known)}"
    refuse(suite not in known, f"suite={suite}", reason)
    if step == "best":
        from diffx.train.checkpoint import find_checkpoint  # imports torch

        step = str(int(find_checkpoint(f"{run}@best", "RUN")[1].name.removeprefix("step_")))
    by_step: dict[str, list[Path]] = {}
    for folder in every:
        if folder.parent.name == suite:
            by_step.setdefault(folder.parents[1].name, []).append(folder)
    shown = {name: by_step[name] for name in by_step if step in ("", name)}
    if not shown:
        at = f" at step {step}, only at {', '.join(sorted(by_step, key=int))}" if by_step else ""
        command = f"`diffx eval checkpoint={spec} suite={suite}`"
        raise UserError(f"RUN={spec} has no evaluation of {suite} yet{at}: {command} makes one")
    for name in sorted(shown, key=int, reverse=True):
        evaluations = [
            Evaluation(label=spec.rstrip("/"), folder=folder, results=results)
            for folder in shown[name]
            if (results := _read(folder))
        ]
        if evaluations:
            return sorted(evaluations, key=lambda evaluation: evaluation.time, reverse=True)
    reason = f"its evaluation in {shown[max(shown, key=int)][0]} is unfinished"
    mend = "the same `diffx eval` goes on with it"
    raise UserError(f"RUN={spec} cannot be compared: {reason}; {mend}")


def _find_folder(spec: str) -> tuple[Path, str]:
    name, step = spec, ""
    if "@" in spec and not Path(spec).exists():
        name, _, step = spec.rpartition("@")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():  # a run, or a folder of runs/hub
        return path, step
    model = path.resolve().name if path.is_dir() else spec.replace("/", "--")
    revisions = sorted(Path("runs/hub").glob(f"{glob.escape(model)}@*"))
    if len(revisions) == 1:
        return revisions[0], ""
    reason = f"there is no folder {name}; give runs/x, runs/x@STEP or runs/hub/<name>@<revision>"
    if revisions:
        reason = f"there are {', '.join(map(str, revisions))}; give one of them"
    raise UserError(f"RUN={spec} cannot be used: {reason}")


def _read(folder: Path) -> dict[str, Any]:
    """The ``results.json`` of a finished evaluation; empty if it is not there, or damaged."""
    try:
        results = read_json(folder / "results.json", _RESULTS)
    except UserError:
        return {}
    checkpoint, change = results["checkpoint"], results.get("change") or {}
    good = [
        results.get("finished"),
        isinstance(checkpoint.get("name"), str),
        isinstance(checkpoint.get("step"), int),
        isinstance(results["settings"].get("suite"), dict),
        isinstance(change, dict)
        and all(isinstance(change.get(key, 0), int) for key in ("bytes", "bytes_before")),
    ]
    return results if all(good) else {}


def share(of_checkpoints: list[list[Evaluation]], say: Callable[[str], None]) -> list[Evaluation]:
    """Choose the evaluation of each checkpoint whose settings all checkpoints share.

    Of several shared settings the newest are chosen, and ``say`` is called with a line.

    Raises:
        UserError: they share no settings.
    """
    by_hash = [{e.folder.name: e for e in evaluations} for evaluations in of_checkpoints]
    shared = [key for key in by_hash[0] if all(key in other for other in by_hash)]
    shared.sort(key=lambda key: max(evaluations[key].time for evaluations in by_hash), reverse=True)
    if not shared:
        newest = [evaluations[0] for evaluations in of_checkpoints]
        settings = {e.label: dict(dotted(e.results["settings"])) for e in newest}
        keys = [
            key
            for key in dict.fromkeys(key for s in settings.values() for key in s)
            if len({repr(s.get(key)) for s in settings.values()}) > 1
        ]
        differences = "; ".join(
            f"{label} has " + ", ".join(f"{key}={as_word(s.get(key))}" for key in keys)
            for label, s in settings.items()
        )
        reason = f"these evaluations do not share their settings: {differences}"
        raise UserError(f"{reason}; evaluate them with the same ones")
    if len(shared) > 1:
        first, others = shared[0], ", ".join(shared[1:])
        chosen = f"the newest, {first}, are compared, and {others} are not"
        say(f"They share {len(shared)} settings: {chosen}.")
    return [evaluations[shared[0]] for evaluations in by_hash]
