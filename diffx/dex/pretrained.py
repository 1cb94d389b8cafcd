"""A pretrained causal model of ``transformers`` with its tokenizer, from the hub or a folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffx.config import UserError
from diffx.data.sources import reason
from diffx.data.tokenizers import FastTokenizer


@dataclass
class Pretrained:
    """A model and what is known of it.

    Attributes:
        model: in evaluation mode.
        tokenizer: the one that came with it.
        name: the hub's name, or the folder's.
        fingerprint: the hub's commit; of a folder SHA-256 of the weights.
        limit: tokens it can read at once; None if its config does not say.
        prefix: tokens that every text begins with.
        ends: tokens that end a text.
        dtype: of the weights.
    """

    model: Any
    tokenizer: FastTokenizer
    name: str
    fingerprint: str
    limit: int | None
    prefix: list[int]
    ends: set[int]
    dtype: torch.dtype


def load_pretrained(
    key: str, spec: str, dtype: torch.dtype | str, device: torch.device, revision: str | None = None, trust_remote_code: bool = False
) -> Pretrained:
    """Load a causal model whose weights are safetensors.

    Args:
        key: what the user set, for messages: ``checkpoint`` or ``base``.
        spec: a hub name or a folder.
        dtype: of the weights; ``auto`` is the checkpoint's own.
        device: where it goes.
        revision: the hub's revision.
        trust_remote_code: run Python code that comes with it.

    Raises:
        UserError: it cannot be found, reached or used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # slow to import
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(spec, dtype=dtype, use_safetensors=True, **options)
        pretrained: Any = AutoTokenizer.from_pretrained(spec, **options)
    except Exception as error:  # any library below may fail here, each with an exception of its own
        runs = "a run (runs/x, runs/x@best, runs/x@1000), " if key == "checkpoint" else ""
        raise UserError(
            f"{key}={spec} cannot be used: {reason(error)}; accepted: {runs}a folder with a Hugging Face model in safetensors, or a hub "
            "name that can be reached"
        ) from error
    if not pretrained.is_fast or pretrained.eos_token is None:
        raise UserError(f"{key}={spec} cannot be used: its tokenizer must have a tokenizer.json and an end-of-text token")
    first, bos = pretrained("a")["input_ids"][0], pretrained.bos_token_id
    tokenizer = FastTokenizer("hf", pretrained.backend_tokenizer, pretrained.eos_token, pretrained)
    entries = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > entries:
        raise UserError(f"{key}={spec} cannot be used: its tokenizer has {tokenizer.vocab_size} entries and the model {entries}")
    ends = getattr(model.generation_config, "eos_token_id", None)
    commit, folder = getattr(model.config, "_commit_hash", None), Path(spec)
    return Pretrained(
        model.to(device).eval(),
        tokenizer,
        name=folder.resolve().name if folder.is_dir() else spec,
        fingerprint=commit if commit and not folder.is_dir() else _weights_hash(model),
        limit=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        prefix=[bos] if bos is not None and first == bos else [],
        ends={tokenizer.eot_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])},
        dtype=model.dtype,
    )


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
