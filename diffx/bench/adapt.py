"""``diffx bench adapt``: the cost of DEX in training and at inference."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.bench.targets import DECODED, check_out, inference, show_ratios, target_ratio
from diffx.bench.timing import machine, peak_bytes, time_in_turns
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

# Work, figure, contestant, compared with, and target.
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
TURNS = 4  # of inference per turn of training: its targets are narrower


def bench_adapt(
    out: Path | None, base: str, seq_len: int, batch: int, rounds: int, device: str
) -> dict[str, Any]:
    """Measure a training step (forward to AdamW) and inference, on random tokens.

    Every contestant has the same weights. In training they are ``dex``, ``attn_only`` and peft's
    LoRA; their peak memory, weights included, is measured first, for each alone. At inference they
    are the base, and ``dex`` folded and unfolded.

    Args:
        out: where to write the figures as JSON; None writes none.
        base: a causal model of the hub, by name or folder.
        seq_len: T in tokens.
        batch: sequences B.
        rounds: turns of each contestant in training; in inference four times as many.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        The report: the machine, the trained parameters and the peak memory of each, the seconds of
            every round, and the ratios with
        their targets.

    Raises:
        UserError: a base that cannot be used or reads less than T, a missing device, or ``out``
            cannot be a file.
    """
    check_out(out)
    torch_device = pick_device(Device(device))
    # as in an adaptation
    dtype: torch.dtype | str = (
        "auto" if precision_of(torch_device, Precision.auto) is Precision.bf16 else torch.float32
    )
    pretrained = load_pretrained("base", base, dtype, torch_device)
    if pretrained.limit is not None and seq_len > pretrained.limit:
        raise UserError(
            f"seq_len={seq_len} cannot be used: {pretrained.name} reads {pretrained.limit} tokens "
            "at most"
        )
    layers = find_layers(
        pretrained.model, {"input_ids": torch.tensor([[0, 1]], device=torch_device)}
    )
    tokens = torch.randint(
        pretrained.tokenizer.vocab_size,
        (batch, seq_len + 1),
        generator=torch.Generator().manual_seed(0),
    ).to(torch_device)
    report: dict[str, Any] = {
        "machine": machine(torch_device),
        "base": pretrained.name,
        "dtype": str(pretrained.dtype).removeprefix("torch."),
        "seq_len": seq_len,
        "batch_size": batch,
        "decoded_tokens": DECODED,
        "rounds": rounds,
        **_training(pretrained, layers, tokens, rounds),
    }
    report["seconds"] |= _inference(pretrained, layers, tokens[:, :-1], TURNS * rounds)
    report["ratios"] = [target_ratio(report, *row) for row in RATIOS]
    show_ratios(
        report["ratios"],
        f"{pretrained.name}, T={seq_len}, batch {batch}, {torch_device}",
        report,
        out,
    )
    return report


def _adapted(pretrained: Pretrained, layers: list[Layer], variant: str) -> Adapted:
    """Attach a variant to a copy of the model, in the middle of its annealing."""
    config = DexConfig(variant=Variant(variant), heads="random", init=Init.linear)
    heads = choose_heads(pretrained.model, layers, config, [], pretrained.fingerprint, seed=0).heads
    adapted = attach(copy.deepcopy(pretrained.model), layers, config, heads, anneal_steps=2, seed=0)
    adapted.set_step(1)
    return adapted


def _training(
    pretrained: Pretrained, layers: list[Layer], tokens: Tensor, rounds: int
) -> dict[str, Any]:
    def build(variant: str) -> Callable[[], None]:
        return training_step(
            ForTraining(_adapted(pretrained, layers, variant).model).train(), tokens
        )

    names = ("dex", "attn_only", "lora")
    memory = {name: peak_bytes(partial(build, name), tokens.device) for name in names}
    seconds = time_in_turns({name: build(name) for name in names}, rounds, tokens.device)
    return {
        "parameters": {
            name: parameter_counts(_adapted(pretrained, layers, name)) for name in names
        },
        "bytes": {"peak memory": memory},
        "seconds": {"training step": seconds},
    }


def _inference(
    pretrained: Pretrained, layers: list[Layer], ids: Tensor, rounds: int
) -> dict[str, dict[str, list[float]]]:
    models: dict[str, Any] = {
        "base": copy.deepcopy(pretrained.model),
        "folded": fold(_adapted(pretrained, layers, "dex")),
        "unfolded": _adapted(pretrained, layers, "dex").model,
    }
    for model in models.values():
        # as diffx eval loads an adapted run
        model.requires_grad_(False).to(pretrained.dtype).eval()
    return inference(models, ids, rounds)
