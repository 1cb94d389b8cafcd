"""Weights at few bits, stored by torchao: a folder that ``AutoModelForCausalLM`` loads, made once and then evaluated like any model."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.utils.import_utils import is_torchao_available

from diffx.config import UserError
from diffx.config.checks import require
from diffx.config.quantize import EXACT, QuantizeJob, Scheme, Weights, change_settings
from diffx.config.train import Device
from diffx.console import Reporter
from diffx.dex.pretrained import load_pretrained
from diffx.evaluation.run import Change
from diffx.export import new_model_folder, to_transformers, write_pretrained
from diffx.files import json_sha256
from diffx.loading import Loaded, load, load_run

_GROUP = 32  # weights that share a scale where nothing is said, below 8 bits
_ROW_BITS = 8  # at which a whole row can share one


def check_weights(job: QuantizeJob, loaded: Loaded) -> list[str]:
    """Find the linear layers that are to stay as they are: the output projection, and what the job skips.

    Raises:
        UserError: the model is quantized already, torchao or the hardware lacks what it takes, or no layer fits what was asked for.
    """
    method: Any = job.method
    if not is_torchao_available():
        raise UserError("method=weights cannot be used: it needs torchao 0.15 or newer; pip install 'diffx[torchao]' installs it")
    if hasattr(getattr(loaded.model, "config", None), "quantization_config"):
        raise UserError(f"checkpoint={job.checkpoint} cannot be used: its weights are quantized; give the model they were made from")
    device = next(loaded.model.parameters()).device
    if method.scheme is Scheme.float8_dynamic and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError(f"method.scheme=float8_dynamic cannot be used on {device}: it needs a GPU of compute capability 8.9 or newer")
    model = _plain(job, loaded)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = [name for name, module in linear.items() if module is model.get_output_embeddings()]
    for part in method.skip:
        matched = [name for name in linear if f".{part}." in f".{name}."]
        if not matched:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserError(f"method.skip={part} cannot be used: no linear layer's name has it; accepted: whole parts, such as {known}")
        left += matched
    quantized = {name: module.in_features for name, module in linear.items() if name not in left}
    if not quantized:
        raise UserError(f"method=weights cannot be used: {type(model).__name__} has no linear layer left to quantize")
    for group in {_group(method, bits) for bits in job.bits if bits != EXACT}:
        for name, width in quantized.items():
            require(group is None or width % group == 0, "method.group_size", group, f"a divisor of {width}, the width of {name}")
    return left


def quantize_weights(job: QuantizeJob, loaded: Loaded, bits: int, left: list[str]) -> tuple[Loaded, Change]:
    """Make the model at ``bits`` bits, unless it is there, and load it from its folder.

    Args:
        job: its ``method`` is a ``Weights``.
        loaded: the model as it is; its folder gets ``quantized/<step>/<name>-<hash>/``.
        bits: of a weight.
        left: what ``check_weights`` gave.

    Returns:
        The quantized model, known by the name and the folder of ``loaded``, and what was done to it.

    Raises:
        UserError: torchao cannot do it on this machine.
        RunError: the folder cannot be written.
    """
    method: Any = job.method
    dtype = next(loaded.model.parameters()).dtype
    settings = change_settings(method, bits) | {"group_size": _group(method, bits)}  # the one that null stands for
    known = json_sha256({"fingerprint": loaded.fingerprint, "dtype": str(dtype), **settings})
    name = f"{method.scheme.value}-{bits}bit-{known[:12]}"
    out = loaded.folder / "quantized" / str(loaded.step) / name
    if job.force:
        shutil.rmtree(out, ignore_errors=True)
    if not out.exists():
        _make(job, loaded, bits, left, out)
    few = replace(loaded, model=load(str(out), job.device, job.dtype, trust_remote_code=job.trust_remote_code).model, adapted=None)
    facts = {"folder": str(out), "bytes": stored_bytes(out), "bytes_before": _bytes(loaded.model)}
    return few, Change(f"weights-{bits}bit", settings, lambda model: nullcontext(), caches=True, facts=facts)


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _make(job: QuantizeJob, loaded: Loaded, bits: int, left: list[str], out: Path) -> None:
    """Quantize while the model is loaded, which is how ``transformers`` does it, and save what comes of it."""
    device, dtype = next(loaded.model.parameters()).device, next(loaded.model.parameters()).dtype
    with new_model_folder(out, "checkpoint") as folder:
        source, plain = job.checkpoint, folder / "plain"
        if loaded.job is not None:
            source = str(plain)
            write_pretrained(_plain(job, loaded), loaded, plain)
        if bits < _ROW_BITS and device.type == "cpu":
            Reporter().warn(f"on a CPU torchao stores {bits}-bit weights one to a byte: it computes as at {bits} bits, and is larger")
        config = TorchAoConfig(_recipe(job.method, bits, device), modules_to_not_convert=left)
        found = load_pretrained("checkpoint", source, dtype, device, job.revision, job.trust_remote_code, config)
        write_pretrained(found.model, loaded, folder)
        shutil.rmtree(plain, ignore_errors=True)


def _plain(job: QuantizeJob, loaded: Loaded) -> PreTrainedModel:
    """The model as one of ``transformers``: a run's as ``diffx export`` makes it, its branch folded."""
    return (
        loaded.model
        if loaded.job is None
        else to_transformers(load_run(job.checkpoint, Device.cpu, trust_remote_code=job.trust_remote_code))[0]
    )


def _group(method: Weights, bits: int) -> int | None:
    """Weights that share a scale; None is a whole row."""
    return method.group_size or (None if bits == _ROW_BITS else _GROUP)


def _recipe(method: Any, bits: int, device: torch.device) -> Any:
    """What torchao does. Its settings of the compiler are left out: they are the process's, and would touch other models."""
    from torchao import quantization as ao

    plain: dict[str, Any] = {"set_inductor_config": False}
    group = _group(method, bits)
    if method.scheme is Scheme.int8_dynamic:
        return ao.Int8DynamicActivationInt8WeightConfig(**plain)
    if method.scheme is Scheme.float8:
        return ao.Float8WeightOnlyConfig(**plain)
    if method.scheme is Scheme.float8_dynamic:
        return ao.Float8DynamicActivationFloat8WeightConfig(**plain)
    if bits == _ROW_BITS:
        return ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(group) if group else ao.PerRow(), **plain)
    if bits == 4 and device.type == "cuda":  # two to a byte; on a CPU torchao has no such format
        return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", **plain)
    return ao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=ao.PerGroup(group))


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
