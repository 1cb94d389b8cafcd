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


def parameter_counts(config: ModelConfig) -> dict[str, dict[str, int] | str]:
    """Count the parameters of every architecture at one shape; a text says why an architecture cannot have it.

    Args:
        config: the shape, ``vocab_size`` included; its own options count for its own architecture.
    """
    counts: dict[str, dict[str, int] | str] = {}
    shape = {name: getattr(config, name) for name in _SHAPE}
    for kind, cls in MODEL_CONFIGS.items():
        try:
            with torch.device("meta"):
                counts[kind] = build_model(config if kind == config.kind else cls(**shape)).num_parameters()
        except UserError as error:
            counts[kind] = str(error)
    return counts


def parameter_table(job: TrainJob) -> Table:
    """Draw the counts of a composed ``diffx train`` job.

    Raises:
        UserError: the vocabulary's size is known only once the tokenizer is loaded.
    """
    size = job.model.vocab_size
    if size is None:
        size = {"bpe": job.tokenizer.vocab_size if isinstance(job.tokenizer, BpeTokenizer) else 0, "bytes": 257}.get(job.tokenizer.kind)
    if size is None:
        raise UserError(f"model.vocab_size=null cannot be used with tokenizer={job.tokenizer.kind}: give the number, such as 100288")
    return counts_table(dataclasses.replace(job.model, vocab_size=size))


def counts_table(config: ModelConfig) -> Table:
    """Draw the counts of every architecture at the shape of ``config``, its own marked."""
    rows = []
    for kind, count in parameter_counts(config).items():
        name = f"{kind} *" if kind == config.kind else kind
        rows.append(
            [name, *((f"{count[part]:,}" for part in ("total", "embedding", "rest")) if isinstance(count, dict) else ("-", "-", count))]
        )
    title = (
        f"Parameters at D={config.hidden_size}, {config.num_layers} layers, H={config.num_heads}, H_kv={config.num_kv_heads}, "
        f"FFN {config.ffn_size}, vocabulary {config.vocab_size}"
    )
    return make_table(title, ["model", "total", "embedding", "rest"], rows)
