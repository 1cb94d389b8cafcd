"""Run folders as plain objects, and the groups of runs that differ in nothing but their seed."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from diffx.config import UserError
from diffx.config.bridge import load_config
from diffx.config.checks import MOST
from diffx.config.dex import AdaptJob, DexConfig, Variant
from diffx.config.model import MODEL_CONFIGS, ModelConfig
from diffx.config.train import TrainJob
from diffx.files import read_json
from diffx.tracking import read_metrics

_SHAPE = "hidden_size num_layers num_heads num_kv_heads intermediate_size vocab_size"
SHAPE_KEYS = tuple(f"model.{name}" for name in _SHAPE.split())
# Keys that do not make a run another experiment.
_CADENCE = "tokens resume log_every eval_every save_every keep_last sample_prompt sample_tokens"
_BOOKKEEPING = {"seed", "device", *(f"train.{name}" for name in _CADENCE.split())}
_BASE_MODEL_KEYS = {f"model.{f.name}" for f in fields(ModelConfig)} - {"model.kind"}
CONTROL = "attn_only"
BASE = "base"  # the kind of a pretrained model, beside the variants adapted from it
_KINDS = ("model.kind", "dex.variant")  # what is compared: architectures, or variants


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        job: its config.
        metrics: the lines of ``metrics.jsonl``, in order.
        summary: ``summary.json``; empty while the run goes, or if it was killed.
        data: ``data.json``, what the run was trained on; empty if the run died before it was known.
    """

    path: Path
    job: TrainJob | AdaptJob
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    data: dict[str, Any]

    @property
    def finished(self) -> bool:
        """The run reached its last step, which a later resumption may have moved on."""
        done = bool(self.summary.get("finished"))
        return done and self.summary["step"] >= self.job.train.num_steps

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen and the metric's values, both (n,): one value for each count of tokens."""
        values = {line["tokens"]: line[name] for line in self.metrics if _is_figure(line.get(name))}
        tokens = sorted(values)
        return np.array(tokens, dtype=float), np.array([values[t] for t in tokens], dtype=float)


def read_run(path: str | Path) -> Run:
    """Read a run folder; an unfinished run reads as far as it got.

    Raises:
        UserError: it is no run folder, or one of its files is damaged.
    """
    path = Path(path)
    accepted = "give run folders of `diffx train` or `diffx adapt-dex`"
    if not (path / "config.yaml").is_file():
        reason = "it has no config.yaml" if path.is_dir() else "there is no such folder"
        sweep = "or a sweep folder that holds numbered ones"
        raise UserError(f"RUN={path} cannot be used: {reason}; {accepted}, {sweep}")
    job = load_config(path / "config.yaml")
    if not isinstance(job, TrainJob | AdaptJob):
        reason = "its config.yaml is of another command"
        raise UserError(f"RUN={path} cannot be used: {reason}; {accepted}")
    parts = ("trained",) if isinstance(job, AdaptJob) else ("embedding", "rest")
    return Run(
        path=path,
        job=job,
        metrics=read_metrics(path / "metrics.jsonl"),
        summary=_read_summary(path / "summary.json", parts),
        data=read_json(path / "data.json") if (path / "data.json").exists() else {},
    )


def _read_summary(path: Path, parts: Sequence[str]) -> dict[str, Any]:
    summary = read_json(path, {"step": int, "parameters": dict}) if path.exists() else {}
    if summary and not all(_is_figure(summary["parameters"].get(part)) for part in parts):
        raise UserError(f"{path} is damaged: its 'parameters' lack one of {', '.join(parts)}")
    return summary


def _is_figure(value: Any) -> bool:
    """Whether a value of a JSON file is a number that an array can hold."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read run folders; a sweep folder stands for the numbered job folders in it, in their order.

    Raises:
        UserError: as ``read_run``; or trained and adapted runs are mixed.
    """
    folders = [folder for path in map(Path, paths) for folder in sweep_jobs(path) or [path]]
    unique: dict[Path, Path] = {}
    for folder in folders:
        unique.setdefault(folder.resolve(), folder)
    runs = [read_run(folder) for folder in unique.values()]
    for run in runs:
        if run.job.kind != runs[0].job.kind:
            reason = "one was trained from nothing, the other is an adaptation"
            raise UserError(f"RUN={run.path} cannot be compared with {runs[0].path}: {reason}")
    return runs


