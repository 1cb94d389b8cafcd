"""Models as lm-eval asks them; answers are kept in a file.

A request is lm-eval's ``Instance``: a context and a continuation, a text to score, or a prompt.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.model import LM, TemplateLM, hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoTokenizer

from diffx.config import RunError
from diffx.config.checks import refuse
from diffx.config.eval import EvalJob
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import generations, loglikelihoods
from diffx.evaluation.task_rows import refusing
from diffx.files import append_lines, checked_line, read_json_lines
from diffx.models import Decoder

_CHUNK = 512  # requests between two writes
_CPU_LOGITS = 2**31  # bytes
_USER, _ASSISTANT = "diffx asks", "diffx answers"  # texts to look for in a filled chat template

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is done on purpose here


class DecoderLM(TemplateLM):
    """A decoder; scores are those of lm-eval's ``HFLM``, whatever the batch (or ``auto``).

    A text without a prefix is conditioned on end-of-text. A text that does not fit in the model's
    context loses its beginning: ``cut`` counts these requests.
    """

    def __init__(self, lm: LanguageModel, batch: int | str = "auto"):
        super().__init__()
        self._lm, self._batch = lm, batch
        self.cut = 0

    def ask(self, method: str, requests: list[Any]) -> list[Any]:
        """Answer requests by the method of that name."""
        return getattr(self, method)(requests, disable_tqdm=True)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._lm.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context is conditioned on."""
        return [self.eot_token_id, *self._lm.prefix][-1]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Encode a text, after the prefix unless ``add_special_tokens`` is False."""
        tokens = self._lm.encode(string)
        return tokens if add_special_tokens is False else self._lm.prefix + tokens

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs, longest = [], self._lm.context
        for texts, context, continuation in requests:
            size = len(continuation)
            if not 1 <= size <= longest:
                failed = f"the continuation {texts[1][:60]!r} has {size or 'no'} tokens"
                raise RunError(f"{failed}: it must have from 1 to {longest} (the model's context)")
            room = longest + 1 - size  # the last token is predicted, but not read
            pairs.append((context[-room:], continuation))
            self.cut += len(context) > room
        return loglikelihoods(self._lm, pairs, self._batch)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that are conditioned on one token.

        As in lm-eval, a token that begins each text is scored too.
        """
        settings = (self.prefix_token_id, self._lm.context, 1)
        tokens = [self.tok_encode(request.args[0]) for request in requests]
        texts = [list(get_rolling_token_windows(text, *settings)) for text in tokens]
        windows = [make_disjoint_window(window) for text in texts for window in text]
        scores = iter(loglikelihoods(self._lm, windows, self._batch))
        return [sum(next(scores)[0] for _ in text) for text in texts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts greedily, each until one of its stop strings."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, request in enumerate(requests):
            settings = generation_settings(request.args[1])
            key = (settings["max_gen_toks"], tuple(filter(None, settings["until"])))
            groups.setdefault(key, []).append(index)
        answers = [""] * len(requests)
        for (tokens, stop), indices in groups.items():
            room, prompts = self._lm.context - tokens, []
            for index in indices:
                prompt = self.tok_encode(requests[index].args[0]) or [self.prefix_token_id]
                self.cut += len(prompt) > room
                prompts.append(prompt[-room:])
            for index, text in generations(self._lm, prompts, tokens, stop, self._batch):
                answers[indices[index]] = text
        return answers


def generation_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """A task's generation settings in lm-eval, such as ``max_gen_toks``, ``until``."""
    return dict(normalize_gen_kwargs(arguments, default_max_gen_toks=256))


@contextmanager
def quiet() -> Iterator[None]:
    """Hide tqdm's progress bars.

    A patch: lm-eval 0.4.13 has no option for some of its bars, and tqdm reads ``TQDM_DISABLE`` only
    when it is imported.
    """
    original = tqdm.__init__
    tqdm.__init__ = lambda *args, **options: original(*args, **options | {"disable": True})
    try:
        yield
    finally:
        tqdm.__init__ = original


def _tokenizer(lm: LanguageModel, job: EvalJob) -> Any:
    """A new tokenizer that parses special tokens in a text, which ``lm.tokenizer`` does not."""
    path = job.checkpoint if lm.loaded.adapted is None else str(lm.loaded.folder / "tokenizer")
    return AutoTokenizer.from_pretrained(
        path, revision=job.revision, trust_remote_code=job.trust_remote_code
    )


def with_chat_template(lm: LanguageModel, job: EvalJob, system: str | None = None) -> LanguageModel:
    """Copy a model; the copy's prompts are a user's turn in its chat template.

    Raises:
        UserError: the template is missing, cannot be used, or refuses the instruction ``system``.
    """
    setting, name = "suite.chat_template=true", lm.name
    problem = "a run has no chat template; only a model of the hub can have one"
    refuse(isinstance(lm.model, Decoder), setting, problem)
    tokenizer = _tokenizer(lm, job)
    problem = f"the tokenizer of {name} has no chat template; choose an instruct model"
    refuse(not tokenizer.chat_template, setting, problem)
    fill = partial(tokenizer.apply_chat_template, tokenize=False)
    turns = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}]
    with refusing(setting, f"the template of {name} fails"):
        asked, answered = fill(turns[:1], add_generation_prompt=True), fill(turns)
    if system:
        instructed = ""
        with suppress(TemplateError):
            instructed = fill([{"role": "system", "content": system}, *turns[:1]])
        problem = f"the chat template of {name} has no system role; set it to null"
        refuse(system.strip() not in instructed, f"suite.system_instruction={system}", problem)
    incomplete = _USER not in asked or _ASSISTANT not in answered
    refuse(incomplete, setting, f"the template of {name} leaves out a turn's text")
    head, _, middle = asked.rpartition(_USER)
    chat = copy(lm)
    texts = (head, middle, answered.rpartition(_ASSISTANT)[2])
    encode = partial(tokenizer.encode, add_special_tokens=False)
    first, chat.suffix, chat.closing = map(encode, texts)
    chat.prefix = first if first[: len(lm.prefix)] == lm.prefix else lm.prefix + first
    chat.ends = lm.ends | ({*chat.closing[:1]} & {*tokenizer.all_special_ids})
    return chat


