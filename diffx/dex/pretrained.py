"""A pretrained causal model of ``transformers`` with its tokenizer, from the hub or a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from transformers.utils.quantization_config import QuantizationConfigMixin

from diffx.config import UserError
from diffx.data.hub import asking_hub
from diffx.data.tokenizers import FastTokenizer
from diffx.dex.layout import quiet
from diffx.errors import reason
from diffx.files import sha256
from diffx.hub.configs import DexModelConfig


@dataclass
class Pretrained:
    """A model in evaluation mode, its tokenizer and its properties.

    Attributes:
        name: name on the hub, or of the folder.
        fingerprint: commit on the hub; for a folder SHA-256 of its weight files.
        limit: context length in tokens; None if the config does not give it.
        prefix: tokens at the start of every text.
        ends: tokens that end a text.
        dtype: type of the weights.
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
    key: str,
    spec: str,
    dtype: torch.dtype | str,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: QuantizationConfigMixin | None = None,
) -> Pretrained:
    """Load a causal language model whose weights are safetensors.

    Args:
        key: the option for messages: ``checkpoint`` or ``base``.
        spec: a hub name or a folder.
        dtype: type of the weights; ``auto`` is that of the checkpoint.
        device: device of the model.
        revision: revision on the hub.
        trust_remote_code: run Python code of the model, which is refused otherwise.
        quantization: quantization while the model is loaded.

    Raises:
        UserError: the model cannot be found, reached or used, or does not fit in memory.
    """
    disable_progress_bar()
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    # formats of few bits depend on the device, so the weights are quantized there
    placement: dict[str, Any] = {}
    if quantization:
        placement = {"quantization_config": quantization, "device_map": {"": device}}
    refused, folder = f"{key}={spec} cannot be used", Path(spec)
    is_model = (folder / "config.json").is_file()
    if key == "base" and (folder / "config.yaml").is_file() and not is_model:
        raise UserError(
            f"{refused}: it is a run folder; `diffx export checkpoint={spec} out=FOLDER` makes a "
            "model of it"
        )
    try:
        with quiet(), asking_hub(spec):
            config = AutoConfig.from_pretrained(spec, **options)
            if why := _check(key, config, dtype, device, trust_remote_code):
                raise UserError(f"{refused}: {why}")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                spec,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
                **placement,
            )
            pretrained: Any = AutoTokenizer.from_pretrained(spec, **options)
    except UserError:
        raise
    except Exception as error:  # every library called here raises its own exceptions
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(
                f"{refused}: it needs Python code that comes with it; read that code, and add "
                "trust_remote_code=true to run it"
            ) from error
        runs = "a run (runs/x, runs/x@best, runs/x@1000), " if key == "checkpoint" else ""
        missing = f"there is no folder {spec} here, and from the hub it cannot be loaded: "
        raise UserError(
            f"{refused}: {'' if folder.is_dir() else missing}{reason(error)}; accepted: {runs}a "
            "folder with a Hugging Face model in safetensors, or a hub name that can be reached"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        raise UserError(
            f"{refused}: its files lack {min(report['missing_keys'])} of {type(model).__name__}"
        )
    if not pretrained.is_fast or pretrained.eos_token is None:
        raise UserError(
            f"{refused}: its tokenizer must have a tokenizer.json and an end-of-text token"
        )
    first, bos = pretrained("a")["input_ids"][0], pretrained.bos_token_id
    tokenizer = FastTokenizer("hf", pretrained.backend_tokenizer, pretrained.eos_token, pretrained)
    entries = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > entries:
        raise UserError(
            f"{refused}: its tokenizer has {tokenizer.vocab_size} entries and the model {entries}"
        )
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [tokenizer.eot_id if ends is None else ends]
    model = model.to(device).eval()
    if not _is_causal(model):
        raise UserError(
            f"{refused}: it is no causal language model: its logits depend on later tokens"
        )
    if folder.is_dir():
        fingerprint = _weights_hash(folder)
    else:  # the commit names a folder in the cache
        cached = try_to_load_from_cache(spec, "config.json", revision=revision)
        fingerprint = Path(str(cached)).parent.name
    return Pretrained(
        model,
        tokenizer,
        name=folder.resolve().name if folder.is_dir() else spec,
        fingerprint=fingerprint,
        limit=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        prefix=[bos] if bos is not None and first == bos else [],
        ends={tokenizer.eot_id, *ends},
        dtype=model.dtype,
    )


def fingerprint_of(model: PreTrainedModel) -> str | None:
    """``Pretrained.fingerprint`` of a model of ``transformers``; None for unknown origin."""
    if (name := model.name_or_path) and Path(name).is_dir():
        return _weights_hash(Path(name))
    return getattr(model.config, "_commit_hash", None)


def free_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _check(
    key: str, config: Any, dtype: torch.dtype | str, device: torch.device, trusted: bool
) -> str | None:
    """The reason to refuse a model before its weights are read: kind, branch, size."""
    custom_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForCausalLM._model_mapping and not custom_class:
        return (
            f"a {config.model_type} is no causal language model; accepted: what "
            "AutoModelForCausalLM loads"
        )
    if key == "base" and isinstance(config, DexModelConfig):
        return (
            "it is adapted already and keeps its branch; give its export with fold=true, or its "
            "base"
        )
    with torch.device("meta"):
        shape: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    weights_dtype = (config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    needed = sum(parameter.numel() for parameter in shape.parameters()) * weights_dtype.itemsize
    if needed <= (free := free_memory(device)) or hasattr(config, "quantization_config"):
        return None
    half = f"{'train.precision' if key == 'base' else 'dtype'}=bf16 (half of it), "
    return (
        f"its weights need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; take "
        f"{half if weights_dtype is torch.float32 else ''}a smaller model, or a machine with more "
        "memory"
    )


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether the third token leaves earlier logits equal; some encoders load as causal models."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=next(model.parameters()).device)
    first, second = model(input_ids=ids, use_cache=False).logits[:, :2].float()
    return bool((first - second).abs().max() <= 1e-3 * first.abs().max())


def _weights_hash(folder: Path) -> str:
    paths = sorted(folder.glob("*.safetensors"))
    return sha256(*(content for path in paths for content in (path.name, path)))
