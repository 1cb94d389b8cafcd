"""``diffx bench quantize``: 8-bit weights and rounded attention logits against the exact ones."""

import tempfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from diffx.bench import timing
from diffx.bench.targets import NO_TARGET, Row, show_ratios
from diffx.config.checks import refuse
from diffx.config.quantize import QuantizeJob, Scheme, Weights
from diffx.config.train import Device
from diffx.dex.pretrained import load_pretrained
from diffx.loading import load
from diffx.ops import QuantizedLogits, reference
from diffx.quantization.weights import check_weights, quantize_weights, stored_bytes

SCHEMES = {"int8": Scheme.weight_only, "int8_dynamic": Scheme.int8_dynamic}
SCOPES = ("map", "row")
HEADS, WIDTH = 8, 64  # of the attention with rounded logits: 8 maps, or 4 differential heads
FIGURES = {"prefill": ("speed", "peak memory"), "decoding": ("speed",), "on disk": ("size",)}
ROWS: list[Row] = [
    (work, figure, name, "original", NO_TARGET)
    for name, work in product(SCHEMES, FIGURES)
    for figure in FIGURES[work]
]
ROWS += [
    (work, "time", f"scope {scope}", "reference", (None, 2.5))
    for work, scope in product(("attention", "differential attention"), SCOPES)
]


def bench_quantize(
    out: Path | None, checkpoint: str, seq_len: int, batch: int, rounds: int, device: str
) -> dict[str, Any]:
    """Measure 8-bit weights, and the forward pass of rounded logits; see ``diffx.bench``.

    Inference is that of ``checkpoint``, a hub name or folder, on ``batch`` random sequences of
    ``seq_len`` tokens. The attention has one sequence of that length.
    """
    torch_device, report = timing.begin(out, device, rounds=rounds)
    loaded = load(checkpoint, Device(device))
    export = "it is a run; give its export, a folder that `diffx export` makes"
    refuse(loaded.job is not None, f"checkpoint={checkpoint}", export)
    report |= timing.model_settings(loaded, seq_len, batch)
    ids = timing.random_tokens(loaded.tokenizer.vocab_size, batch, seq_len, torch_device)

    def read(folder: str) -> timing.Call:
        model = load_pretrained("checkpoint", folder, loaded.model.dtype, torch_device).model
        return torch.inference_mode()(lambda: model(input_ids=ids))

    with tempfile.TemporaryDirectory() as scratch:
        target = replace(loaded, folder=Path(scratch))
        folders, models, sizes = {"original": checkpoint}, {"original": loaded.model}, {}
        for name, scheme in SCHEMES.items():
            method = Weights(scheme=scheme)
            job = QuantizeJob(checkpoint=checkpoint, device=Device(device), method=method, bits=[8])
            quantized, change = quantize_weights(job, target, 8, check_weights(job, loaded))
            folders[name], models[name] = change.facts["folder"], quantized.model
            sizes["original"] = change.facts["bytes_before"]
            sizes[name] = stored_bytes(Path(folders[name]))
        builders = {name: partial(read, folder) for name, folder in folders.items()}
        report["bytes"] = {"prefill": timing.peak_bytes(builders, torch_device), "on disk": sizes}
    report["seconds"] = timing.inference(models, ids, rounds) | _logits(
        seq_len, rounds, torch_device
    )
    title = f"{loaded.name}, T={seq_len}, batch {batch}, {torch_device}"
    return show_ratios(report, ROWS, title, out)


@torch.inference_mode()
def _logits(seq_len: int, rounds: int, device: torch.device) -> dict[str, timing.Seconds]:
    """Seconds of the forward pass of one sequence with 4-bit logits."""
    contestants: dict[str, Any] = {"reference": reference}
    contestants |= {f"scope {scope}": QuantizedLogits(4, scope) for scope in SCOPES}
    seconds = {}
    for operation, inputs in timing.attention_inputs(HEADS, WIDTH, seq_len, device).items():
        calls = {
            name: partial(getattr(ops, operation), *inputs, causal=True, scale=None)
            for name, ops in contestants.items()
        }
        seconds[operation.replace("_", " ")] = timing.time_in_turns(calls, rounds, device)
    return seconds
