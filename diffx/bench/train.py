"""``diffx bench train``: a training step of each architecture, and of Llama and DiffLlama."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DiffLlamaConfig, LlamaConfig

from diffx.bench.targets import check_out
from diffx.bench.timing import Ratio, machine, peak_bytes, speed_ratio, time_in_turns
from diffx.config import require
from diffx.config.data import BpeTokenizer
from diffx.config.launch import compose
from diffx.config.model import MODEL_CONFIGS, ModelConfig
from diffx.config.train import Device, TrainConfig
from diffx.console import Reporter, make_table
from diffx.files import write_json
from diffx.models import build_model, init_weights
from diffx.train.optimizer import build_optimizer
from diffx.train.parallel import autocast, clip_gradients, pick_device

PAIRS = (
    ("transformer", "Llama"),
    ("diff_v1", "DiffLlama"),
    *((kind, "transformer") for kind in MODEL_CONFIGS if kind != "transformer"),
)

# At this learning rate the weights hardly change, so that every round does the same work.
_RECIPE = TrainConfig(lr=1e-6)


def bench_train(
    out: Path | None, sizes: list[str], seq_lens: list[int], rounds: int, device: str
) -> dict[str, Any]:
    """Measure tokens per second and peak memory of a training step.

    A step is forward, loss, backward, clip and AdamW, on 2,048 random tokens on a CPU and 32,768 on
    a GPU (one sequence, if that is longer). All models of a size take turns in this process. Memory
    is measured first, for each model alone.

    Args:
        out: where to write the figures as JSON; None writes none.
        sizes: choices of ``size=``.
        seq_lens: context lengths T in tokens.
        rounds: turns of each model.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        The report: the machine, and for each size and T the seconds of every round, medians, memory
            and ratios.

    Raises:
        UserError: an unknown size, one that an architecture cannot have, a missing device, or
            ``out`` cannot be a file.
    """
    check_out(out)
    for seq_len in seq_lens:
        require(seq_len >= 1, "seq_len", seq_len, "a positive whole number")
    configs = {
        size: {
            kind: compose("train", [f"model={kind}", f"size={size}"]).model
            for kind in MODEL_CONFIGS
        }
        for size in sizes
    }
    chosen = pick_device(Device(device))
    reporter = Reporter()
    report: dict[str, Any] = {"machine": machine(chosen), "rounds": rounds, "cases": []}
    for size in sizes:
        for seq_len in seq_lens:
            case = _measure(size, configs[size], seq_len, rounds, chosen)
            report["cases"].append(case)
            title = f"size={size}, T={seq_len}, batch {case['batch_size']}, {chosen}"
            reporter.table(
                make_table(
                    title, ("model", "parameters", "tokens/s", "peak memory"), _model_rows(case)
                )
            )
    columns = ("speed", "size", "T", "median", "lowest to highest round", "target", "met")
    version = report["machine"]["packages"]["transformers"]
    title = f"Speed ratios, round by round (Llama and DiffLlama of transformers {version})"
    reporter.table(
        make_table(title, columns, [row for case in report["cases"] for row in _ratio_rows(case)])
    )
    if out is not None:
        write_json(out, report)
        reporter.line(f"figures: {out}")
    return report


def target(of: str, to: str, size: str, seq_len: int) -> float | None:
    """The lowest accepted speed ratio of a pair; None if there is no target."""
    everywhere = {("transformer", "Llama"): 1.0, ("diff_v1", "DiffLlama"): 1.25}
    at_25m = {
        ("diff_v1", "transformer", 512): 0.80,
        ("diff_v2", "transformer", 512): 0.75,
        ("diff_v1", "transformer", 2048): 0.65,
        ("diff_v2", "transformer", 2048): 0.65,
    }
    return everywhere.get((of, to)) or (at_25m.get((of, to, seq_len)) if size == "25m" else None)


def _measure(
    size: str, configs: dict[str, ModelConfig], seq_len: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    batch_size = max(1, (2048 if device.type == "cpu" else 32768) // seq_len)
    vocabulary = configs["transformer"].vocab_size or BpeTokenizer().vocab_size
    # (B, T + 1)
    tokens = torch.randint(
        vocabulary, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(0)
    ).to(device)
    builders: dict[str, Callable[[], nn.Module]] = {
        kind: partial(_decoder, replace(config, vocab_size=vocabulary))
        for kind, config in configs.items()
    }
    for name, family in (("Llama", LlamaConfig), ("DiffLlama", DiffLlamaConfig)):
        builders[name] = partial(_transformers, family, configs["transformer"], vocabulary, seq_len)

    memory = {
        name: peak_bytes(partial(_build_step, build, tokens), device)
        for name, build in builders.items()
    }
    models = {name: build().to(device) for name, build in builders.items()}
    seconds = time_in_turns(
        {name: training_step(model, tokens) for name, model in models.items()}, rounds, device
    )
    return {
        "size": size,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "parameters": {
            name: sum(p.numel() for p in model.parameters()) for name, model in models.items()
        },
        "peak_memory_bytes": memory,
        "seconds_per_step": seconds,
        "tokens_per_second": {
            name: batch_size * seq_len / statistics.median(times) for name, times in seconds.items()
        },
        "ratios": [
            _ratio(speed_ratio(seconds, of, to), of, to, target(of, to, size, seq_len))
            for of, to in PAIRS
        ],
    }


def _ratio(ratio: Ratio, of: str, to: str, target_ratio: float | None) -> dict[str, Any]:
    return {
        "of": of,
        "to": to,
        **asdict(ratio),
        "target": target_ratio,
        "met": None if target_ratio is None else ratio.median >= target_ratio,
    }


def _decoder(config: ModelConfig) -> nn.Module:
    model = build_model(config)
    init_weights(model, seed=0)
    return model


class _Logits(nn.Module):
    """A model of transformers that returns its logits and keeps no cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def _transformers(
    family: type[LlamaConfig] | type[DiffLlamaConfig],
    config: ModelConfig,
    vocabulary: int,
    seq_len: int,
) -> nn.Module:
    """Build a model of transformers in the shape of the baseline; DiffLlama has its head counts."""
    shape = family(
        vocab_size=vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
    )
    return _Logits(AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa"))


def _build_step(build: Callable[[], nn.Module], tokens: Tensor) -> Callable[[], None]:
    return training_step(build().to(tokens.device), tokens)


def training_step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
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


def _model_rows(case: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{case['parameters'][name]:,}",
            f"{speed:,.0f}",
            "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
        ]
        for (name, speed), memory in zip(
            case["tokens_per_second"].items(), case["peak_memory_bytes"].values(), strict=True
        )
    ]


def _ratio_rows(case: dict[str, Any]) -> list[list[str]]:
    return [
        [
            f"{ratio['of']} / {ratio['to']}",
            case["size"],
            str(case["seq_len"]),
            f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
            "-" if ratio["target"] is None else f"{ratio['target']:.2f}",
            {None: "-", True: "yes", False: "no"}[ratio["met"]],
        ]
        for ratio in case["ratios"]
    ]
