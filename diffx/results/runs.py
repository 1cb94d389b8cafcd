"""Run folders as plain objects, and the groups of runs that differ in nothing but their seed."""

import json
from collections.abc import Iterable, Sequence
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

SHAPE_KEYS = tuple(
    f"model.{name}"
    for name in (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "intermediate_size",
        "vocab_size",
    )
)

# Where a run was kept, how often it was looked at and where it ran do not make it another experiment.
_BOOKKEEPING = {"seed", "device", "train.tokens"} | {
    f"train.{name}"
    for name in (
        "resume",
        "log_every",
        "eval_every",
        "save_every",
        "keep_last",
        "sample_prompt",
        "sample_tokens",
    )
}
_BASE_MODEL_KEYS = {f"model.{f.name}" for f in fields(ModelConfig)} - {"model.kind"}
CONTROL = "attn_only"
BASE = "base"  # the kind of a pretrained model, beside the variants adapted from it
_KINDS = (
    "model.kind",
    "dex.variant",
)  # what is compared: architectures, or variants of an adaptation


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
        """The run went to its last step, which a later resumption may have moved on."""
        return (
            bool(self.summary.get("finished")) and self.summary["step"] >= self.job.train.num_steps
        )

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens seen and the metric's values, both (n,), for the lines that carry the metric; one value a token count."""
        values = {line["tokens"]: line[name] for line in self.metrics if _is_figure(line.get(name))}
        tokens = sorted(values)
        return np.array(tokens, dtype=float), np.array([values[t] for t in tokens], dtype=float)


def read_run(path: str | Path) -> Run:
    """Read a run folder; one that is still going, or was killed, reads as far as it got.

    Raises:
        UserError: it is no run folder of ``diffx train`` or ``diffx adapt-dex``, or one of its files is damaged.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        reason = "it has no config.yaml" if path.is_dir() else "there is no such folder"
        raise UserError(
            f"RUN={path} cannot be used: {reason}; give run folders of `diffx train` or `diffx adapt-dex`, or a sweep folder that holds "
            "numbered ones"
        )
    job = load_config(path / "config.yaml")
    if not isinstance(job, TrainJob | AdaptJob):
        raise UserError(
            f"RUN={path} cannot be used: its config.yaml is of another command; give run folders of `diffx train` or `adapt-dex`"
        )
    return Run(
        path=path,
        job=job,
        metrics=read_metrics(path / "metrics.jsonl"),
        summary=_read_summary(
            path / "summary.json",
            ("trained",) if isinstance(job, AdaptJob) else ("embedding", "rest"),
        ),
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
    found: dict[Path, Path] = {}  # a run named twice counts once
    for path in map(Path, paths):
        for folder in sweep_jobs(path) or [path]:
            found.setdefault(folder.resolve(), folder)
    runs = [read_run(folder) for folder in found.values()]
    other = next((run for run in runs if run.job.kind != runs[0].job.kind), None)
    if other:
        raise UserError(
            f"RUN={other.path} cannot be compared with {runs[0].path}: one was trained from nothing, the other is an adaptation"
        )
    return runs


def sweep_jobs(path: Path) -> list[Path]:
    """The job folders of a sweep folder, by number; empty if ``path`` is a run folder or something else."""
    if not path.is_dir() or (path / "config.yaml").exists():
        return []
    jobs = [p for p in path.iterdir() if p.name.isdecimal() and (p / "config.yaml").is_file()]
    return sorted(jobs, key=lambda p: int(p.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: the architecture or the variant, and the settings in which the compared groups differ.
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
        return {key: value for key, value in self.settings.items() if not _is_own(key)}

    @property
    def parameters(self) -> dict[str, int] | None:
        """Parameter counts (embedding, rest, total), or None while no run of the group has a summary."""
        return next(
            (run.summary["parameters"] for run in self.runs if "parameters" in run.summary), None
        )

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
            tokens (n,) up to the shortest run's last validation, and losses (runs, n), linearly interpolated where a run has no
            validation at a grid point.
        """
        each = [run.curve("val/loss") for run in self.runs]
        first, last = max(tokens[0] for tokens, _ in each), min(tokens[-1] for tokens, _ in each)
        grid = np.unique(np.concatenate([tokens for tokens, _ in each]))
        grid = grid[(grid >= first) & (grid <= last)]
        return grid, np.stack([np.interp(grid, tokens, losses) for tokens, losses in each])


