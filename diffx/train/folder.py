"""The run folder: its name, its first files, and the settings that a resumed run keeps."""

import dataclasses
import operator
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import yaml

from diffx.config import UserError
from diffx.config.bridge import load_config, save_config
from diffx.config.checks import refuse, refusing
from diffx.config.data import HfTokenizer
from diffx.config.dex import AdaptJob
from diffx.config.train import TrainJob
from diffx.console import Reporter
from diffx.data.tokenizers import Tokenizer
from diffx.files import locked, read_json, replacing_folder, write_json, write_text
from diffx.tracking import read_metrics
from diffx.train.checkpoint import find_checkpoint, newest_intact

_LOCK = ".lock"
# The keys of `train` that may differ between a run and its resumption: how long, and how often.
_FREE = ("steps", "tokens", "log_every", "eval_every", "save_every", "keep_last", "resume")
AnyJob = TrainJob | AdaptJob
_SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")


def settle(job: AnyJob, overrides: list[str]) -> tuple[AnyJob, Path | None]:
    """Return the job to run, and the folder to resume in (``None``: start in a new one).

    A resumed run has its saved job, changed by the overrides on the command line.

    Raises:
        UserError: the folder exists, there is no run to resume, or an override conflicts with it.
    """
    resume, run_dir = job.train.resume, None if job.run.dir is None else Path(job.run.dir)
    if resume is None or (resume == "auto" and (run_dir is None or not _begun(run_dir))):
        why = f"it exists; choose another, or continue that run with train.resume={run_dir}"
        refuse(run_dir is not None and not _unused(run_dir), f"run.dir={run_dir}", why)
        return _continued(job, overrides), None
    folder = run_dir if resume == "auto" and run_dir is not None else Path(resume)
    setting = f"train.resume={folder}"
    why = "there is no such folder; accepted: auto, or a run folder"
    refuse(not folder.is_dir(), setting, why)
    why = "it is not a run folder (it has no config.yaml)"
    if _unused(folder):
        why += "; its start was killed early: repeat it with run.dir= and train.resume=auto"
    refuse(not _begun(folder), setting, why)
    moves = run_dir is not None and run_dir.resolve() != folder.resolve()
    refuse(moves, f"run.dir={run_dir}", "a resumed run stays in its folder", setting)
    saved = load_config(folder / "config.yaml")
    refuse(saved.kind != job.kind, setting, f"it holds a {saved.kind} run, not a {job.kind} run")
    if isinstance(saved, AdaptJob) and isinstance(job, AdaptJob):
        # Another person may have written the folder: only this command can trust code.
        saved.trust_remote_code = job.trust_remote_code
    for key, (value, kept) in given(overrides, job, saved).items():
        if key in ("train.steps", "train.tokens"):  # the one replaces the other
            saved.train.steps = saved.train.tokens = None
        group, _, name = key.rpartition(".")
        free = group in ("wandb", "run") or (group == "train" and name in _FREE)
        if free or key == "device":
            target = getattr(saved, group) if group else saved
            setattr(target, name, operator.attrgetter(key)(job))
        elif value != kept:
            raise UserError(
                f"{key}={value} conflicts with the run in {folder}, which has {key}={kept}; a "
                "resumed run keeps its settings, save for steps, cadence, device and wandb"
            )
    saved.run.dir = str(folder)
    saved.train = dataclasses.replace(saved.train)  # runs its checks again
    return saved, folder


def finished(job: AnyJob, folder: Path, reporter: Reporter) -> bool:
    """Return whether a run has done all its steps, with an intact last checkpoint; then say so."""
    try:
        summary = read_json(folder / "summary.json", {"step": int, "val/loss": float})
    except (UserError, OSError):  # none, or damaged: the end is done again
        return False
    checkpoint = newest_intact(folder, lambda line: None)
    if checkpoint is None or not checkpoint[1]["step"] == summary["step"] == job.train.num_steps:
        return False
    done = f"{summary['step']} steps, val/loss {summary['val/loss']:.4f}"
    reporter.line(f"{folder} is finished: {done}; train.steps=N with a larger N goes on")
    return True


def given(overrides: list[str], job: AnyJob, saved: AnyJob) -> dict[str, tuple[Any, Any]]:
    """Return the config keys of ``saved`` that the overrides set, with the values of both jobs.

    An override of a group (``model=diff_v1``) sets its ``kind``, ``size=`` the shape,
    ``experiment=`` every key in which ``job`` and ``saved`` differ.
    """
    values, saved_values = _flat(job), _flat(saved)
    keys: list[str] = []
    for override in overrides:
        name = override.lstrip("+~").split("=")[0].split("@")[0]
        if name in ("model", "data", "tokenizer"):
            keys.append(f"{name}.kind")
        elif name == "size":
            keys += [f"model.{key}" for key in _SHAPE]
        elif name == "experiment":
            keys += [key for key in values if saved_values.get(key) != values[key]]
        else:
            keys += [key for key in values if key == name or key.startswith(f"{name}.")]
    # A key that `saved` lacks belongs to another kind, and the kinds are compared first.
    keys = [key for key in keys if key in saved_values or key.endswith(".kind")]
    return {key: (values[key], saved_values.get(key)) for key in keys}


