"""Model cards: the README.md of what is exported or pushed."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from diffx.config.data import DataConfig, HubData
from diffx.config.dex import AdaptJob
from diffx.config.train import TrainJob

CARD = "README.md"
_SHAPE = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")


def export_usage(name: str, needs_diffx: bool) -> str:
    """The lines that load an exported model."""
    first = "import diffx  # registers the model's class\n" if needs_diffx else ""
    return f"""{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""


def adapter_usage(base: str) -> str:
    """The lines that load an adapter on its base."""
    return f"""from diffx.dex import load_adapter

adapters = load_adapter("{base}", "FOLDER or REPOSITORY")  # the base, then this adapter
adapters.model.generate(...)
with adapters.disabled():  # the base as it was
    ..."""


def training_card(
    job: TrainJob | AdaptJob,
    name: str,
    step: int,
    summary: dict[str, Any],
    usage: str,
    *,
    base: str | None = None,
    parameters: int | None = None,
    library: str = "diffx",
) -> ModelCard:
    """Describe the model called ``name`` of a run, at ``step``, adapted from ``base`` or trained.

    ``summary`` is that of the run, or empty. ``usage`` is code that loads the model by ``library``.
    ``parameters`` is their number; None takes it from the summary.
    """
    counts, license_name = summary.get("parameters", {}), None
    if isinstance(job, AdaptJob):
        variant, license_name = job.dex.variant.value, _license(job.base, job.revision)
        architecture = f"{base} with DEX, variant {variant}"
    else:
        variant = job.model.kind
        sizes = {key: getattr(job.model, key) for key in _SHAPE}
        shape = ", ".join(f"{key} {size}" for key, size in sizes.items() if size is not None)
        architecture = f"{variant}: {shape}"
    losses = summary if summary.get("step") == step else {}
    if not losses and summary.get("best/step") == step:
        losses = {"val/loss": summary.get("best/val/loss")}
    rows = {
        "parameters": parameters or counts.get("total"),
        "architecture": architecture,
        "trained parameters": counts.get("trained"),  # of an adapted run
        "training text": _data_name(job.data),
        "steps": step,
        "tokens": step * int(job.train.batch_tokens),
        "sequence length": job.train.seq_len,
        "seed": job.seed,
        "held-out loss, nats a token": losses.get("val/loss"),
        "held-out bits per byte": losses.get("val/bpb"),
        "held-out loss of the base": losses.get("base/val/loss"),
    }
    public = isinstance(job.data, HubData) and not _is_local(job.data.name)
    facts: dict[str, Any] = {"base_model": base, "library_name": library, "license": license_name}
    facts["datasets"] = [getattr(job.data, "name", "")] if public else None
    tags = ["diffx", "differential-attention", variant]
    data = ModelCardData(pipeline_tag="text-generation", tags=tags, **facts)
    formats = {int: "{:,}", float: "{:.4f}"}
    table = "\n".join(
        f"| {key} | {formats.get(type(value), '{}').format(value)} |"
        for key, value in rows.items()
        if value is not None
    )
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {name}

Made with diffx {version("diffx")}.

| | |
|---|---|
{table}

## How to load

```python
{usage}
```
"""
    )


def _data_name(data: DataConfig) -> str:
    """The text by name, without the folder of a local file."""
    if data.kind == "stdlib":
        return "the source code of Python's standard library"
    names: Any = getattr(data, "name", None) or getattr(data, "path", None) or []
    if data.kind == "hub" and not _is_local(names):
        return f"hub {names}"
    names = [names] if isinstance(names, str) else names
    return " ".join([data.kind, *(Path(name).name for name in names)])


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or Path(name).exists()


def _license(base: str, revision: str | None) -> str | None:
    """The license in the model card of a base that is a folder or in the hub's cache."""
    local = Path(base).is_dir()
    path: Any = Path(base, CARD) if local else try_to_load_from_cache(base, CARD, revision=revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    license_name = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict().get("license")
    return license_name if isinstance(license_name, str) else None
