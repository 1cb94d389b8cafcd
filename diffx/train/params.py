"""Parameter counts of the architectures side by side, on the meta device."""

import dataclasses
from typing import Any

import torch
from rich.table import Table

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.config.data import BpeTokenizer
from diffx.config.model import MODEL_CONFIGS, ModelConfig
from diffx.config.train import TrainJob
from diffx.console import make_table
from diffx.models import build_model


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count parameters as ``Decoder.num_parameters`` does; all layers have the same number."""
    with torch.device("meta"):
        one, two = (
            build_model(dataclasses.replace(config, num_layers=layers)).num_parameters()
            for layers in (1, 2)
        )
    return {part: one[part] + (config.num_layers - 1) * (two[part] - one[part]) for part in one}


def check_memory(job: TrainJob, processes: int, free: int) -> None:
    """Raise ``UserError`` for a model or a batch whose lower bound of memory does not fit.

    The processes share weights, gradients, moments and the batch; each has ``free`` bytes.
    """
    model, recipe, gib = job.model, job.train, 2**30
    # An unknown vocabulary counts as the smallest possible.
    known = dataclasses.replace(model, vocab_size=model.vocab_size or 257)
    total = count_parameters(known)["total"]
    weights = 16 * total // processes  # fp32: weights, gradients, two moments
    batch = int(recipe.batch_tokens) // processes
    tokens = min(batch, recipe.seq_len * (recipe.micro_batch_size or batch))
    # Token and target ids of the batch, and the input of every block for a micro-batch, which even
    # activation checkpointing keeps.
    step = 16 * batch + 2 * tokens * model.hidden_size * model.num_layers
    size, room = f"{weights / gib:,.1f}", f"{free / gib:,.1f} GiB are free"
    names = "hidden_size num_layers intermediate_size vocab_size"
    why = f"{total:,} parameters take {size} GiB with gradients and moments, and {room}"
    refuse(weights > free, _shown("model", model, names), f"{why}; choose a smaller model")
    names = "batch_tokens seq_len micro_batch_size"
    why = f"a step takes {step / gib:,.1f} GiB and more beside the model's {size}, and {room}"
    refuse(weights + step > free, _shown("train", recipe, names), f"{why}; give fewer tokens")


def _shown(group: str, config: Any, names: str) -> str:
    values = {name: getattr(config, name) for name in names.split()}
    return ", ".join(f"{group}.{name}={values[name]}" for name in values if values[name])


def parameter_table(job: TrainJob) -> Table:
    """Return ``counts_table`` of a job; ``UserError`` if the vocabulary's size is not known."""
    size, tokenizer = job.model.vocab_size, job.tokenizer
    if size is None:
        bpe = tokenizer.vocab_size if isinstance(tokenizer, BpeTokenizer) else None
        size = 257 if tokenizer.kind == "bytes" else bpe
    setting, why = f"tokenizer={tokenizer.kind}", "give the number, such as 100288"
    refuse(size is None, "model.vocab_size=null", why, setting)
    return counts_table(dataclasses.replace(job.model, vocab_size=size))


def counts_table(config: ModelConfig) -> Table:
    """Return the counts of every architecture at one shape; ``*`` marks the config's.

    An architecture that cannot have the shape has the reason in place of counts.
    """
    fields = [field.name for field in dataclasses.fields(ModelConfig) if field.name != "kind"]
    shape = {name: getattr(config, name) for name in fields}
    rows = []
    for kind, cls in MODEL_CONFIGS.items():
        try:
            count = count_parameters(config if kind == config.kind else cls(**shape))
            cells = [f"{count[part]:,}" for part in ("total", "embedding", "rest")]
        except UserError as error:
            cells = ["-", "-", str(error)]
        rows.append([f"{kind} *" if kind == config.kind else kind, *cells])
    title = (
        f"Parameters at D={config.hidden_size}, {config.num_layers} layers, H={config.num_heads}, "
        f"H_kv={config.num_kv_heads}, FFN {config.ffn_size}, vocabulary {config.vocab_size}"
    )
    return make_table(title, ["model", "total", "embedding", "rest"], rows)
