"""Finished evaluations as plain objects, and which of several checkpoints' evaluations can be compared."""

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffx.config import UserError
from diffx.config.composition import CONFIGS
from diffx.config.suite import SUITE_CONFIGS
from diffx.files import read_json
from diffx.results.declare import Declaration
from diffx.results.runs import as_word
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

        def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
            if isinstance(value, dict) and value:
                for key, item in value.items():
                    yield from walk(f"{prefix}.{key}" if prefix else key, item)
            else:
                yield prefix, value

        return dict(walk("", self.results["settings"]))

    @property
    def declaration(self) -> Declaration:
        """What the suite declared when it was run.

        Raises:
            UserError: it is damaged, or was made by an older version.
        """
        try:
            return Declaration.from_json(self.results["declaration"])
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.folder / 'results.json'} cannot be used: it lacks a good declaration of its "
                "suite; make the evaluation again with force=true"
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
        raise UserError(
            f"{folder} cannot be used: its results.json is missing or damaged; run it again with force=true"
        )
    return Evaluation(label=results["checkpoint"]["name"], folder=folder, results=results)


def find_evaluations(spec: str, suite: str) -> list[Evaluation]:
    """The finished evaluations of a suite at the step that ``spec`` names, else at the newest that has one; the newest first.

    Raises:
        UserError: there are none, or the suite or the checkpoint does not exist.
    """
    run, which = _find_folder(spec)
    named = (path.stem for path in (CONFIGS / "suite").glob("*.yaml"))
    shipped = sorted({*SUITE_CONFIGS, *named})
    there = {
        path.relative_to(step).as_posix() for step in run.glob("evals/*") for path in step.glob("*")
    }
    if suite not in [*shipped, *there]:
        raise UserError(
            f"suite={suite} cannot be used: there is no such suite; accepted: {', '.join(dict.fromkeys([*shipped, *sorted(there)]))}"
        )
    step = _step(run, which)
    everywhere = [path for path in run.glob(f"evals/*/{suite}/*") if path.is_dir()]
    folders = [path for path in everywhere if step in (None, path.parents[1].name)]
    if not folders:
        steps = sorted({int(path.parents[1].name) for path in everywhere})
        at = f" at step {step}, only at {', '.join(map(str, steps))}" if steps else ""
        raise UserError(
            f"RUN={spec} has no evaluation of {suite} yet{at}: `diffx eval checkpoint={spec} suite={suite}` makes one"
        )
    results = {folder: _read(folder) for folder in folders}
    finished = [folder for folder, result in results.items() if result.get("finished")]
    if not finished:
        raise UserError(
            f"RUN={spec} cannot be compared: its evaluation in {folders[0]} is unfinished; the same `diffx eval` goes on with it"
        )
    newest = max(int(folder.parents[1].name) for folder in finished)
    finished = [folder for folder in finished if int(folder.parents[1].name) == newest]
    found = [
        Evaluation(label=spec.rstrip("/"), folder=folder, results=results[folder])
        for folder in finished
    ]
    return sorted(found, key=lambda evaluation: evaluation.time, reverse=True)


def _find_folder(spec: str) -> tuple[Path, str]:
    """The folder that holds a checkpoint's evaluations, and what stands behind ``@``.

    Raises:
        UserError: there is none, or a model of the hub was evaluated in several revisions.
    """
    name, _, which = (
        spec.rpartition("@") if "@" in spec and not Path(spec).exists() else (spec, "", "")
    )
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():  # a run, or a folder of runs/hub
        return path, which
    model = path.resolve().name if path.is_dir() else spec.replace("/", "--")
    revisions = sorted(Path("runs/hub").glob(f"{glob.escape(model)}@*"))
    if len(revisions) > 1:
        raise UserError(
            f"RUN={spec} cannot be used: there are {', '.join(map(str, revisions))}; give one of them"
        )
    if not revisions:
        raise UserError(
            f"RUN={spec} cannot be used: there is no folder {name}; give runs/x, runs/x@STEP or runs/hub/<name>@<revision>"
        )
    return revisions[0], ""


def _step(run: Path, which: str) -> str | None:
    if which != "best":
        return which or None
    from diffx.train.checkpoint import find_checkpoint

    return str(int(find_checkpoint(f"{run}@best", "RUN")[1].name.removeprefix("step_")))


def _read(folder: Path) -> dict[str, Any]:
    """The ``results.json`` of a finished evaluation; empty if it is not there, or damaged."""
    try:
        results = read_json(folder / "results.json", _RESULTS)
    except UserError:
        return {}
    checkpoint, suite, change = (
        results["checkpoint"],
        results["settings"].get("suite"),
        results.get("change") or {},
    )
    good = (
        isinstance(checkpoint.get("name"), str)
        and isinstance(checkpoint.get("step"), int)
        and isinstance(suite, dict)
    )
    good = (
        good
        and isinstance(change, dict)
        and all(isinstance(change.get(key, 0), int) for key in ("bytes", "bytes_before"))
    )
    return results if good else {}


def share(found: list[list[Evaluation]], say: Callable[[str], None]) -> list[Evaluation]:
    """Choose of each checkpoint's evaluations the one with the settings that all share, of several such settings the newest.

    Args:
        found: of each checkpoint its evaluations, the newest first.
        say: called with a line where there was a choice.

    Raises:
        UserError: they share no settings.
    """
    by_hash = [
        {evaluation.folder.name: evaluation for evaluation in evaluations} for evaluations in found
    ]
    shared = [key for key in by_hash[0] if all(key in other for other in by_hash)]
    shared.sort(key=lambda key: max(evaluations[key].time for evaluations in by_hash), reverse=True)
    if not shared:
        settings = [evaluations[0].settings() for evaluations in found]
        keys = [
            key
            for key in dict.fromkeys(k for s in settings for k in s)
            if len({repr(s.get(key)) for s in settings}) > 1
        ]
        each = [
            f"{evaluations[0].label} has "
            + ", ".join(f"{key}={as_word(own.get(key))}" for key in keys)
            for evaluations, own in zip(found, settings, strict=True)
        ]
        raise UserError(
            f"these evaluations do not share their settings: {'; '.join(each)}; evaluate them with the same ones"
        )
    if len(shared) > 1:
        others = ", ".join(shared[1:])
        say(
            f"They share {len(shared)} settings: the newest, {shared[0]}, are compared, and {others} are not."
        )
    return [evaluations[shared[0]] for evaluations in by_hash]
