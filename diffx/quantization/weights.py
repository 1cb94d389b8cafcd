"""Weights of few bits, quantized by torchao and stored for ``AutoModelForCausalLM``."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.utils.import_utils import is_torchao_available

from diffx.config.checks import refuse, require
from diffx.config.quantize import EXACT, QuantizeJob, Scheme, Weights, change_settings
from diffx.config.train import Device
from diffx.console import Reporter
from diffx.dex.pretrained import load_pretrained
from diffx.evaluation.run import Change
from diffx.export import new_model_folder, to_transformers, write_pretrained
from diffx.files import json_sha256
from diffx.loading import Loaded, load, load_run

_GROUP = 32  # weights that share a scale by default, below 8 bits
_ROW_BITS = 8  # at which a whole row can share a scale


def check_weights(job: QuantizeJob, loaded: Loaded) -> list[str]:
    """The linear layers that are not quantized: the output projection and those the job skips.

    Raises:
        UserError: the model, torchao, the hardware or a layer does not fit the job.
    """
    method: Any = job.method
    install = "it needs torchao 0.15 or newer; pip install 'diffx[torchao]' installs it"
    refuse(not is_torchao_available(), "method=weights", install)
    quantized = hasattr(getattr(loaded.model, "config", None), "quantization_config")
    original = "its weights are quantized; give the model they were made from"
    refuse(quantized, f"checkpoint={job.checkpoint}", original)
    device = next(loaded.model.parameters()).device
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    refuse(
        method.scheme is Scheme.float8_dynamic and not capable,
        "method.scheme=float8_dynamic",
        "it needs a GPU of compute capability 8.9 or newer",
        str(device),
    )
    model = _plain(job, loaded)
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    skipped = [name for name, part in linear.items() if part is model.get_output_embeddings()]
    for part in method.skip:
        matched = [name for name in linear if f".{part}." in f".{name}."]
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        accepted = f"a whole part of a linear layer's name, such as {known}"
        require(bool(matched), "method.skip", part, accepted)
        skipped += matched
    widths = {name: part.in_features for name, part in linear.items() if name not in skipped}
    nothing = f"{type(model).__name__} has no linear layer to quantize"
    refuse(not widths, "method=weights", nothing)
    for group in {_group(method, bits) for bits in job.bits if bits != EXACT}:
        for name, width in widths.items():
            divides, accepted = not group or width % group == 0, f"a divisor of {width}, the width"
            require(divides, "method.group_size", group, f"{accepted} of {name}")
    return skipped


def quantize_weights(
    job: QuantizeJob, loaded: Loaded, bits: int, skipped: list[str]
) -> tuple[Loaded, Change]:
    """Make the model at ``bits`` bits, unless its folder exists, and load it.

    It is stored in the folder of ``loaded``, under ``quantized/<step>/<name>-<hash>/``.
    ``skipped`` is the result of ``check_weights``.

    Raises:
        RunError: the folder cannot be written.
    """
    method: Any = job.method
    dtype = str(next(loaded.model.parameters()).dtype)
    settings = change_settings(method, bits) | {"group_size": _group(method, bits)}
    known = json_sha256({"fingerprint": loaded.fingerprint, "dtype": dtype, **settings})
    out = loaded.folder / "quantized" / str(loaded.step)
    out /= f"{method.scheme.value}-{bits}bit-{known[:12]}"
    if job.force:
        shutil.rmtree(out, ignore_errors=True)
    if not out.exists():
        _make(job, loaded, bits, skipped, out)
    model = load(str(out), job.device, job.dtype, trust_remote_code=job.trust_remote_code).model
    before = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    facts = {"folder": str(out), "bytes": stored_bytes(out), "bytes_before": before}
    change = Change(f"weights-{bits}bit", settings, lambda model: nullcontext(), True, facts)
    return replace(loaded, model=model, adapted=None), change


def stored_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _make(job: QuantizeJob, loaded: Loaded, bits: int, skipped: list[str], out: Path) -> None:
    """Quantize the model while ``transformers`` loads it, and save it."""
    weight = next(loaded.model.parameters())
    device, dtype, trusted = weight.device, weight.dtype, job.trust_remote_code
    with new_model_folder(out, "checkpoint") as folder:
        source, plain = job.checkpoint, folder / "plain"
        if loaded.job is not None:
            source = str(plain)
            write_pretrained(_plain(job, loaded), loaded, plain)
        if bits < _ROW_BITS and device.type == "cpu":
            Reporter().warn(f"on a CPU torchao stores {bits}-bit weights one to a byte")
        config = TorchAoConfig(_recipe(job.method, bits, device), modules_to_not_convert=skipped)
        options = dtype, device, job.revision, trusted, config
        write_pretrained(load_pretrained("checkpoint", source, *options).model, loaded, folder)
        shutil.rmtree(plain, ignore_errors=True)


def _plain(job: QuantizeJob, loaded: Loaded) -> PreTrainedModel:
    """The model as one of ``transformers``: of a run, its export."""
    if loaded.job is None:
        return loaded.model
    run = load_run(job.checkpoint, Device.cpu, trust_remote_code=job.trust_remote_code)
    return to_transformers(run)[0]


def _group(method: Weights, bits: int) -> int | None:
    """Weights that share a scale; None is a whole row."""
    return method.group_size or (None if bits == _ROW_BITS else _GROUP)


def _recipe(method: Any, bits: int, device: torch.device) -> Any:
    """The config for torchao, without its compiler settings, which hold for the whole process."""
    from torchao import quantization as ao

    forms = {
        Scheme.int8_dynamic: ao.Int8DynamicActivationInt8WeightConfig,
        Scheme.float8: ao.Float8WeightOnlyConfig,
        Scheme.float8_dynamic: ao.Float8DynamicActivationFloat8WeightConfig,
    }
    plain: dict[str, Any] = {"set_inductor_config": False}
    if method.scheme in forms:
        return forms[method.scheme](**plain)
    group = _group(method, bits)
    scales = ao.PerGroup(group) if group else ao.PerRow()
    if bits == _ROW_BITS:
        return ao.Int8WeightOnlyConfig(granularity=scales, **plain)
    if bits == 4 and device.type == "cuda":  # two weights per byte, which no format for a CPU has
        packing = "tile_packed_to_4d"
        return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format=packing, **plain)
    return ao.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), scales)
