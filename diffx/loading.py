"""What ``checkpoint=`` means: a run folder, ``@best`` or ``@STEP`` after it, becomes a model and its tokenizer."""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffx.config import UserError
from diffx.config.bridge import load_config
from diffx.config.train import Device, GenerateJob, TrainJob
from diffx.data.tokenizers import Tokenizer, load_tokenizer
from diffx.models import Decoder, build_model, generate
from diffx.train.checkpoint import WEIGHTS, find_checkpoint
from diffx.train.parallel import pick_device


@dataclass
class Loaded:
    """A trained model.

    Attributes:
        model: on its device, in evaluation mode.
        tokenizer: the run's own.
        job: the job that trained it.
        step: the checkpoint's step.
        run_dir: the run folder.
    """

    model: Decoder
    tokenizer: Tokenizer
    job: TrainJob
    step: int
    run_dir: Path


def load_run(spec: str, device: Device = Device.auto) -> Loaded:
    """Load ``runs/x`` (its newest checkpoint), ``runs/x@best`` or ``runs/x@1000``.

    Raises:
        UserError: there is no such run or checkpoint, or it is damaged.
    """
    where = pick_device(device)
    run_dir, folder = find_checkpoint(spec)
    job = load_config(run_dir / "config.yaml")
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    model = build_model(dataclasses.replace(job.model, vocab_size=job.model.vocab_size or tokenizer.vocab_size))
    model.load_state_dict(load_file(folder / WEIGHTS))
    return Loaded(model.to(where).eval(), tokenizer, job, int(folder.name.removeprefix("step_")), run_dir)


def generate_text(job: GenerateJob) -> None:
    """Print a prompt's continuation as it is drawn (``diffx generate``).

    Raises:
        UserError: the checkpoint or the prompt cannot be used.
    """
    prompt = _prompt(job)
    loaded = load_run(job.checkpoint, job.device)
    sys.stdout.write(prompt)
    for piece in stream(loaded, prompt, job):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def stream(loaded: Loaded, prompt: str, job: GenerateJob) -> Iterator[str]:
    """Yield the continuation piece by piece; a character is held back until all of its bytes are drawn."""
    tokenizer = loaded.tokenizer
    device = next(loaded.model.parameters()).device
    inputs = torch.tensor([[tokenizer.eot_id, *tokenizer.encode(prompt)]], device=device)
    drawn: list[int] = []
    shown = ""
    for token in generate(
        loaded.model,
        inputs,
        max_tokens=job.max_tokens,
        temperature=job.temperature,
        top_k=job.top_k,
        top_p=job.top_p,
        seed=job.seed,
        eot_id=tokenizer.eot_id,
    ):
        drawn.append(token)
        text = tokenizer.decode(drawn)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(drawn)[len(shown) :]


def _prompt(job: GenerateJob) -> str:
    if job.prompt == "-":
        return sys.stdin.read()
    if job.prompt_file is None:
        return job.prompt
    try:
        return Path(job.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file={job.prompt_file} cannot be used: {error}; it must be a UTF-8 text file") from error
