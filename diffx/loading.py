"""What ``checkpoint=`` means: a run folder, ``@best`` or ``@STEP`` after it, or a model of the Hugging Face hub, by name or folder."""

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
from diffx.config.train import Device, TrainJob
from diffx.data.tokenizers import Tokenizer, load_tokenizer
from diffx.dex.attach import Adapted
from diffx.dex.pretrained import load_pretrained
from diffx.files import read_json, write_json
from diffx.models import build_model
from diffx.train.adapt import restore
from diffx.train.checkpoint import WEIGHTS, find_checkpoint, read_state, read_tensors, trained_shapes
from diffx.train.parallel import pick_device

DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}
_ORIGIN = "diffx.json"


@dataclass
class Loaded:
    """A model and what is known of it.

    Attributes:
        model: on its device, in evaluation mode: our decoder, or one of ``transformers``.
        tokenizer: the run's own, or the one that came with the model.
        name: for tables.
        fingerprint: SHA-256 of its weights, or the hub's commit.
        folder: the run folder, or ``runs/hub/<name>@<revision>``.
        step: the checkpoint's step; 0 for a model that is no run.
        context: tokens it was trained to read at once.
        limit: tokens it can read at once; None for rotary positions of ours, which have no end.
        prefix: tokens that every text begins with.
        ends: tokens that end a text.
        job: the job that trained or adapted it; None for a model that is no run.
        data: the text that it was trained on, where that is known: of a run, of its export and of what was quantized of it.
        adapted: of an adapted run, what was put into the model.
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


def load(
    spec: str, device: Device = Device.auto, dtype: Dtype = Dtype.auto, revision: str | None = None, trust_remote_code: bool = False
) -> Loaded:
    """Load ``runs/x`` (its newest checkpoint), ``runs/x@best``, ``runs/x@1000``, or a model of ``transformers`` by hub name or folder.

    Raises:
        UserError: there is no such run, checkpoint or model, or it cannot be used.
    """
    if not _names_run(spec):
        return _load_pretrained(spec, device, dtype, revision, trust_remote_code)
    return load_run(spec, device, dtype, trust_remote_code)


def load_run(spec: str, device: Device = Device.auto, dtype: Dtype = Dtype.auto, trust_remote_code: bool = False) -> Loaded:
    """Load ``runs/x`` (its newest checkpoint), ``runs/x@best`` or ``runs/x@1000``.

    Only the argument ``trust_remote_code`` lets code run that comes with the base of an adapted run, not what its config says.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    where = pick_device(device)
    run_dir, folder = find_checkpoint(spec)
    job = load_config(run_dir / "config.yaml")
    if isinstance(job, AdaptJob):
        return _load_adapted(run_dir, folder, job, where, dtype, trust_remote_code)
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    model = build_model(dataclasses.replace(job.model, vocab_size=job.model.vocab_size or tokenizer.vocab_size))
    model.load_state_dict(read_tensors(folder / WEIGHTS, trained_shapes(model)))
    return Loaded(
        model.to(where, DTYPES.get(dtype)).eval(),
        tokenizer,
        name=run_dir.resolve().name,
        fingerprint=read_state(folder)["sha256"][WEIGHTS],
        folder=run_dir,
        step=int(folder.name.removeprefix("step_")),
        context=job.train.seq_len,
        limit=None,
        prefix=[tokenizer.eot_id],
        ends={tokenizer.eot_id},
        job=job,
        data=job.data,
    )


def _load_adapted(run_dir: Path, folder: Path, job: AdaptJob, where: torch.device, dtype: Dtype, trust_remote_code: bool) -> Loaded:
    base, adapted = restore(run_dir, folder, job, where, _wanted(dtype, where), trust_remote_code)
    return Loaded(
        adapted.model.eval(),
        base.tokenizer,
        name=run_dir.resolve().name,
        fingerprint=read_state(folder)["sha256"][WEIGHTS],
        folder=run_dir,
        step=int(folder.name.removeprefix("step_")),
        context=base.limit or 2048,
        limit=base.limit,
        prefix=base.prefix,
        ends=base.ends,
        job=job,
        data=job.data,
        adapted=adapted,
    )


def _names_run(spec: str) -> bool:
    path = Path(spec.rpartition("@")[0] if "@" in spec and not Path(spec).exists() else spec)
    if path.is_dir():
        return not (path / "config.json").is_file()
    return path.is_absolute() or path.parts[:1] == ("runs",) or (len(path.parts) > 1 and path.parent.is_dir())


def _load_pretrained(spec: str, device: Device, dtype: Dtype, revision: str | None, trust_remote_code: bool) -> Loaded:
    where = pick_device(device)
    found = load_pretrained("checkpoint", spec, _wanted(dtype, where), where, revision, trust_remote_code)
    loaded = Loaded(
        found.model,
        found.tokenizer,
        name=found.name,
        fingerprint=found.fingerprint,
        folder=Path("runs/hub") / f"{found.name.replace('/', '--')}@{(revision or found.fingerprint)[:12].replace('/', '--')}",
        step=0,
        context=found.limit or 2048,
        limit=found.limit,
        prefix=found.prefix,
        ends=found.ends,
    )
    return dataclasses.replace(loaded, **_origin(Path(spec)))


def write_origin(loaded: Loaded, folder: Path) -> None:
    """Write beside an exported model what its config cannot say: how its texts begin, how long they can be, what it was trained on."""
    saved = {"prefix": loaded.prefix, "context": loaded.context, "limit": loaded.limit, "data": to_plain(loaded.data)}
    write_json(folder / _ORIGIN, saved)


def _origin(folder: Path) -> dict[str, Any]:
    """The fields of ``Loaded`` that ``write_origin`` kept; none where it wrote nothing.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path = folder / _ORIGIN
    if not path.is_file():
        return {}
    try:
        saved = read_json(path)
        limit = saved["limit"]  # older exports lack it: their tokenizers begin no text
        found: dict[str, Any] = {"prefix": [int(token) for token in saved["prefix"]], "context": int(saved["context"])}
        found["limit"] = None if limit is None else int(limit)
        if (data := saved["data"]) is not None:
            found["data"] = from_plain(DATA_CONFIGS[data["kind"]], data)
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be used: it is damaged or of another version; export the model again") from error


def _wanted(dtype: Dtype, where: torch.device) -> torch.dtype | str:
    """The type to load a pretrained model in: what was asked for, else its own, or fp32 on a CPU."""
    return DTYPES.get(dtype, torch.float32 if where.type == "cpu" else "auto")
