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
    """Read a safetensors file that must hold exactly the tensors of ``shapes``, and may hold those named in ``optional``.

    Raises:
        UserError: the file cannot be read, or it lacks a tensor, holds another one, or one has another shape.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for name in sorted((shapes.keys() | tensors.keys()) - set(optional)):
        if name not in tensors:
            raise UserError(f"{path} cannot be used: it lacks {name}")
        if name not in shapes:
            raise UserError(
                f"{path} cannot be used: it holds {name}, which the model does not have"
            )
        if tensors[name].shape != shapes[name]:
            raise UserError(
                f"{path} cannot be used: {name} has the shape {list(tensors[name].shape)}, the model's is {list(shapes[name])}"
            )
    return tensors
