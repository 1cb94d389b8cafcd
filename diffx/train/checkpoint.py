"""Checkpoints: ``<run>/checkpoints/step_00001000/`` with weights, optimizer and state, whole or not there at all.

A checkpoint is written to a temporary folder and renamed. ``state.json`` holds the SHA-256 of the other files, so that a
damaged checkpoint is named and passed over. Nothing in it is a pickle.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from diffx.config import RunError, UserError
from diffx.files import sha256

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step_(\d{8,})")
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
_WRAPPER = "_checkpoint_wrapped_module."  # which activation checkpointing puts into names


class DamagedCheckpointError(UserError):
    """A checkpoint that lacks a file, or one whose file does not have the checksum it was written with."""


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], main: bool = True
) -> Path:
    """Write a checkpoint of ``step``; every process calls it, the main one writes.

    Args:
        run_dir: the run folder.
        step: optimizer steps done.
        model: what is trained of it is saved, whole, however it is sharded.
        optimizer: AdamW; its moments are saved by parameter name.
        state: JSON-able: the data position, pending losses and what else the loop needs.
        main: whether this process writes.

    Raises:
        RunError: the disk is full; earlier checkpoints are as they were.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    weights: dict[str, Any] = get_model_state_dict(model, options=_FULL)
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FULL)
    if not main:
        return folder
    trained = {name.replace(_WRAPPER, "") for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: value for name, value in weights.items() if name in trained}  # a tied weight once
    flat = {f"{name}.{key}": value for name, values in moments["state"].items() for key, value in values.items()}
    flat["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        flat["rng.cuda"] = torch.cuda.get_rng_state()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary / WEIGHTS)
        save_file({name: value.contiguous() for name, value in flat.items()}, temporary / OPTIMIZER)
        sums = {name: sha256(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        text = json.dumps({"step": step, "sha256": sums, **state}, indent=1)
        (temporary / STATE).write_text(text, encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step, passed over at the resume
        os.replace(temporary, folder)
        _sync(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk in an error of its own, by its text alone
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise RunError(
                f"no space left on the device for the checkpoint of step {step} in {run_dir}; earlier checkpoints are intact"
            ) from error
        raise
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` and hold every file to its checksum.

    Raises:
        DamagedCheckpointError: names the file that is missing or altered.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        sums = state["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{folder} is damaged: {STATE} cannot be read ({type(error).__name__})") from error
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{folder} is damaged: {name} is missing")
        if sha256(path) != expected:
            raise DamagedCheckpointError(f"{folder} is damaged: {name} does not have the checksum it was written with")
    return state


def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, moments and the random state into a model and its optimizer, however they are sharded.

    Call ``read_state`` first: it is what checks the files.
    """
    weights: dict[str, Any] = load_file(folder / WEIGHTS)
    unknown = set_model_state_dict(model, weights, options=_FULL).unexpected_keys
    if unknown:
        raise UserError(f"{folder} cannot be used: it holds {unknown[0]}, which the model does not have")
    flat = load_file(folder / OPTIMIZER)
    torch.set_rng_state(flat.pop("rng.cpu"))
    cuda = flat.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    moments = get_optimizer_state_dict(model, optimizer, options=_FULL)  # for its parameter groups
    states: dict[str, Any] = {}
    for name, value in flat.items():
        parameter, _, key = name.rpartition(".")
        states.setdefault(parameter, {})[key] = value
    set_optimizer_state_dict(model, optimizer, {"state": states, "param_groups": moments["param_groups"]}, options=_FULL)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """List a run's checkpoints as (step, folder), oldest first."""
    folder = run_dir / "checkpoints"
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))] if folder.is_dir() else []
    return sorted(found)


def newest_intact(run_dir: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Find the newest checkpoint whose checksums hold, naming each damaged one on the way; ``None`` if there is none."""
    for _, folder in reversed(checkpoints(run_dir)):
        try:
            return folder, read_state(folder)
        except DamagedCheckpointError as error:
            warn(f"{error}; using the one before it")
    return None


def best(run_dir: Path) -> Path | None:
    """Find the checkpoint with the lowest validation loss."""
    losses = []
    for _, folder in checkpoints(run_dir):
        try:
            loss = json.loads((folder / STATE).read_text(encoding="utf-8")).get("val_loss")
        except (OSError, ValueError):
            continue
        if loss is not None:
            losses.append((loss, folder))
    return min(losses)[1] if losses else None


def prune(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints and the best."""
    keep = best(run_dir)
    for _, folder in checkpoints(run_dir)[:-keep_last]:
        if folder != keep:
            shutil.rmtree(folder)


def find_checkpoint(spec: str, key: str = "checkpoint") -> tuple[Path, Path]:
    """Turn ``runs/x``, ``runs/x@best`` or ``runs/x@1000`` into (run folder, checkpoint folder); the newest without ``@``.

    Raises:
        UserError: there is no such run or no such checkpoint; the message names what there is.
        DamagedCheckpointError: the checkpoint asked for is damaged.
    """
    path, _, which = spec.rpartition("@") if "@" in spec and not Path(spec).exists() else (spec, "", "")
    run_dir = Path(path)
    if not run_dir.is_dir():
        raise UserError(f"{key}={spec} cannot be used: there is no folder {path}")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{key}={spec} cannot be used: {path} is not a run folder (it has no config.yaml)")
    there = dict(checkpoints(run_dir))
    if not there:
        raise UserError(f"{key}={spec} cannot be used: {path} has no checkpoint yet")
    steps = ", ".join(map(str, there))
    if which == "best":
        folder = best(run_dir)
        if folder is None:
            raise UserError(f"{key}={spec} cannot be used: no checkpoint of {path} has a validation loss; its steps are {steps}")
    elif which:
        if not which.isdigit() or int(which) not in there:
            raise UserError(f"{key}={spec} cannot be used: {path} has no checkpoint {which!r}; accepted: best, {steps}")
        folder = there[int(which)]
    else:
        folder = there[max(there)]
    read_state(folder)
    return run_dir, folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
