"""``diffx bench train``: a training step of each architecture, and of Llama and DiffLlama."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DiffLlamaConfig, LlamaConfig

from diffx.bench.targets import Row, show_figures, show_ratios
from diffx.bench.timing import Call, begin, measure, random_tokens
from diffx.config import require
from diffx.config.data import BpeTokenizer
from diffx.config.launch import compose
from diffx.config.model import MODEL_CONFIGS, ModelConfig
from diffx.config.train import TrainConfig
from diffx.hub.convert import NAMES
from diffx.models import build_model, init_weights
from diffx.train.adapt import ForTraining
from diffx.train.optimizer import build_optimizer
from diffx.train.parallel import autocast, clip_gradients

PAIRS = (
    ("transformer", "Llama"),
    ("diff_v1", "DiffLlama"),
    *((kind, "transformer") for kind in MODEL_CONFIGS if kind != "transformer"),
)
# The lowest accepted ratio of a pair, everywhere or at a size and T.
TARGETS: dict[tuple[str | int, ...], float] = {
    ("transformer", "Llama"): 1.0,
    ("diff_v1", "DiffLlama"): 1.25,
    ("diff_v1", "transformer", "25m", 512): 0.80,
    ("diff_v2", "transformer", "25m", 512): 0.75,
    ("diff_v1", "transformer", "25m", 2048): 0.65,
    ("diff_v2", "transformer", "25m", 2048): 0.65,
}
# At this learning rate the weights hardly change, so that every round does the same work.
_RECIPE = TrainConfig(lr=1e-6)


def bench_train(
    out: Path | None, sizes: list[str], seq_lens: list[int], rounds: int, device: str
) -> dict[str, Any]:
    """Measure tokens per second and peak memory of a training step; see ``diffx.bench``.

    A step is forward to AdamW, on 2,048 random tokens on a CPU and 32,768 on a GPU (one sequence,
    if that is longer). All models of one of the ``sizes`` (of ``size=``) take turns.
    """
    torch_device, report = begin(out, device, rounds=rounds)
    for seq_len in seq_lens:
        require(seq_len >= 1, "seq_len", seq_len, "a positive whole number")
    configs = {
        size: {k: compose("train", [f"model={k}", f"size={size}"]).model for k in MODEL_CONFIGS}
        for size in sizes
    }
    report |= {"parameters": {}, "tokens_per_second": {}}
    rows: list[Row] = []
    for size, seq_len in product(sizes, seq_lens):
        work = f"{size}, T={seq_len}"
        batch = max(1, (2048 if torch_device.type == "cpu" else 32768) // seq_len)
        vocabulary = configs[size]["transformer"].vocab_size or BpeTokenizer().vocab_size
        tokens = random_tokens(vocabulary, batch, seq_len + 1, torch_device)
        builders = _builders(configs[size], vocabulary, seq_len)
        report["parameters"][work] = {
            name: sum(p.numel() for p in build().parameters()) for name, build in builders.items()
        }
        steps = {name: partial(_step, build, tokens) for name, build in builders.items()}
        seconds = measure(report, work, steps, rounds, torch_device)
        report["tokens_per_second"][work] = {
            name: batch * seq_len / statistics.median(times) for name, times in seconds.items()
        }
        for pair in PAIRS:
            lowest = TARGETS.get(pair, TARGETS.get((*pair, size, seq_len)))
            rows.append((work, "speed", *pair, (lowest, None)))
    version = report["machine"]["packages"]["transformers"]
    title = f"Training steps on {torch_device} (Llama and DiffLlama of transformers {version})"
    columns = ("parameters", "tokens_per_second", "bytes")
    show_figures(title, {column.replace("_", " "): report[column] for column in columns})
    return show_ratios(report, rows, title, out)


def _builders(
    configs: dict[str, ModelConfig], vocabulary: int, seq_len: int
) -> dict[str, Callable[[], nn.Module]]:
    """Builders of the models of a size; those of transformers have the baseline's shape."""
    config = configs["transformer"]
    shape = {name: getattr(config, key) for key, name in NAMES.items()}
    shape |= {"vocab_size": vocabulary, "intermediate_size": config.ffn_size}
    shape["max_position_embeddings"] = seq_len
    return {
        **{k: partial(_decoder, replace(c, vocab_size=vocabulary)) for k, c in configs.items()},
        "Llama": partial(_pretrained, LlamaConfig(**shape)),
        "DiffLlama": partial(_pretrained, DiffLlamaConfig(**shape)),
    }


def _decoder(config: ModelConfig) -> nn.Module:
    model = build_model(config)
    init_weights(model, seed=0)
    return model


def _pretrained(config: LlamaConfig | DiffLlamaConfig) -> nn.Module:
    return ForTraining(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


def _step(build: Callable[[], nn.Module], tokens: Tensor) -> Call:
    return training_step(build().to(tokens.device), tokens)


def training_step(model: nn.Module, tokens: Tensor) -> Call:
    """A call that does one training step (forward to AdamW) on ``tokens`` (B, T + 1)."""
    optimizer = build_optimizer(model, _RECIPE)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T) each

    def step() -> None:
        with autocast(tokens.device, _RECIPE.precision):
            logits = model(inputs)  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        clip_gradients(parameters, _RECIPE.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