def _continued(job: AnyJob, overrides: list[str]) -> AnyJob:
    """With ``train.init_from``, take the model and the tokenizer from that run."""
    if job.train.init_from is None or not isinstance(job, TrainJob):
        return job
    source, _ = find_checkpoint(job.train.init_from, "train.init_from")
    saved = load_config(source / "config.yaml")
    keys = given(overrides, job, saved)
    for key, (value, kept) in keys.items():
        fixed = key.split(".")[0] in ("model", "tokenizer") and key != "model.rope_theta"
        if fixed and value != kept:
            raise UserError(
                f"{key}={value} conflicts with train.init_from={job.train.init_from}, which has "
                f"{key}={kept}; the model and the tokenizer come from that run, and only "
                "model.rope_theta may change"
            )
    theta = job.model.rope_theta if "model.rope_theta" in keys else saved.model.rope_theta
    model = dataclasses.replace(saved.model, rope_theta=theta)
    tokenizer = saved.tokenizer
    if tokenizer.kind in ("bpe", "bytes"):  # read from that run, not trained on this corpus
        tokenizer = HfTokenizer(name=str(source / "tokenizer"))
    return dataclasses.replace(job, model=model, tokenizer=tokenizer)


def new_folder(job: AnyJob) -> Path:
    """Return ``run.dir`` or ``runs/<date-time>-<name>``; nothing is created."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    return Path(job.run.dir or f"runs/{now}-{run_name(job)}")


def variant(job: AnyJob) -> str:
    """Return the architecture of a training, or the variant of an adaptation."""
    return job.model.kind if isinstance(job, TrainJob) else job.dex.variant.value


def run_name(job: AnyJob) -> str:
    """Return ``run.name``, or a name made of architecture or variant, data and seed."""
    return job.run.name or f"{variant(job)}-{job.data.kind}-seed{job.seed}"


def shown_as(job: AnyJob, overrides: list[str]) -> tuple[str, list[str]]:
    """Return the name in W&B, with the overrides that the run was started with, and the tags."""
    named = [] if job.run.name else ["model", "dex.variant", "data", "seed"]  # in run_name()
    hidden = {*named, "run", "wandb", "hydra", "device", "train.resume"}
    groups = hidden.difference(named)
    name, tags = run_name(job), [job.kind, variant(job), job.data.kind]
    tags += [job.base] if isinstance(job, AdaptJob) else []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if override.startswith("experiment="):
            tags.append(value)
        if key not in hidden and key.partition(".")[0] not in groups:
            name += f" {override}"
    # W&B takes names of 128 characters and tags of 64.
    return shorten(name, 128), [tag[-64:] for tag in tags]


@contextmanager
def hold_folder(folder: Path, new: bool) -> Iterator[None]:
    """Hold a run folder's lock; a ``new`` folder is created first, and must have no files.

    Raises:
        UserError: another process holds the lock, or another run created the folder meanwhile.
    """
    setting = f"run.dir={folder}"
    if new:
        with refusing(setting, OSError, accepted="choose a folder that can be written"):
            folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / _LOCK, setting):
        refuse(new and not _unused(folder), setting, "it exists; choose another")
        yield


def write_start(
    folder: Path, job: AnyJob, overrides: list[str], tokenizer: Tokenizer, corpus: dict[str, Any]
) -> None:
    """Write the first files of a run, ``corpus`` into data.json; a resumed run adds to them.

    config.yaml is first: a folder that has it can be resumed. Each file is written atomically.

    Raises:
        UserError: a file of the resumed run is damaged; nothing was written.
    """
    read_metrics(folder / "metrics.jsonl")  # a damaged one is refused before anything is written
    path, now = folder / "environment.json", environment(job.seed)
    if path.exists():
        record = read_json(path)
        record.setdefault("resumed", []).append({"overrides": overrides, **now})
    else:
        record = now
    save_config(job, folder / "config.yaml")
    if not (folder / "overrides.yaml").exists():
        write_text(folder / "overrides.yaml", yaml.safe_dump(overrides))
    write_json(path, record)
    if not (folder / "tokenizer").exists():
        with replacing_folder(folder / "tokenizer") as temporary:
            tokenizer.save(temporary)
    write_json(folder / "data.json", corpus)


def environment(seed: int) -> dict[str, Any]:
    """Describe versions, command, hardware and seed, without variables, which hold secrets."""
    packages = ["torch", "transformers", "tokenizers", "datasets"]
    packages += ["hydra-core", "lm_eval", "wandb", "numpy"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "diffx": version("diffx"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "seed": seed,
    }


def _commit() -> str | None:
    """Return the commit of the checkout, with ``+changes`` if any; ``None`` for a wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "diffx", "conf", "experiments")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _begun(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _unused(folder: Path) -> bool:
    """Return whether a folder is absent, or has only files from before config.yaml."""
    if not folder.is_dir():
        return not folder.exists()
    return {entry.name for entry in folder.iterdir()} <= {_LOCK, ".config.yaml.tmp"}


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        value = getattr(value, "value", value)  # of an enumeration
        values |= _flat(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return values