def sweep_jobs(path: Path) -> list[Path]:
    """The job folders of a sweep folder, by number; empty for another path."""
    if not path.is_dir() or (path / "config.yaml").exists():
        return []
    jobs = [p for p in path.iterdir() if p.name.isdecimal() and (p / "config.yaml").is_file()]
    return sorted(jobs, key=lambda p: int(p.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: the architecture or the variant, and the settings in which the groups differ.
        settings: the config that the runs share, flat: ``model.hidden_size`` and so on.
        runs: at least one, each with a validation.
    """

    label: str
    settings: dict[str, Any]
    runs: list[Run]

    @property
    def kind(self) -> str:
        """The architecture, or the variant of an adaptation."""
        return _kind(self.settings)

    @property
    def common(self) -> dict[str, Any]:
        """Shape and recipe: the settings that every architecture or variant has."""
        return {key: value for key, value in self.settings.items() if not _is_option(key)}

    @property
    def parameters(self) -> dict[str, int] | None:
        """Parameter counts (embedding, rest, total); None while no run has a summary."""
        counts = (run.summary.get("parameters") for run in self.runs)
        return next((count for count in counts if count), None)

    def final(self, name: str) -> dict[int, float]:
        """The metric's last value for each seed (the mean if a seed was run twice)."""
        values: dict[int, list[float]] = {}
        for run in self.runs:
            curve = run.curve(name)[1]
            if curve.size:
                values.setdefault(run.job.seed, []).append(float(curve[-1]))
        return {seed: float(np.mean(v)) for seed, v in sorted(values.items())}

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Validation loss on one grid of tokens.

        Returns:
            tokens (n,) up to the shortest run's last validation, and losses (runs, n), linearly
            interpolated where a run has no validation at a grid point.
        """
        curves = [run.curve("val/loss") for run in self.runs]
        first, last = (
            max(tokens[0] for tokens, _ in curves),
            min(tokens[-1] for tokens, _ in curves),
        )
        grid = np.unique(np.concatenate([tokens for tokens, _ in curves]))
        grid = grid[(grid >= first) & (grid <= last)]
        return grid, np.stack([np.interp(grid, tokens, losses) for tokens, losses in curves])


def group_runs(runs: list[Run]) -> list[Group]:
    """Group the runs that differ only in their seed, and label each group by its differences."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(json.dumps(_settings(run.job), sort_keys=True), []).append(run)
    settings = [_settings(group[0].job) for group in members.values()]
    groups = zip(_labels(settings), settings, members.values(), strict=True)
    return [Group(label=label, settings=s, runs=group) for label, s, group in groups]


def base_groups(groups: list[Group]) -> dict[str, Group]:
    """The pretrained model of each group of adaptations as a group, by the adaptations' label.

    Its curve is flat: the loss at step 0 of the runs that started from it and measured it on the
    same text at the same context length. Trained groups have none.
    """
    members: dict[str, list[Group]] = {}
    for group in (group for group in groups if "dex.variant" in group.settings):
        shared = {
            key: value
            for key, value in group.settings.items()
            if key in ("base", "revision", "train.seq_len") or key.startswith("data.")
        }
        members.setdefault(json.dumps(shared, sort_keys=True), []).append(group)
    settings = [{"dex.variant": BASE, **json.loads(shared)} for shared in members]
    bases: dict[str, Group] = {}
    for s, label, adapted in zip(settings, _labels(settings), members.values(), strict=True):
        started = {run.job.seed: run for group in adapted for run in group.runs}
        runs = [replace(run, metrics=_flat_curve(run), summary={}) for run in started.values()]
        base = Group(label=label, settings=s, runs=runs)
        bases |= dict.fromkeys((group.label for group in adapted), base)
    return bases


def _flat_curve(run: Run) -> list[dict[str, Any]]:
    return [{**run.metrics[0], "tokens": tokens} for tokens in run.curve("val/loss")[0]]


def dotted(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of nested dicts, joined by dots, with their values."""
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from dotted(item, f"{prefix}.{key}" if prefix else key)


def as_word(value: Any) -> str:
    """Write a value as the command line takes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _settings(job: TrainJob | AdaptJob) -> dict[str, Any]:
    unread = _BOOKKEEPING | ({*_unread(job.dex.variant)} if isinstance(job, AdaptJob) else set())
    settings = {
        key: value.value if isinstance(value, Enum) else value
        for key, value in dotted(asdict(job))
        if key not in unread and not key.startswith(("run.", "wandb."))
    }
    return settings | {"train.steps": job.train.num_steps}  # however the length was given


def _unread(variant: Variant) -> Iterator[str]:
    """Options that a variant does not read, or that it sets itself."""
    if variant is not Variant.lora:
        yield "dex.lora_rank"
    if not variant.branches:
        yield from (f"dex.{name}" for name in ("heads", "k", "share", "calibration_tokens"))
    if not variant.anneals:
        yield from ("dex.init", "dex.anneal_steps")


def _labels(settings: list[dict[str, Any]]) -> list[str]:
    """The architecture or variant, then ``key=value`` for each key in which groups differ.

    An option of one architecture is left out where it has its default. A size sets all keys of the
    shape at once: only those that tell more groups apart are named.
    """
    labels = [_kind(s) for s in settings]
    for key in dict.fromkeys(key for s in settings for key in s if key not in _KINDS):
        if len({repr(s[key]) for s in settings if key in s}) < 2:
            continue
        name = re.sub(r"^(model|dex|train)\.|\.kind$", "", key)
        named = [
            label if key not in s or _is_default(s, key) else f"{label} {name}={as_word(s[key])}"
            for label, s in zip(labels, settings, strict=True)
        ]
        if key not in SHAPE_KEYS or len(set(named)) > len(set(labels)):
            labels = named
    return labels


def _kind(settings: dict[str, Any]) -> str:
    return next(settings[key] for key in _KINDS if key in settings)


def _is_option(key: str) -> bool:
    """Whether only one architecture, or only adaptations, have a key."""
    return key.startswith("dex.") or (key.startswith("model.") and key not in _BASE_MODEL_KEYS)


def _is_default(settings: dict[str, Any], key: str) -> bool:
    if not _is_option(key):
        return False
    group, _, option = key.partition(".")
    config = DexConfig if group == "dex" else MODEL_CONFIGS[_kind(settings)]
    return any(f.name == option and f.default == settings[key] for f in fields(config))
