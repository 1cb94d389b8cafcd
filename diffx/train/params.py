"""Parameter counts of the architectures side by side, on the meta device."""

import dataclasses

import torch
from rich.table import Table

from diffx.config import UserError
from diffx.config.data import BpeTokenizer
from diffx.config.model import MODEL_CONFIGS, ModelConfig
from diffx.config.train import TrainJob
from diffx.console import make_table
from diffx.models import build_model

_SHAPE = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "kind"]


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count a model's parameters as ``Decoder.num_parameters`` does, from two of its layers.

    All layers have the same number.

    Args:
        config: the architecture and its shape, ``vocab_size`` included.
    """
    with torch.device("meta"):
        one, two = (
            build_model(dataclasses.replace(config, num_layers=layers)).num_parameters()
            for layers in (1, 2)
        )
    return {part: one[part] + (config.num_layers - 1) * (two[part] - one[part]) for part in one}


def check_memory(job: TrainJob, processes: int, free: int) -> None:
    """Refuse a model or a batch whose lower bound of memory does not fit.

    Args:
        job: the job.
        processes: the number of processes that share weights, gradients, moments and the batch.
        free: free bytes on the device of one process.

    Raises:
        UserError: it does not fit.
    """
    model, recipe, gib = job.model, job.train, 2**30
    # An unknown vocabulary counts as the smallest possible.
    known = dataclasses.replace(model, vocab_size=model.vocab_size or 257)
    total = count_parameters(known)["total"]
    weights = 16 * total // processes  # fp32: weights, gradients, two moments
    if weights > free:
        names = ("hidden_size", "num_layers", "intermediate_size", "vocab_size")
        shape = ", ".join(
            f"model.{name}={value}" for name in names if (value := getattr(model, name)) is not None
        )
        raise UserError(
            f"{shape} cannot be used: {total:,} parameters take {weights / gib:,.1f} GiB with "
            f"gradients and moments, and {free / gib:,.1f} GiB are free; choose a smaller model"
        )
    batch = int(recipe.batch_tokens) // processes
    tokens = min(batch, recipe.seq_len * (recipe.micro_batch_size or batch))
    # Token and target ids of the batch, and the input of every block for a micro-batch, which even
    # activation checkpointing keeps.
    needed = 16 * batch + 2 * tokens * model.hidden_size * model.num_layers
    if weights + needed > free:
        size = recipe.micro_batch_size
        micro = "" if size is None else f", train.micro_batch_size={size}"
        raise UserError(
            f"train.batch_tokens={recipe.batch_tokens}, train.seq_len={recipe.seq_len}{micro} "
            f"cannot be used: a step takes {needed / gib:,.1f} GiB and more beside the model's "
            f"{weights / gib:,.1f}, and {free / gib:,.1f} GiB are free; give fewer tokens"
        )


def counts_by_kind(config: ModelConfig) -> dict[str, dict[str, int] | str]:
    """Count the parameters of every architecture at one shape.

    Args:
        config: the shape, ``vocab_size`` included; its options apply to its own architecture.

    Returns:
        The counts by kind, or a text that says why an architecture cannot have the shape.
    """
    counts: dict[str, dict[str, int] | str] = {}
    shape = {name: getattr(config, name) for name in _SHAPE}
    for kind, cls in MODEL_CONFIGS.items():
        try:
            counts[kind] = count_parameters(config if kind == config.kind else cls(**shape))
        except UserError as error:
            counts[kind] = str(error)
    return counts


def parameter_table(job: TrainJob) -> Table:
    """Return the table of counts of a composed ``diffx train`` job.

    Raises:
        UserError: the size of the vocabulary is known only once the tokenizer is loaded.
    """
    size, tokenizer = job.model.vocab_size, job.tokenizer
    if size is None and isinstance(tokenizer, BpeTokenizer):
        size = tokenizer.vocab_size
    elif size is None and tokenizer.kind == "bytes":
        size = 257
    if size is None:
        raise UserError(
            f"model.vocab_size=null cannot be used with tokenizer={tokenizer.kind}: give the "
            "number, such as 100288"
        )
    return counts_table(dataclasses.replace(job.model, vocab_size=size))


def counts_table(config: ModelConfig) -> Table:
    """Return the table of counts of every architecture at one shape; ``*`` marks the config's."""
    rows = []
    for kind, count in counts_by_kind(config).items():
        cells = ["-", "-", count]
        if isinstance(count, dict):
            cells = [f"{count[part]:,}" for part in ("total", "embedding", "rest")]
        rows.append([f"{kind} *" if kind == config.kind else kind, *cells])
    title = (
        f"Parameters at D={config.hidden_size}, {config.num_layers} layers, H={config.num_heads}, "
        f"H_kv={config.num_kv_heads}, FFN {config.ffn_size}, vocabulary {config.vocab_size}"
    )
    return make_table(title, ["model", "total", "embedding", "rest"], rows)
