"""Tensors read from a safetensors file, checked against the names and shapes that are expected."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffx.config import UserError


def read_tensors(
    path: Path, shapes: Mapping[str, torch.Size], optional: Collection[str] = ()
) -> dict[str, torch.Tensor]:
    """Read a safetensors file that must hold the tensors of ``shapes``, and may hold ``optional``.

    Raises:
        UserError: the file cannot be read, or its names or shapes are not those expected.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for name in sorted((shapes.keys() | tensors.keys()) - set(optional)):
        if name not in tensors:
            reason = f"it lacks {name}"
        elif name not in shapes:
            reason = f"it holds {name}, which the model does not have"
        elif tensors[name].shape != shapes[name]:
            shape, expected = list(tensors[name].shape), list(shapes[name])
            reason = f"{name} has the shape {shape}, the model's is {expected}"
        else:
            continue
        raise UserError(f"{path} cannot be used: {reason}")
    return tensors
