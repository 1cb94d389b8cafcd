"""``diffx bench adapt``: the cost of DEX in training and at inference."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffx.bench.targets import NO_TARGET, Row, show_ratios
from diffx.bench.timing import Call, begin, inference, measure, model_settings, random_tokens
from diffx.bench.train import training_step
from diffx.config.dex import DexConfig, Init, Variant
from diffx.config.train import Precision
from diffx.dex.attach import Adapted, attach, fold, parameter_counts
from diffx.dex.heads import choose_heads
from diffx.dex.layout import Layer, find_layers
from diffx.dex.pretrained import Pretrained, load_pretrained
from diffx.train.adapt import ForTraining
from diffx.train.parallel import precision_of

RATIOS: tuple[Row, ...] = (
    ("training step", "time", "dex", "attn_only", (None, 1.10)),
    ("training step", "peak memory", "dex", "attn_only", (None, 1.05)),
    ("training step", "time", "dex", "lora", NO_TARGET),
    ("training step", "peak memory", "dex", "lora", NO_TARGET),
    ("prefill", "speed", "folded", "base", (0.98, 1.02)),
    ("prefill", "speed", "unfolded", "base", (0.93, None)),
    ("decoding", "speed", "folded", "base", (0.98, 1.02)),
    ("decoding", "speed", "unfolded", "base", (0.93, None)),
)
TURNS = 4  # of inference per turn of training: its targets are narrower


def bench_adapt(
    out: Path | None, base: str, seq_len: int, batch: int, rounds: int, device: str
) -> dict[str, Any]:
    """Measure a training step (forward to AdamW) and inference; see ``diffx.bench``.

    All have the weights of ``base``, a hub name or folder, and read the same ``batch`` sequences of
    ``seq_len`` tokens: in training ``dex``, ``attn_only`` and peft's LoRA, at inference the base,
    and ``dex`` folded and unfolded.
    """
    torch_device, report = begin(out, device, rounds=rounds)
    bf16 = precision_of(torch_device, Precision.auto) is Precision.bf16  # as in an adaptation
    pretrained = load_pretrained("base", base, "auto" if bf16 else torch.float32, torch_device)
    report |= model_settings(pretrained, seq_len, batch)
    adapt = partial(_adapted, pretrained, find_layers(pretrained.model))
    tokens = random_tokens(pretrained.tokenizer.vocab_size, batch, seq_len + 1, torch_device)

    def build(variant: str) -> Call:
        return training_step(ForTraining(adapt(variant).model).train(), tokens)

    variants = ("dex", "attn_only", "lora")
    report["parameters"] = {variant: parameter_counts(adapt(variant)) for variant in variants}
    builders = {variant: partial(build, variant) for variant in variants}
    measure(report, "training step", builders, rounds, torch_device)
    models: dict[str, Any] = {"base": copy.deepcopy(pretrained.model), "folded": fold(adapt("dex"))}
    models["unfolded"] = adapt("dex").model
    for model in models.values():  # as diffx eval loads an adapted run
        model.requires_grad_(False).to(pretrained.dtype).eval()
    report["seconds"] |= inference(models, tokens[:, :-1], TURNS * rounds)
    title = f"{pretrained.name}, T={seq_len}, batch {batch}, {torch_device}"
    return show_ratios(report, RATIOS, title, out)


def _adapted(pretrained: Pretrained, layers: list[Layer], variant: str) -> Adapted:
    """Attach a variant to a copy of the model, in the middle of its annealing."""
    config = DexConfig(variant=Variant(variant), heads="random", init=Init.linear)
    heads = choose_heads(pretrained.model, layers, config, [], pretrained.fingerprint, seed=0).heads
    adapted = attach(copy.deepcopy(pretrained.model), layers, config, heads, anneal_steps=2, seed=0)
    adapted.set_step(1)
    return adapted
