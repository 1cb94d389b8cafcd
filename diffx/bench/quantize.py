"""``diffx bench quantize``: 8-bit weights and rounded attention logits against the exact ones."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffx.bench.targets import DECODED, Target, check_out, inference, show_ratios, target_ratio
from diffx.bench.timing import machine, peak_bytes, time_in_turns
from diffx.config import UserError
from diffx.config.quantize import QuantizeJob, Scheme, Weights
from diffx.config.train import Device
from diffx.dex.pretrained import load_pretrained
from diffx.loading import Loaded, load
from diffx.ops import QuantizedLogits, reference
from diffx.quantization.weights import check_weights, quantize_weights, stored_bytes

SCHEMES = {"int8": Scheme.weight_only, "int8_dynamic": Scheme.int8_dynamic}
_SCOPES = ("map", "row")
HEADS, WIDTH = 8, 64  # of the attention with rounded logits: 8 maps, or 4 differential heads
SLOWER: Target = (None, 2.5)  # time of rounding, relative to the reference operation
NO_TARGET: Target = (None, None)


def bench_quantize(
    out: Path | None, checkpoint: str, seq_len: int, batch: int, rounds: int, device: str
) -> dict[str, Any]:
    """Measure 8-bit weights at inference, and the forward pass of attention with rounded logits.

    Args:
        out: where to write the figures as JSON; None writes none.
        checkpoint: a causal model of the hub, by name or folder.
        seq_len: T in tokens, of the prefill and of the attention.
        batch: sequences B of the inference, of random tokens.
        rounds: turns of each contestant.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        The report: the machine, sizes and peak memory, the seconds of every round, and the ratios
            with their targets.

    Raises:
        UserError: a checkpoint that cannot be used or reads less than T, no torchao, or ``out``
            cannot be a file.
    """
    check_out(out)
    loaded = load(checkpoint, Device(device))
    if loaded.job is not None:
        raise UserError(
            f"checkpoint={checkpoint} cannot be used: it is a run; give its export, a folder that "
            "`diffx export` makes"
        )
    if loaded.limit is not None and seq_len > loaded.limit:
        raise UserError(
            f"seq_len={seq_len} cannot be used: {loaded.name} reads {loaded.limit} tokens at most"
        )
    torch_device = loaded.model.device
    report: dict[str, Any] = {
        "machine": machine(torch_device),
        "checkpoint": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "seq_len": seq_len,
        "batch_size": batch,
        "decoded_tokens": DECODED,
        "rounds": rounds,
        **_weights(loaded, checkpoint, device, seq_len, batch, rounds),
    }
    report["seconds"] |= _logits(seq_len, rounds, torch_device)
    rows: list[tuple[str, str, str, str, Target]] = [
        (work, figure, name, "original", NO_TARGET)
        for name in SCHEMES
        for work, figure in (
            ("prefill", "speed"),
            ("decoding", "speed"),
            ("prefill", "peak memory"),
            ("on disk", "size"),
        )
    ]
    rows += [
        (work, "time", f"scope {scope}", "reference", SLOWER)
        for work in ("attention", "differential attention")
        for scope in _SCOPES
    ]
    report["ratios"] = [target_ratio(report, *row) for row in rows]
    show_ratios(
        report["ratios"], f"{loaded.name}, T={seq_len}, batch {batch}, {torch_device}", report, out
    )
    return report


def _weights(
    loaded: Loaded, checkpoint: str, device: str, seq_len: int, batch: int, rounds: int
) -> dict[str, Any]:
    torch_device, dtype = loaded.model.device, loaded.model.dtype
    ids = torch.randint(
        loaded.tokenizer.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(0)
    ).to(torch_device)
    with tempfile.TemporaryDirectory() as scratch:
        folders, models = {"original": checkpoint}, {"original": loaded.model}
        for name, scheme in SCHEMES.items():
            job = QuantizeJob(
                checkpoint=checkpoint,
                device=Device(device),
                method=Weights(scheme=scheme),
                bits=[8],
            )
            quantized, change = quantize_weights(
                job, replace(loaded, folder=Path(scratch)), 8, check_weights(job, loaded)
            )
            folders[name], models[name] = change.facts["folder"], quantized.model
        sizes = {
            name: change.facts["bytes_before"] if name == "original" else stored_bytes(Path(folder))
            for name, folder in folders.items()
        }

        def read(folder: str) -> Callable[[], Any]:
            model = load_pretrained("checkpoint", folder, dtype, torch_device).model
            return torch.inference_mode()(lambda: model(input_ids=ids))

        memory = {
            name: peak_bytes(partial(read, folder), torch_device)
            for name, folder in folders.items()
        }
    return {
        "bytes": {"peak memory": memory, "size": sizes},
        "seconds": inference(models, ids, rounds),
    }


def _logits(seq_len: int, rounds: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Seconds of the forward pass of one sequence with 4-bit logits."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, seq_len, HEADS, WIDTH, generator=generator).to(device) for _ in range(3)
    )
    wide, lam = v.reshape(1, seq_len, HEADS // 2, 2 * WIDTH), torch.tensor(0.5, device=device)
    contestants: dict[str, Any] = {
        "reference": reference,
        **{f"scope {scope}": QuantizedLogits(4, scope) for scope in _SCOPES},
    }
    seconds = {}
    with torch.inference_mode():
        for work, inputs in (
            ("attention", (q, k, v)),
            ("differential_attention", (q, k, wide, lam)),
        ):
            calls = {
                name: partial(getattr(ops, work), *inputs, causal=True, scale=None)
                for name, ops in contestants.items()
            }
            seconds[work.replace("_", " ")] = time_in_turns(calls, rounds, device)
    return seconds
