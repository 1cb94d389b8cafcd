"""The jobs of an experiment: what each trains and measures, where, and what all of them cost."""

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from diffx.config.bridge import to_plain
from diffx.config.experiment import ExperimentJob
from diffx.config.launch import compose
from diffx.config.train import Device, Precision, TrainJob
from diffx.experiment.claims import load_experiment, scale_of
from diffx.files import json_sha256, read_json
from diffx.models import build_model
from diffx.results.runs import read_run
from diffx.train.parallel import pick_device
from diffx.train.throughput import matmul_ceiling

# The share of the matrix-product rate that training is taken to reach where no run is finished: 0.1
# was measured with the laptop recipe on two cores, the others are assumed.
_UTILISATION = {"cpu": 0.1, "mps": 0.3, "cuda": 0.4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run of an experiment, with its measurements.

    Attributes:
        arm: its name in the experiment.
        seed: of the run.
        words: of the command that makes the run, ``run.dir`` among them.
        job: what they compose to.
        folder: of the run; it is named by the hash of the config, so that experiments share runs.
        measure: commands, each a list of words that begins with ``eval`` or ``quantize``.
    """

    arm: str
    seed: int
    words: list[str]
    job: Any
    folder: Path
    measure: list[list[str]]

    @property
    def finished(self) -> bool:
        """Whether the run reached its last step; its measurements may be missing."""
        return (self.folder / "summary.json").is_file() and read_run(self.folder).finished

    @property
    def measured(self) -> Path:
        """The file that names the folders of results of each command, ``measured.json``."""
        return self.folder / "measured.json"

    def evaluations(self, command: list[str]) -> list[Path]:
        """The folders of a command's results; empty if one of them is missing."""
        names = read_json(self.measured).get(" ".join(command)) if self.measured.exists() else None
        folders = [self.folder / name for name in names or []]
        return folders if all((folder / "results.json").is_file() for folder in folders) else []


def make_trials(job: ExperimentJob) -> list[Trial]:
    """Compose the runs of an experiment, all arms of a seed before the next seed.

    Raises:
        UserError: the experiment or its scale does not exist, or its words do not compose.
    """
    experiment = load_experiment(job.name)
    scale = scale_of(job.name, experiment, job.scale)
    bases = make_bases(job)
    arms = experiment.arms | scale.arms
    shared = [*experiment.words, *scale.words, f"device={job.device.value}"]
    shared += [f"wandb.mode={job.wandb.mode.value}", f"wandb.project={job.wandb.project}"]
    measure = [
        line.split() for line in (experiment.measure if scale.measure is None else scale.measure)
    ]
    words = {arm: _with_base([*shared, *words], job, bases) for arm, words in arms.items()}
    jobs = {arm: compose(experiment.command, words[arm]) for arm in arms}
    return [
        _trial(arm, words[arm], jobs[arm], seed, Path(job.dir), measure)
        for seed in job.seeds or range(scale.seeds)
        for arm in arms
    ]


def make_bases(job: ExperimentJob) -> dict[str, Trial]:
    """The runs of ``diffx train`` that the arms of an experiment of DEX start from, by name.

    Empty where a model of the hub is adapted: that of the job's ``base``, or of the scale's words.
    """
    experiment = load_experiment(job.name)
    scale = scale_of(job.name, experiment, job.scale)
    arms = (experiment.arms | scale.arms).values()
    used = {_base_of([*experiment.words, *scale.words, *words]) for words in arms}
    shared = [f"device={job.device.value}", f"wandb.mode={job.wandb.mode.value}"]
    bases = {}
    for name, given in experiment.bases.items():
        if job.base is None and name in used:
            composed = compose("train", [*given, *shared])
            place, seed = Path(job.dir), composed.seed
            bases[name] = _trial(f"base {name}", [*given, *shared], composed, seed, place, [])
    return bases


def _base_of(words: list[str]) -> str | None:
    """What the last ``base=`` of the words names."""
    bases = [word.partition("=")[2] for word in words if word.startswith("base=")]
    return bases[-1] if bases else None


def _with_base(words: list[str], job: ExperimentJob, bases: dict[str, Trial]) -> list[str]:
    """Replace every ``base=`` by one: the job's, the folder of one of ``bases``, or the last."""
    name = _base_of(words)
    if name is None:
        return words
    base = job.base or (exported(bases[name]) if name in bases else name)
    return [*(word for word in words if not word.startswith("base=")), f"base={base}"]


def exported(trial: Trial) -> Path:
    """Where the model of ``make_bases`` is exported to."""
    return Path(f"{trial.folder}-exported")


def _trial(
    arm: str, words: list[str], job: Any, seed: int, place: Path, measure: list[list[str]]
) -> Trial:
    """One run, in the folder that its config names."""
    job = dataclasses.replace(job, seed=seed)
    settings = _changed(job)
    for key in ("run", "wandb", "device"):  # they do not change the figures
        settings.pop(key, None)
    kind = job.model.kind if isinstance(job, TrainJob) else job.dex.variant.value
    folder = place / f"{kind}-{json_sha256(settings)[:10]}"
    words = [*words, f"seed={seed}", f"run.dir={folder}"]
    return Trial(arm=arm, seed=seed, words=words, job=job, folder=folder, measure=measure)


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a config that have not their default, so that a new key changes no hash."""
    settings = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            settings[field.name] = {"kind": getattr(value, "kind", None), **_changed(value)}
        elif value != field.default:
            settings[field.name] = to_plain(value)
    return settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the jobs of an experiment cost, each run counted once.

    Attributes:
        runs: how many there are.
        done: how many of them are finished.
        tokens: that all runs train on.
        flops: that training takes; None where a model of the hub is adapted.
        hours: of the unfinished runs, one after the other; None as ``flops``.
    """

    runs: int
    done: int
    tokens: int
    flops: float | None
    hours: float | None


def cost_of(trials: list[Trial], device: Device) -> Cost:
    """Work out what runs cost here.

    The hours follow from the FLOPs a second of the finished runs; without one, from a share of the
    matrix-product rate, which is measured.
    """
    unique = [*{trial.folder: trial for trial in trials}.values()]
    finished = [trial for trial in unique if trial.finished]
    tokens = sum(trial.job.train.num_steps * int(trial.job.train.batch_tokens) for trial in unique)
    cost = Cost(runs=len(unique), done=len(finished), tokens=tokens, flops=None, hours=None)
    if not all(isinstance(trial.job, TrainJob) for trial in unique):
        return cost
    arms = {trial.arm: trial for trial in unique}  # seeds are alike
    by_arm = {arm: _flops(trial) for arm, trial in arms.items()}
    total = sum(by_arm[trial.arm] for trial in unique)
    spent = sum(by_arm[trial.arm] for trial in finished)
    seconds = sum(read_run(trial.folder).summary["seconds"] for trial in finished)
    rate = spent / seconds if seconds else _rate(device)
    return dataclasses.replace(cost, flops=total, hours=(total - spent) / rate / 3600)


@cache
def _rate(device: Device) -> float:
    place = pick_device(device)
    return matmul_ceiling(place, Precision.fp32) * _UTILISATION[place.type]


def _flops(trial: Trial) -> float:
    """The FLOPs that training takes by the model's shape."""
    model, train = trial.job.model, trial.job.train
    entries = model.vocab_size or getattr(trial.job.tokenizer, "vocab_size", 100288)
    with torch.device("meta"):
        made = build_model(dataclasses.replace(model, vocab_size=entries))
    return float(made.flops_per_token(train.seq_len) * train.num_steps * int(train.batch_tokens))
