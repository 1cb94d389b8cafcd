"""``diffx export``: a run as an ordinary model of Hugging Face."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from diffx.config import RunError
from diffx.config.checks import refuse
from diffx.config.eval import Dtype, ExportJob
from diffx.config.train import Device
from diffx.console import Reporter
from diffx.dex.attach import fold
from diffx.dex.registered import to_dex
from diffx.errors import storage_errors
from diffx.files import locked, read_json, replacing_folder
from diffx.hub.card import CARD, export_usage, training_card
from diffx.hub.convert import to_diffllama, to_llama
from diffx.hub.registered import to_diffx
from diffx.loading import DTYPES, Loaded, load_run, write_origin

_CLOSE = 1e-5  # relative; of fp32 logits before and after, which differ by rounding alone


def export(job: ExportJob) -> Path:
    """Write the model of a run, its tokenizer and a model card for ``AutoModelForCausalLM``.

    ``transformer`` becomes a Llama and ``diff_v1`` a DiffLlama where that is the same function; the
    others need ``import diffx``. An adapted run is folded in fp64, or keeps its branch.

    Raises:
        UserError: the checkpoint cannot be used.
        RunError: the exported model gives other logits.
    """
    out = Path(job.out).expanduser()
    loaded = load_run(job.checkpoint, Device.cpu, trust_remote_code=job.trust_remote_code)
    model: Any
    model, error = to_transformers(loaded, job.fold)
    if job.dtype is not Dtype.auto:
        model.to(DTYPES[job.dtype])
    needs_diffx = model.config.model_type.startswith("diffx")
    with new_model_folder(out, "out") as folder:
        write_pretrained(model, loaded, folder)
        assert loaded.job is not None  # load_run gave it
        summary, base = loaded.folder / "summary.json", loaded.folder / "base.json"
        training_card(
            loaded.job,
            out.name,
            loaded.step,
            read_json(summary) if summary.exists() else {},
            export_usage(out.name, needs_diffx),
            base=read_json(base, {"name": str})["name"] if base.exists() else None,
            parameters=model.num_parameters(),
            library="diffx" if needs_diffx else "transformers",
        ).save(folder / CARD)
    needs = " (load it after `import diffx`)" if needs_diffx else ""
    differ = f"its logits differ from the run's by {error:.1e} of their norm"
    Reporter().line(f"{type(model).__name__} in {out}{needs}; {differ}")
    return out


def to_transformers(loaded: Loaded, fold_branch: bool = True) -> tuple[PreTrainedModel, float]:
    """Convert the model of a run, in place and on the CPU, to one of ``transformers``.

    Returns:
        The model, and the difference of its logits from the run's, relative to their norm.

    Raises:
        UserError: there is no branch to keep.
        RunError: the logits differ by more than rounding.
    """
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(loaded.tokenizer.vocab_size, (1, 16), generator=random)
    before = _logits(loaded.model, ids)
    model = _convert(loaded, fold_branch)
    error = float((_logits(model, ids) - before).norm() / before.norm())
    if not error < _CLOSE:
        differ = f"the exported logits differ from the run's by {error:.2g} of their norm"
        raise RunError(f"{differ}: this is a defect, and nothing was written")
    model.generation_config.eos_token_id = sorted(loaded.ends)
    model.config.eos_token_id = loaded.tokenizer.eot_id
    if loaded.adapted is None:  # an adapted model has these from its base
        model.config.max_position_embeddings = loaded.context
        model.config.bos_token_id = model.generation_config.bos_token_id = loaded.tokenizer.eot_id
    return model, error


def write_pretrained(model: PreTrainedModel, loaded: Loaded, folder: Path) -> None:
    """Write a model with the tokenizer and the origin of ``loaded`` into a folder."""
    disable_progress_bar()
    model.save_pretrained(folder)
    loaded.tokenizer.save(folder, begin=loaded.adapted is None)
    write_origin(loaded, folder)


@contextmanager
def new_model_folder(out: Path, key: str) -> Iterator[Path]:
    """Give a temporary folder that becomes ``out``, which messages call ``key``, under a lock.

    Raises:
        UserError: another process is writing ``out``.
        RunError: it cannot be written.
    """
    with storage_errors(f"{key}={out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.lock")
        with locked(lock, f"{key}={out}"), replacing_folder(out) as folder:
            yield folder


def _convert(loaded: Loaded, fold_branch: bool) -> Any:
    if loaded.adapted is not None:
        keep_branch = bool(loaded.adapted.branches) and not fold_branch
        model = fold(loaded.adapted, keep_branch)
        return to_dex(loaded.adapted, loaded.step) if keep_branch else model
    missing = f"{loaded.folder} is no adapted run and has no branch"
    refuse(not fold_branch, "fold=false", missing)
    convert = to_llama if loaded.model.config.kind == "transformer" else to_diffllama
    try:
        return convert(loaded.model)
    except ValueError:  # not a form of Llama or DiffLlama
        return to_diffx(loaded.model)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    output = model(ids)
    return (output if isinstance(output, Tensor) else output.logits).double()
