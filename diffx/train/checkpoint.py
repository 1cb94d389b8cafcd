"""Checkpoints: ``<run>/checkpoints/step_00001000/`` with weights, optimizer and state.

``state.json`` holds the SHA-256 of the other files and of itself. No file is a pickle.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.errors import storage_errors
from diffx.files import json_checksum, read_json, replacing_folder, sha256, write_json
from diffx.models.tensors import read_tensors

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_FULL = StateDictOptions(
    full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
)
_WRAPPER = "_checkpoint_wrapped_module."  # which activation checkpointing puts into names


class DamagedCheckpointError(UserError):
    """A checkpoint with a missing file or a wrong checksum."""


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    main: bool = True,
) -> Path:
    """Write trained parameters, AdamW's moments, and the loop's ``state``, which is JSON-able.

    Every process calls this; the ``main`` one writes.

    Raises:
        RunError: the disk is full, or the run folder is gone; earlier checkpoints are intact.
    """
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    weights: dict[str, Any] = get_model_state_dict(model, options=_FULL)
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FULL)
    if not main:
        return folder
    trained = trained_shapes(model)
    weights = {name: weights[name] for name in weights if name in trained}  # a tied weight once
    flat = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        flat["rng.cuda"] = torch.cuda.get_rng_state()
    for name, values in moments["state"].items():
        flat |= {f"{name}.{key}": value for key, value in values.items()}
    # A run folder that was deleted in the meantime is not made again: no parents=True.
    with storage_errors(f"the checkpoint of step {step} in {run_dir} cannot be written"):
        folder.parent.mkdir(exist_ok=True)
        with replacing_folder(folder) as temporary:
            sums = {}
            for file, tensors in ((WEIGHTS, weights), (OPTIMIZER, flat)):
                contiguous = {name: value.contiguous() for name, value in tensors.items()}
                save_file(contiguous, temporary / file)
                sums[file] = sha256(temporary / file)
            state = {"step": step, "sha256": sums, **state}
            write_json(temporary / STATE, {"checksum": json_checksum(state), **state})
            for path in temporary.iterdir():
                _sync(path)
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one, not used by the resume
        _sync(folder.parent)
    return folder


def trained_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return names and shapes of the trained parameters; a tied weight is listed once."""
    return {
        name.replace(_WRAPPER, ""): parameter.shape
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` and compare every file with its checksum.

    Raises:
        DamagedCheckpointError: names the file that is missing or altered.
    """

    def damaged(why: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{folder} is damaged: {why}")

    try:
        state = read_json(folder / STATE, {"step": int, "sha256": dict})
    except UserError as error:
        raise damaged(str(error).removeprefix(f"{folder}/")) from error
    checksum, sums = state.pop("checksum", None), state["sha256"]  # old ones have no checksum
    intact = checksum is None or checksum == json_checksum(state)
    named = folder.name == f"step_{state['step']:08d}" and sums.keys() == {WEIGHTS, OPTIMIZER}
    if not (named and intact):
        raise damaged(f"{STATE} is not what was written")
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise damaged(f"{name} is missing")
        if sha256(folder / name) != expected:
            raise damaged(f"{name} does not have its checksum")
    return state


def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, moments and the random state, of files that ``read_state`` has checked."""
    shapes = trained_shapes(model)
    weights: dict[str, Any] = read_tensors(folder / WEIGHTS, shapes)
    set_model_state_dict(model, weights, options=_FULL)
    # Without _FULL, which returns the parameter groups in the main process only.
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    expected = {"rng.cpu": torch.get_rng_state().shape}
    for name, shape in shapes.items():
        expected |= {f"{name}.exp_avg": shape, f"{name}.exp_avg_sq": shape}
        expected[f"{name}.step"] = torch.Size()
    flat = read_tensors(folder / OPTIMIZER, expected, optional=("rng.cuda",))
    torch.set_rng_state(flat["rng.cpu"])
    if "rng.cuda" in flat and torch.cuda.is_available():
        torch.cuda.set_rng_state(flat["rng.cuda"])
    keys = ("exp_avg", "exp_avg_sq", "step")
    states = {name: {key: flat[f"{name}.{key}"] for key in keys} for name in shapes}
    moments: dict[str, Any] = {"state": states, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, moments, options=_FULL)


def checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """List a run's checkpoints as (step, folder), oldest first."""
    paths = (run_dir / "checkpoints").glob("step_????????*")
    return sorted((int(path.name[5:]), path) for path in paths if path.name[5:].isdecimal())


def newest_intact(run_dir: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest undamaged checkpoint and its state, or ``None``; warn of damaged ones."""
    for _, folder in reversed(checkpoints(run_dir)):
        try:
            return folder, read_state(folder)
        except DamagedCheckpointError as error:
            warn(f"{error}; using the one before it")
    return None


def best(run_dir: Path, until: int | None = None) -> Path | None:
    """Return the checkpoint with the lowest validation loss, of those up to step ``until``."""
    losses = []
    for step, folder in checkpoints(run_dir):
        try:
            loss = read_json(folder / STATE).get("val_loss")
        except UserError:
            continue
        if isinstance(loss, int | float) and (until is None or step <= until):
            losses.append((loss, folder))
    return min(losses)[1] if losses else None


def prune(run_dir: Path, keep_last: int, step: int) -> None:
    """Delete all checkpoints up to ``step`` but the newest ``keep_last`` and the best.

    ``step`` is the newest intact checkpoint: later ones are damaged, and stay. Unfinished
    checkpoints of killed processes are deleted.
    """
    keep = best(run_dir, step)
    reached = [folder for number, folder in checkpoints(run_dir) if number <= step]
    for folder in reached[:-keep_last]:
        if folder != keep:
            shutil.rmtree(folder)
    for unfinished in (run_dir / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(unfinished)


def find_checkpoint(spec: str, key: str = "checkpoint") -> tuple[Path, Path]:
    """Return the folders of the run and the checkpoint of ``runs/x@best`` or ``runs/x@1000``.

    Without ``@`` the checkpoint is the newest.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    path, which = spec, ""
    if "@" in spec and not Path(spec).exists():
        path, _, which = spec.rpartition("@")
    run_dir, setting = Path(path), f"{key}={spec}"
    refuse(not run_dir.is_dir(), setting, f"there is no folder {path}")
    why = f"{path} is not a run folder (it has no config.yaml)"
    refuse(not (run_dir / "config.yaml").is_file(), setting, why)
    saved: dict[str, Path | None] = {str(step): folder for step, folder in checkpoints(run_dir)}
    refuse(not saved, setting, f"{path} has no checkpoint yet")
    accepted = f"accepted: best, {', '.join(saved)}"
    saved |= {"": list(saved.values())[-1], "best": best(run_dir)}
    refuse(which not in saved, setting, f"{path} has no checkpoint {which!r}; {accepted}")
    folder = saved[which]
    if folder is None:
        why = f"no checkpoint of {path} has a validation loss"
        raise UserError(f"{setting} cannot be used: {why}; {accepted}")
    read_state(folder)
    return run_dir, folder


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
