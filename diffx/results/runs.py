"""Run folders as plain objects, and the groups of runs that differ only in their seed."""

import json
import re
from collections.abc import Iterable, Iterator
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

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    path: Path
    job: TrainJob | AdaptJob
    metrics: list[Fields]  # the lines of `metrics.jsonl`, in order
    summary: Fields  # `summary.json`; empty while the run goes, or if it was killed
    data: Fields  # `data.json`, of the training data; empty if the run died before it

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
    """Read a run folder; of an unfinished run what there is.

    Raises:
        UserError: it is no run folder, or one of its files is damaged.
    """
    path = Path(path)
    job, reason = None, "it has no config.yaml" if path.is_dir() else "there is no such folder"
    if (path / "config.yaml").is_file():
        job, reason = load_config(path / "config.yaml"), "its config.yaml is of another command"
    if not isinstance(job, TrainJob | AdaptJob):
        accepted = "give run folders of `diffx train` or `diffx adapt-dex`, or of their sweeps"
        raise UserError(f"RUN={path} cannot be used: {reason}; {accepted}")
    summary, data = path / "summary.json", path / "data.json"
    run = Run(
        path=path,
        job=job,
        metrics=read_metrics(path / "metrics.jsonl"),
        summary=read_json(summary, {"step": int, "parameters": dict}) if summary.exists() else {},
        data=read_json(data) if data.exists() else {},
    )
    parts = ("trained",) if isinstance(job, AdaptJob) else ("embedding", "rest")
    if run.summary and not all(_is_figure(run.summary["parameters"].get(part)) for part in parts):
        raise UserError(f"{summary} is damaged: its 'parameters' lack one of {', '.join(parts)}")
    return run


def _is_figure(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read run folders; a sweep folder stands for the numbered job folders in it, in their order.

    Raises:
        UserError: as ``read_run``; or trained and adapted runs are mixed.
    """
    unique: dict[Path, Path] = {}
    for path in map(Path, paths):
        for folder in sweep_jobs(path) or [path]:
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
    return sorted(jobs, key=lambda job: int(job.name))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in their seed."""

    label: str  # the architecture or the variant, and the settings in which the groups differ
    settings: Fields  # the shared config, flat: `model.hidden_size` and so on
    runs: list[Run]  # at least one, each with a validation

    @property
    def kind(self) -> str:
        """The architecture, or the variant of an adaptation."""
        return _kind(self.settings)

    @property
    def common(self) -> Fields:
        """Shape and recipe: the settings that every architecture or variant has."""
        return {key: value for key, value in self.settings.items() if not _is_option(key)}

    @property
    def parameters(self) -> dict[str, int] | None:
        """Parameter counts (embedding, rest, total); None while no run has a summary."""
        counts = (run.summary.get("parameters") for run in self.runs)
        return next(filter(None, counts), None)

    def final(self, name: str) -> dict[int, float]:
        """The metric's last value for each seed (the mean if a seed was run twice)."""
        values: dict[int, list[float]] = {}
        for run in self.runs:
            curve = run.curve(name)[1]
            if curve.size:
                values.setdefault(run.job.seed, []).append(float(curve[-1]))
        return {seed: float(np.mean(of_seed)) for seed, of_seed in sorted(values.items())}

    def curves(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) up to the shortest run's last validation, and validation losses (runs, n).

        They are linear between validations where a run has none at a token count of another.
        """
        curves = [run.curve("val/loss") for run in self.runs]
        grid = np.unique(np.concatenate([tokens for tokens, _ in curves]))
        first, last = max(t[0] for t, _ in curves), min(t[-1] for t, _ in curves)
        grid = grid[(grid >= first) & (grid <= last)]
        return grid, np.stack([np.interp(grid, tokens, losses) for tokens, losses in curves])


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Group the runs that differ only in their seed, and label each group by its differences."""
    return _group((_settings(run.job), run) for run in runs)


def base_groups(groups: list[Group]) -> dict[str, Group]:
    """The pretrained model of each group of adaptations as a group, by the adaptations' label.

    Its curve is flat: the loss at step 0 of the runs that started from it and measured it on the
    same text at the same context length. Trained groups have none.
    """
    settings, flat = {}, []
    for group in (group for group in groups if "dex.variant" in group.settings):
        of_base = settings[group.label] = {"dex.variant": BASE} | {
            key: value
            for key, value in group.settings.items()
            if key in ("base", "revision", "train.seq_len") or key.startswith("data.")
        }
        for run in group.runs:
            metrics = [run.metrics[0] | {"tokens": tokens} for tokens in run.curve("val/loss")[0]]
            flat.append((of_base, replace(run, metrics=metrics, summary={})))
    bases = [
        replace(base, runs=[*{run.job.seed: run for run in base.runs}.values()])
        for base in _group(flat)
    ]
    return {label: base for label in settings for base in bases if base.settings == settings[label]}


def _group(pairs: Iterable[tuple[Fields, Run]]) -> list[Group]:
    members: dict[str, tuple[Fields, list[Run]]] = {}
    for settings, run in pairs:
        members.setdefault(json.dumps(settings, sort_keys=True), (settings, []))[1].append(run)
    labels = _labels([settings for settings, _ in members.values()])
    groups = zip(labels, members.values(), strict=True)
    return [Group(label=label, settings=s, runs=runs) for label, (s, runs) in groups]


def dotted(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of nested dicts, joined by dots, with their values."""
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for key, item in value.items():
        yield from dotted(item, f"{prefix}.{key}" if prefix else key)


def as_word(value: Any) -> str:
    """Write a value as the command line takes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _settings(job: TrainJob | AdaptJob) -> Fields:
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
        yield from ("dex.heads", "dex.k", "dex.share", "dex.calibration_tokens")
    if not variant.anneals:
        yield from ("dex.init", "dex.anneal_steps")


def _labels(settings: list[Fields]) -> list[str]:
    """The architecture or variant, then ``key=value`` for each key in which groups differ.

    An option of one architecture is left out where it has its default, and a key of the shape where
    it tells no more groups apart.
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
        if key not in SHAPE_KEYS or len({*named}) > len({*labels}):
            labels = named
    return labels


def _kind(settings: Fields) -> str:
    return next(settings[key] for key in _KINDS if key in settings)


def _is_option(key: str) -> bool:
    """Whether only one architecture, or only adaptations, have a key."""
    return key.startswith("dex.") or (key.startswith("model.") and key not in _BASE_MODEL_KEYS)


def _is_default(settings: Fields, key: str) -> bool:
    if not _is_option(key):
        return False
    group, _, option = key.partition(".")
    config = DexConfig if group == "dex" else MODEL_CONFIGS[_kind(settings)]
    return any(f.name == option and f.default == settings[key] for f in fields(config))