def _kind(settings: dict[str, Any]) -> str:
    return next(settings[key] for key in _KINDS if key in settings)


def _is_own(key: str) -> bool:
    return key.startswith("dex.") or (key.startswith("model.") and key not in _BASE_MODEL_KEYS)


def group_runs(runs: list[Run]) -> list[Group]:
    """Gather runs that differ only in their seed, in the order given, and label each group by what sets it apart."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(json.dumps(_settings(run.job), sort_keys=True), []).append(run)
    settings = [_settings(group[0].job) for group in members.values()]
    labels = _labels(settings)
    return [
        Group(label=label, settings=s, runs=group)
        for label, s, group in zip(labels, settings, members.values(), strict=True)
    ]


def base_groups(groups: list[Group]) -> dict[str, Group]:
    """The pretrained model of each group of adaptations as a group of its own, by the adaptations' label; of trained groups there is none.

    Its curve is flat: the loss at step 0 of the runs that started from it and measured it on the same text at the same context length.
    """
    members: dict[str, list[Group]] = {}
    for group in groups:
        if "dex.variant" in group.settings:
            same = {
                k: v
                for k, v in group.settings.items()
                if k in ("base", "revision", "train.seq_len") or k.startswith("data.")
            }
            members.setdefault(json.dumps(same, sort_keys=True), []).append(group)
    settings = [{"dex.variant": BASE, **json.loads(same)} for same in members]
    made: dict[str, Group] = {}
    for s, label, adapted in zip(settings, _labels(settings), members.values(), strict=True):
        runs = {
            run.job.seed: replace(run, metrics=_flat(run), summary={})
            for group in adapted
            for run in group.runs
        }
        made |= dict.fromkeys(
            (group.label for group in adapted),
            Group(label=label, settings=s, runs=list(runs.values())),
        )
    return made


def _flat(run: Run) -> list[dict[str, Any]]:
    return [{**run.metrics[0], "tokens": tokens} for tokens in run.curve("val/loss")[0]]


def _settings(job: TrainJob | AdaptJob) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        elif not prefix.startswith(("run.", "wandb.")) and prefix not in _BOOKKEEPING:
            flat[prefix] = value.value if isinstance(value, Enum) else value

    walk("", asdict(job))
    flat["train.steps"] = job.train.num_steps  # however the length was given
    if isinstance(job, AdaptJob):
        for key in _unread(job.dex.variant):
            del flat[key]
    return flat


def _unread(variant: Variant) -> list[str]:
    """Options that do not matter to a variant, or that it sets itself: they do not make it another experiment."""
    names = [] if variant is Variant.lora else ["lora_rank"]
    if not variant.branches:
        names += ["heads", "k", "share", "init", "anneal_steps", "calibration_tokens"]
    elif not variant.anneals:
        names += ["init", "anneal_steps"]
    return [f"dex.{name}" for name in names]


def _labels(settings: list[dict[str, Any]]) -> list[str]:
    """The architecture or variant, then ``key=value`` for each key in which groups differ.

    Two things keep labels short: an own option is left out where it has its default, and of the keys of the shape, which a
    size sets all at once, only those are named that tell apart what the ones before do not.
    """
    labels = [_kind(s) for s in settings]
    for key in dict.fromkeys(key for s in settings for key in s if key not in _KINDS):
        if len({repr(s[key]) for s in settings if key in s}) < 2:
            continue
        name = (
            key.removeprefix("model.")
            .removeprefix("dex.")
            .removeprefix("train.")
            .removesuffix(".kind")
        )
        named = [
            f"{label} {name}={as_word(s[key])}"
            if key in s and not _is_default(_kind(s), key, s[key])
            else label
            for label, s in zip(labels, settings, strict=True)
        ]
        if key not in SHAPE_KEYS or len(set(named)) > len(set(labels)):
            labels = named
    return labels


def as_word(value: Any) -> str:
    """Write a value as the command line takes it."""
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _is_default(kind: str, key: str, value: Any) -> bool:
    if not _is_own(key):
        return False
    option = key.removeprefix("model.").removeprefix("dex.")
    return any(
        f.name == option and f.default == value
        for f in fields(DexConfig if key.startswith("dex.") else MODEL_CONFIGS[kind])
    )
