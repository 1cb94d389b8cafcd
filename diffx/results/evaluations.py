"""Finished evaluations, and which of several checkpoints' evaluations can be compared."""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffx.config import UserError
from diffx.config.composition import CONFIGS
from diffx.config.suite import SUITE_CONFIGS
from diffx.files import read_json
from diffx.results.declare import Declaration
from diffx.results.runs import as_word, dotted
from diffx.results.table import ROWS, read_frame

_RESULTS = {
    "suite": str,
    "settings_hash": str,
    "settings": dict,
    "checkpoint": dict,
    "metrics": list,
    "examples": int,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A finished evaluation of one checkpoint.

    Attributes:
        label: the checkpoint as the user typed it.
        folder: holds ``results.json`` and ``rows.parquet``.
        results: the former.
    """

    label: str
    folder: Path
    results: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run's folder, or that of a model of the hub."""
        return self.folder.parents[3]

    @property
    def time(self) -> float:
        """When it was finished."""
        return (self.folder / "results.json").stat().st_mtime

    def settings(self) -> dict[str, Any]:
        """What the evaluation was made with, by dotted key."""
        return dict(dotted(self.results["settings"]))

    @property
    def declaration(self) -> Declaration:
        """What the suite declared when it was run.

        Raises:
            UserError: it is damaged, or was made by an older version.
        """
        try:
            return Declaration.from_json(self.results["declaration"])
        except (KeyError, ValueError) as error:
            reason = "it lacks a good declaration of its suite"
            raise UserError(
                f"{self.folder / 'results.json'} cannot be used: {reason}; make the evaluation "
                "again with force=true"
            ) from error

    def rows(self) -> pd.DataFrame:
        """Its rows of the table of results.

        Raises:
            UserError: they are missing or damaged, or have metrics that are not declared.
        """
        frame = read_frame(self.folder / ROWS)
        unknown = {*frame["metric"]} - {metric.name for metric in self.declaration.metrics}
        if unknown:
            raise UserError(
                f"{self.folder / 'results.json'} cannot be used: it declares no metric "
                f"{min(unknown)}; make the evaluation again with force=true"
            )
        return frame


def read_evaluation(folder: Path) -> Evaluation:
    """A finished evaluation, labelled with its checkpoint's name.

    Raises:
        UserError: its results are missing or damaged.
    """
    results = _read(folder)
    if not results.get("finished"):
        reason = "its results.json is missing or damaged; run it again with force=true"
        raise UserError(f"{folder} cannot be used: {reason}")
    return Evaluation(label=results["checkpoint"]["name"], folder=folder, results=results)


def find_evaluations(spec: str, suite: str) -> list[Evaluation]:
    """The finished evaluations of a suite at one step of a checkpoint, the newest first.

    Args:
        spec: the checkpoint; without a step, its last step that has a finished evaluation.
        suite: the suite's name.

    Raises:
        UserError: there are none, or the suite or the checkpoint does not exist.
    """
    run, which = _find_folder(spec)
    named = {path.stem for path in (CONFIGS / "suite").glob("*.yaml")}
    evaluated = {
        p.relative_to(step).as_posix() for step in run.glob("evals/*") for p in step.glob("*")
    }
    known = sorted({*SUITE_CONFIGS, *named, *evaluated})
    if suite not in known:
        accepted = f"there is no such suite; accepted: {', '.join(known)}"
        raise UserError(f"suite={suite} cannot be used: {accepted}")
    step = _step(run, which)
    every = [path for path in run.glob(f"evals/*/{suite}/*") if path.is_dir()]
    folders = [path for path in every if step in (None, path.parents[1].name)]
    if not folders:
        steps = sorted({int(path.parents[1].name) for path in every})
        at = f" at step {step}, only at {', '.join(map(str, steps))}" if steps else ""
        command = f"`diffx eval checkpoint={spec} suite={suite}`"
        raise UserError(f"RUN={spec} has no evaluation of {suite} yet{at}: {command} makes one")
    results = {folder: _read(folder) for folder in folders}
    finished = [folder for folder, result in results.items() if result.get("finished")]
    if not finished:
        reason = f"its evaluation in {folders[0]} is unfinished"
        raise UserError(
            f"RUN={spec} cannot be compared: {reason}; the same `diffx eval` goes on with it"
        )
    last = max(int(folder.parents[1].name) for folder in finished)
    evaluations = [
        Evaluation(label=spec.rstrip("/"), folder=folder, results=results[folder])
        for folder in finished
        if int(folder.parents[1].name) == last
    ]
    return sorted(evaluations, key=lambda evaluation: evaluation.time, reverse=True)


def _find_folder(spec: str) -> tuple[Path, str]:
    """The folder that holds a checkpoint's evaluations, and what stands behind ``@``.

    Raises:
        UserError: there is none, or a model of the hub was evaluated in several revisions.
    """
    name, which = spec, ""
    if "@" in spec and not Path(spec).exists():
        name, _, which = spec.rpartition("@")
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():  # a run, or a folder of runs/hub
        return path, which
    model = path.resolve().name if path.is_dir() else spec.replace("/", "--")
    revisions = sorted(Path("runs/hub").glob(f"{glob.escape(model)}@*"))
    if len(revisions) == 1:
        return revisions[0], ""
    reason = f"there is no folder {name}; give runs/x, runs/x@STEP or runs/hub/<name>@<revision>"
    if revisions:
        reason = f"there are {', '.join(map(str, revisions))}; give one of them"
    raise UserError(f"RUN={spec} cannot be used: {reason}")


def _step(run: Path, which: str) -> str | None:
    if which != "best":
        return which or None
    from diffx.train.checkpoint import find_checkpoint  # imports torch

    return str(int(find_checkpoint(f"{run}@best", "RUN")[1].name.removeprefix("step_")))


def _read(folder: Path) -> dict[str, Any]:
    """The ``results.json`` of a finished evaluation; empty if it is not there, or damaged."""
    try:
        results = read_json(folder / "results.json", _RESULTS)
    except UserError:
        return {}
    checkpoint, change = results["checkpoint"], results.get("change") or {}
    good = [
        isinstance(checkpoint.get("name"), str),
        isinstance(checkpoint.get("step"), int),
        isinstance(results["settings"].get("suite"), dict),
        isinstance(change, dict),
    ]
    if not all(good):
        return {}
    sizes = [change.get(key, 0) for key in ("bytes", "bytes_before")]
    return results if all(isinstance(size, int) for size in sizes) else {}


def share(of_checkpoints: list[list[Evaluation]], say: Callable[[str], None]) -> list[Evaluation]:
    """Choose the evaluation of each checkpoint whose settings all checkpoints share.

    Args:
        of_checkpoints: the evaluations of each checkpoint, the newest first; of several shared
            settings the newest are chosen.
        say: called with a line where there was a choice.

    Raises:
        UserError: they share no settings.
    """
    by_hash = [{e.folder.name: e for e in evaluations} for evaluations in of_checkpoints]
    shared = [key for key in by_hash[0] if all(key in other for other in by_hash)]
    shared.sort(key=lambda key: max(evaluations[key].time for evaluations in by_hash), reverse=True)
    if not shared:
        settings = {e[0].label: e[0].settings() for e in of_checkpoints}
        keys = [
            key
            for key in dict.fromkeys(key for s in settings.values() for key in s)
            if len({repr(s.get(key)) for s in settings.values()}) > 1
        ]
        differences = "; ".join(
            f"{label} has " + ", ".join(f"{key}={as_word(s.get(key))}" for key in keys)
            for label, s in settings.items()
        )
        raise UserError(
            f"these evaluations do not share their settings: {differences}; evaluate them with the "
            "same ones"
        )
    if len(shared) > 1:
        first, others = shared[0], ", ".join(shared[1:])
        chosen = f"the newest, {first}, are compared, and {others} are not"
        say(f"They share {len(shared)} settings: {chosen}.")
    return [evaluations[shared[0]] for evaluations in by_hash]
