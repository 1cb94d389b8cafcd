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
from diffx.config.checks import refuse
from diffx.data.hub import asking_hub
from diffx.data.tokenizers import FastTokenizer
from diffx.dex.layout import quiet
from diffx.errors import reason
from diffx.files import sha256
from diffx.hub.configs import DexModelConfig


@dataclass
class Pretrained:
    """A model in evaluation mode, its tokenizer and its properties."""

    model: Any
    tokenizer: FastTokenizer
    name: str  # on the hub, or of the folder
    fingerprint: str  # commit on the hub; for a folder SHA-256 of its weight files
    limit: int | None  # context length in tokens, if the config gives it
    prefix: list[int]  # tokens at the start of every text
    ends: set[int]  # tokens that end a text
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
    """Load a causal language model, by hub name or folder, whose weights are safetensors.

    ``key`` is the option that messages name, ``checkpoint`` or ``base``; the ``dtype`` ``auto`` is
    that of the files. Python code of the model is run with ``trust_remote_code`` only.

    Raises:
        UserError: the model cannot be found, reached or used, or does not fit in memory.
    """
    disable_progress_bar()
    setting, folder = f"{key}={spec}", Path(spec)
    is_run = (folder / "config.yaml").is_file() and not (folder / "config.json").is_file()
    export = f"it is a run folder; `diffx export checkpoint={spec} out=FOLDER` makes a model of it"
    refuse(key == "base" and is_run, setting, export)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    of_weights = options | {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if quantization:  # formats of few bits depend on the device, so the weights are quantized there
        of_weights |= {"quantization_config": quantization, "device_map": {"": device}}
    try:
        with quiet(), asking_hub(spec):
            config = AutoConfig.from_pretrained(spec, **options)
            _check(key, setting, config, dtype, device, trust_remote_code)
            loaded: Any = AutoModelForCausalLM.from_pretrained(spec, **of_weights)
            pretrained: Any = AutoTokenizer.from_pretrained(spec, **options)
    except UserError:
        raise
    except Exception as error:  # every library called here raises its own exceptions
        runs = "a run (runs/x, runs/x@best, runs/x@1000), " if key == "checkpoint" else ""
        missing = f"there is no folder {spec} here, and from the hub it cannot be loaded: "
        why = (
            f"{'' if folder.is_dir() else missing}{reason(error)}; accepted: {runs}a folder with a "
            "Hugging Face model in safetensors, or a hub name that can be reached"
        )
        if not trust_remote_code and "trust_remote_code" in str(error):
            why = "it needs its Python code; read that code, and add trust_remote_code=true"
        raise UserError(f"{setting} cannot be used: {why}") from error
    model, report = loaded
    missing_weight = min(report["missing_keys"], default="")
    refuse(
        bool(missing_weight), setting, f"its files lack {missing_weight} of {type(model).__name__}"
    )
    usable = pretrained.is_fast and pretrained.eos_token is not None
    accepted = "its tokenizer must have a tokenizer.json and an end-of-text token"
    refuse(not usable, setting, accepted)
    # Before FastTokenizer, which shares its backend: each call has special tokens parsed again.
    first, bos = pretrained("a")["input_ids"][0], pretrained.bos_token_id
    tokenizer = FastTokenizer("hf", pretrained.backend_tokenizer, pretrained.eos_token, pretrained)
    size, entries = tokenizer.vocab_size, model.get_input_embeddings().weight.shape[0]
    refuse(size > entries, setting, f"its tokenizer has {size} entries and the model {entries}")
    model = model.to(device).eval()
    later = "it is no causal language model: its logits depend on later tokens"
    refuse(not _is_causal(model), setting, later)
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [tokenizer.eot_id if ends is None else ends]
    if folder.is_dir():
        name, fingerprint = folder.resolve().name, _weights_hash(folder)
    else:  # the commit names a folder in the cache
        cached = try_to_load_from_cache(spec, "config.json", revision=revision)
        name, fingerprint = spec, Path(str(cached)).parent.name
    return Pretrained(
        model,
        tokenizer,
        name=name,
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


def _weights_hash(folder: Path) -> str:
    paths = sorted(folder.glob("*.safetensors"))
    return sha256(*(content for path in paths for content in (path.name, path)))


def free_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _check(
    key: str, setting: str, config: Any, dtype: Any, device: torch.device, trusted: bool
) -> None:
    """Refuse a model by its kind, branch or size before its weights are read."""
    custom_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    other = type(config) not in AutoModelForCausalLM._model_mapping and not custom_class
    why = (
        f"a {config.model_type} is no causal language model; accepted: any of AutoModelForCausalLM"
    )
    refuse(other, setting, why)
    why = "it is adapted already and keeps its branch; give its export with fold=true, or its base"
    refuse(key == "base" and isinstance(config, DexModelConfig), setting, why)
    with torch.device("meta"):
        shape: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    weights_dtype = (config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    needed = sum(parameter.numel() for parameter in shape.parameters()) * weights_dtype.itemsize
    free, option = free_memory(device), "train.precision" if key == "base" else "dtype"
    half = f"{option}=bf16 (half of it) or " if weights_dtype is torch.float32 else ""
    why = f"its weights need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
    too_large = needed > free and not hasattr(config, "quantization_config")
    refuse(too_large, setting, f"{why}; take {half}a smaller model")


@torch.no_grad()
def _is_causal(model: nn.Module) -> bool:
    """Whether the third token leaves earlier logits equal; some encoders load as causal models."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]], device=next(model.parameters()).device)
    first, second = model(input_ids=ids, use_cache=False).logits[:, :2].float()
    return bool((first - second).abs().max() <= 1e-3 * first.abs().max())
