"""Loading of ``checkpoint=``: a run folder, with ``@best`` or ``@STEP``, or a pretrained model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffx.config import UserError
from diffx.config.bridge import from_plain, load_config, to_plain
from diffx.config.data import DATA_CONFIGS, DataConfig
from diffx.config.dex import AdaptJob
from diffx.config.eval import Dtype
from diffx.config.model import ModelConfig
from diffx.config.train import Device, TrainJob
from diffx.data.tokenizers import Tokenizer, load_tokenizer
from diffx.dex.attach import Adapted
from diffx.dex.pretrained import Pretrained, load_pretrained
from diffx.files import read_json, write_json
from diffx.hub.configs import DiffxConfig
from diffx.models import build_model
from diffx.train.adapt import restore
from diffx.train.checkpoint import (
    WEIGHTS,
    find_checkpoint,
    read_state,
    read_tensors,
    trained_shapes,
)
from diffx.train.parallel import pick_device

DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}
_ORIGIN = "diffx.json"


@dataclass
class Loaded:
    """A model and its properties.

    Attributes:
        model: a ``Decoder`` or a model of ``transformers``, on its device, in evaluation mode.
        tokenizer: of the run or of the pretrained model.
        name: for tables.
        fingerprint: SHA-256 of the weights, or the hub's commit.
        folder: the run folder, or ``runs/hub/<name>@<revision>``.
        step: the checkpoint's step; 0 for a pretrained model.
        context: tokens of a training sequence.
        limit: tokens it can read at once; ``None`` for the rotary positions of ``Decoder``.
        prefix: tokens that every text begins with.
        ends: tokens that end a text.
        job: the job of the run; ``None`` for a pretrained model.
        data: its training text, if known.
        adapted: the variant in the model of an adapted run.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    fingerprint: str
    folder: Path
    step: int
    context: int
    limit: int | None
    prefix: list[int]
    ends: set[int]
    job: TrainJob | AdaptJob | None = None
    data: DataConfig | None = None
    adapted: Adapted | None = None

    @property
    def architecture(self) -> str:
        """``model=`` of a run; else the type in ``transformers``, with the variant if adapted."""
        config = self.model.config
        if isinstance(config, ModelConfig | DiffxConfig):
            return config.kind
        variant = f"+{self.job.dex.variant.value}" if isinstance(self.job, AdaptJob) else ""
        return f"{config.model_type}{variant}"


def load(
    spec: str,
    device: Device = Device.auto,
    dtype: Dtype = Dtype.auto,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a run as ``load_run`` does, or a model of ``transformers`` by hub name or folder.

    ``trust_remote_code`` runs Python code that comes with the model.

    Raises:
        UserError: there is no such run, checkpoint or model, or it cannot be used.
    """
    if _names_run(spec):
        return load_run(spec, device, dtype, trust_remote_code)
    where = pick_device(device)
    weights = _resolve(dtype, where)
    base = load_pretrained("checkpoint", spec, weights, where, revision, trust_remote_code)
    name = f"{base.name}@{(revision or base.fingerprint)[:12]}".replace("/", "--")
    common = {"model": base.model, "name": base.name, "fingerprint": base.fingerprint, "step": 0}
    return _of_pretrained(base, common | {"folder": Path("runs/hub") / name} | _origin(Path(spec)))


def load_run(
    spec: str,
    device: Device = Device.auto,
    dtype: Dtype = Dtype.auto,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load ``runs/x`` (its newest checkpoint), ``runs/x@best`` or ``runs/x@1000``.

    Code of the base of an adapted run needs the argument ``trust_remote_code``; the run's config
    cannot allow it.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    where = pick_device(device)
    run_dir, folder = find_checkpoint(spec)
    job = load_config(run_dir / "config.yaml")
    common = {
        "name": run_dir.resolve().name,
        "fingerprint": read_state(folder)["sha256"][WEIGHTS],
        "folder": run_dir,
        "step": int(folder.name.removeprefix("step_")),
        "job": job,
        "data": job.data,
    }
    if isinstance(job, AdaptJob):
        weights = _resolve(dtype, where)
        base, adapted = restore(run_dir, folder, job, where, weights, trust_remote_code)
        return _of_pretrained(base, common | {"model": adapted.model.eval(), "adapted": adapted})
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    vocab_size = job.model.vocab_size or tokenizer.vocab_size
    model = build_model(dataclasses.replace(job.model, vocab_size=vocab_size))
    model.load_state_dict(read_tensors(folder / WEIGHTS, trained_shapes(model)))
    return Loaded(
        model.to(where, DTYPES.get(dtype)).eval(),
        tokenizer,
        context=job.train.seq_len,
        limit=None,
        prefix=[tokenizer.eot_id],
        ends={tokenizer.eot_id},
        **common,
    )


def _of_pretrained(base: Pretrained, fields: dict[str, Any]) -> Loaded:
    common = {name: getattr(base, name) for name in ("tokenizer", "limit", "prefix", "ends")}
    return Loaded(**common | {"context": base.limit or 2048} | fields)


def _names_run(spec: str) -> bool:
    path = Path(spec.rpartition("@")[0] if "@" in spec and not Path(spec).exists() else spec)
    if path.is_dir():
        return not (path / "config.json").is_file()
    in_folder = len(path.parts) > 1 and path.parent.is_dir()
    return path.is_absolute() or path.parts[:1] == ("runs",) or in_folder


def write_origin(loaded: Loaded, folder: Path) -> None:
    """Write the properties of an exported model that its config does not have."""
    saved = {name: getattr(loaded, name) for name in ("prefix", "context", "limit")}
    write_json(folder / _ORIGIN, saved | {"data": to_plain(loaded.data)})


def _origin(folder: Path) -> dict[str, Any]:
    """The fields of ``Loaded`` that ``write_origin`` wrote into a folder, if it did."""
    path = folder / _ORIGIN
    if not path.is_file():
        return {}
    try:
        saved = read_json(path)
        limit, data = saved["limit"], saved["data"]
        return {
            "prefix": [int(token) for token in saved["prefix"]],
            "context": int(saved["context"]),
            "limit": None if limit is None else int(limit),
            "data": None if data is None else from_plain(DATA_CONFIGS[data["kind"]], data),
        }
    except (ValueError, KeyError, TypeError) as error:
        problem = "it is damaged or of another version; export the model again"
        raise UserError(f"{path} cannot be used: {problem}") from error


def _resolve(dtype: Dtype, device: torch.device) -> torch.dtype | str:
    """Return the type to load: ``dtype``, or for ``auto`` the model's, on a CPU fp32."""
    return DTYPES.get(dtype, torch.float32 if device.type == "cpu" else "auto")
