"""``diffx generate``: a prompt's continuation, as it is drawn."""

import sys
from collections.abc import Iterator
from pathlib import Path

from diffx.config import UserError
from diffx.config.checks import MOST, require
from diffx.config.train import GenerateJob
from diffx.evaluation.model import LanguageModel
from diffx.loading import load


def generate_text(job: GenerateJob) -> None:
    """Print a prompt's continuation as it is drawn.

    Raises:
        UserError: the checkpoint or the prompt cannot be used.
    """
    prompt = _prompt(job)
    lm = LanguageModel(load(job.checkpoint, job.device, trust_remote_code=job.trust_remote_code))
    sys.stdout.write(prompt)
    for piece in stream(lm, prompt, job):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def stream(lm: LanguageModel, prompt: str, job: GenerateJob) -> Iterator[str]:
    """Yield the continuation in pieces of whole characters."""
    text_ids = [*(lm.prefix or [lm.tokenizer.eot_id]), *lm.encode(prompt)]
    room = (lm.limit or MOST) - len(text_ids)
    accepted = f"at most {room} after the prompt's {len(text_ids)} tokens"
    require(job.max_tokens <= room, "max_tokens", job.max_tokens, accepted)
    settings = {name: getattr(job, name) for name in ("temperature", "top_k", "top_p", "seed")}
    drawn: list[int] = []
    shown = ""
    for token in lm.sample(text_ids, job.max_tokens, **settings):
        drawn.append(token)
        text = lm.decode(drawn)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield lm.decode(drawn)[len(shown) :]


def _prompt(job: GenerateJob) -> str:
    if job.prompt == "-":
        return sys.stdin.read()
    if job.prompt_file is None:
        return job.prompt
    try:
        return Path(job.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompt_file={job.prompt_file} cannot be used: {error}; it must be a UTF-8 text file"
        ) from error
