"""``diffx bench adapt``: what DEX costs on a pretrained model, in training beside its controls and afterwards beside the plain model."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.bench.targets import DECODED, check_out, inference, show_ratios, target_ratio
from diffx.bench.timing import alternate, machine, peak_memory
from diffx.bench.train import training_step
from diffx.config import UserError
from diffx.config.dex import DexConfig, Init, Variant
from diffx.config.train import Device, Precision
from diffx.dex.attach import Adapted, attach, fold, parameter_counts
from diffx.dex.heads import choose_heads
from diffx.dex.layout import Layer, find_layers
from diffx.dex.pretrained import Pretrained, load_pretrained
from diffx.train.adapt import ForTraining
from diffx.train.parallel import pick_device, precision_of

# What is compared: the work, the figure, whose it is, to whose; and the lowest and the highest ratio that meet the target that we set.
RATIOS = (
    ("training step", "time", "dex", "attn_only", (None, 1.10)),
    ("training step", "peak memory", "dex", "attn_only", (None, 1.05)),
    ("training step", "time", "dex", "lora", (None, None)),
    ("training step", "peak memory", "dex", "lora", (None, None)),
    ("prefill", "speed", "folded", "base", (0.98, 1.02)),
    ("prefill", "speed", "unfolded", "base", (0.93, None)),
    ("decoding", "speed", "folded", "base", (0.98, 1.02)),
    ("decoding", "speed", "unfolded", "base", (0.93, None)),
)
TURNS = 4  # of inference for each of training: it is quicker, and its targets are narrower


def bench_adapt(out: Path | None, base: str, seq_len: int, batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Measure a training step (forward, loss, backward, clip, AdamW) and inference, on random tokens.

    Every contestant is made of the same weights anew. In training that is ``dex`` beside ``attn_only`` and peft's LoRA; peak memory, the
    weights included, is measured beforehand for each alone. At inference it is the base beside ``dex`` folded and unfolded.

    Args:
        out: where to write the figures as JSON; None writes none.
        base: a causal model of the hub, by name or folder.
        seq_len: T in tokens.
        batch: sequences B.
        rounds: turns of each contestant in training; in inference four times as many.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        What is written: the machine, the trained parameters and the peak memory of each, the seconds of every round, and the ratios with
        their targets.

    Raises:
        UserError: a base that cannot be used or reads less than T, a device that is not there, or ``out`` is no file's name.
    """
    check_out(out)
    where = pick_device(Device(device))
    dtype: torch.dtype | str = "auto" if precision_of(where, Precision.auto) is Precision.bf16 else torch.float32  # as in an adaptation
    found = load_pretrained("base", base, dtype, where)
    if found.limit is not None and seq_len > found.limit:
        raise UserError(f"seq_len={seq_len} cannot be used: {found.name} reads {found.limit} tokens at most")
    layers = find_layers(found.model, {"input_ids": torch.tensor([[0, 1]], device=where)})
    tokens = torch.randint(found.tokenizer.vocab_size, (batch, seq_len + 1), generator=torch.Generator().manual_seed(0)).to(where)
    report: dict[str, Any] = {
        "machine": machine(where),
        "base": found.name,
        "dtype": str(found.dtype).removeprefix("torch."),
        "seq_len": seq_len,
        "batch_size": batch,
        "decoded_tokens": DECODED,
        "rounds": rounds,
        **_training(found, layers, tokens, rounds),
    }
    report["seconds"] |= _inference(found, layers, tokens[:, :-1], TURNS * rounds)
    report["ratios"] = [target_ratio(report, *row) for row in RATIOS]
    show_ratios(report["ratios"], f"{found.name}, T={seq_len}, batch {batch}, {where}", report, out)
    return report


def _adapted(found: Pretrained, layers: list[Layer], variant: str) -> Adapted:
    """Put a variant into a copy of the model, in the middle of its annealing."""
    config = DexConfig(variant=Variant(variant), heads="random", init=Init.linear)
    heads = choose_heads(found.model, layers, config, [], found.fingerprint, seed=0).heads
    adapted = attach(copy.deepcopy(found.model), layers, config, heads, anneal_steps=2, seed=0)
    adapted.set_step(1)
    return adapted


def _training(found: Pretrained, layers: list[Layer], tokens: Tensor, rounds: int) -> dict[str, Any]:
    def build(variant: str) -> Callable[[], None]:
        return training_step(ForTraining(_adapted(found, layers, variant).model).train(), tokens)

    names = ("dex", "attn_only", "lora")
    memory = {name: peak_memory(partial(build, name), tokens.device) for name in names}
    seconds = alternate({name: build(name) for name in names}, rounds, tokens.device)
    return {
        "parameters": {name: parameter_counts(_adapted(found, layers, name)) for name in names},
        "bytes": {"peak memory": memory},
        "seconds": {"training step": seconds},
    }


def _inference(found: Pretrained, layers: list[Layer], ids: Tensor, rounds: int) -> dict[str, dict[str, list[float]]]:
    models: dict[str, Any] = {
        "base": copy.deepcopy(found.model),
        "folded": fold(_adapted(found, layers, "dex")),
        "unfolded": _adapted(found, layers, "dex").model,
    }
    for model in models.values():
        model.requires_grad_(False).to(found.dtype).eval()  # as diffx eval loads an adapted run
    return inference(models, ids, rounds)