class PretrainedLM:
    """A model of ``transformers`` through lm-eval's class, ``hflm``.

    The longest request of a chunk sets ``batch=auto``, which is halved when memory runs out.
    ``cut`` counts requests that lost their beginning.
    """

    def __init__(self, lm: LanguageModel, job: EvalJob):
        self.hflm = HFLM(lm.model, tokenizer=_tokenizer(lm, job), max_length=lm.context)
        self._batch = job.batch
        self.cut = 0

    def ask(self, method: str, requests: list[Any]) -> list[Any]:
        """Answer requests by the method of that name."""
        lengths = [] if method == "loglikelihood_rolling" else list(map(self._tokens, requests))
        most = self.hflm.max_length
        self.cut += sum(length > most for length in lengths)
        longest = min(max(lengths, default=most), most)
        size = self._fitting(longest) if self._batch == "auto" else int(self._batch)
        while True:
            self.hflm.batch_size_per_gpu = size
            try:
                return getattr(self.hflm, method)(requests, disable_tqdm=True)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    failed = f"one request does not fit in the memory of {self.hflm.device}"
                    raise RunError(f"{failed}: choose dtype=bf16 or fewer shots") from error
                size //= 2

    def _tokens(self, request: Any) -> int:
        """Tokens that a request reads, its answer included."""
        text, rest = request.args
        if isinstance(rest, str):  # the last token of a continuation is predicted, but not read
            return len(self.hflm.tok_encode(text + rest)) - 1
        return len(self.hflm.tok_encode(text)) + generation_settings(rest)["max_gen_toks"]

    def _fitting(self, longest: int) -> int:
        """Sequences whose logits and log-probabilities take half of the memory, or 2 GiB (CPU)."""
        device = self.hflm.device
        memory = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _CPU_LOGITS
        vocabulary = self.hflm.model.get_input_embeddings().weight.shape[0]
        return int(max(1, min(64, memory // (8 * vocabulary * longest))))


class RecordingLM(LM):
    """Asks a model requests without an answer yet, and appends the answers to a file in chunks.

    Args:
        ask: takes the name of a method of lm-eval's models and requests, and returns the answers.
        path: JSON lines, one an answer, each with a checksum; read first if it exists.
        tell: called with the numbers of answered requests and of all.
        template: for chat templates, the model of lm-eval that has one.
    """

    def __init__(
        self,
        ask: Callable[[str, list[Any]], list[Any]],
        path: Path,
        tell: Callable[[int, int], None],
        template: LM | None = None,
    ):
        super().__init__()
        self._ask, self._path, self._tell, self._template = ask, path, tell, template
        self._known = {
            row["request"]: row["answer"]
            for row in read_json_lines(path, skip_damaged=True)
            if isinstance(row.get("request"), str) and "answer" in row
        }

    def _answer(self, method: str, requests: list[Any]) -> list[Any]:
        keys, todo, counts = [], [], Counter[str]()
        for request in requests:  # equal requests can have several answers, where they are sampled
            key = hash_args(method, request.args)
            keys.append(f"{key}/{counts[key]}")
            counts[key] += 1
            if keys[-1] not in self._known:
                todo.append((keys[-1], request))
        self._tell(len(keys) - len(todo), len(keys))
        while todo:
            chunk, todo = todo[:_CHUNK], todo[_CHUNK:]
            answers = self._ask(method, [request for _, request in chunk])
            with append_lines(self._path) as file:
                for (key, _), answer in zip(chunk, answers, strict=True):
                    self._known[key] = answer
                    file.write(checked_line({"request": key, "answer": answer}))
            self._tell(len(keys) - len(todo), len(keys))
        known = [self._known[key] for key in keys]
        return list(map(tuple, known)) if method == "loglikelihood" else known

    loglikelihood = partialmethod(_answer, "loglikelihood")
    loglikelihood_rolling = partialmethod(_answer, "loglikelihood_rolling")
    generate_until = partialmethod(_answer, "generate_until")

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer with the chat template."""
        return "" if self._template is None else self._template.tokenizer_name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turn messages into a prompt."""
        assert self._template is not None
        return self._template.apply_chat_template(chat_history, add_generation_prompt)
