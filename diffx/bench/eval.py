"""``diffx bench eval``: the harness adapter on a Llama as a ``transformer``, against HFLM."""

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import LlamaForCausalLM

from diffx.bench.targets import Row, show_figures, show_ratios
from diffx.bench.timing import begin, time_in_turns
from diffx.config import UserError, require
from diffx.config.eval import EvalJob
from diffx.config.suite import HarnessSuite
from diffx.config.train import Device
from diffx.evaluation.adapter import DecoderLM, PretrainedLM, quiet
from diffx.evaluation.model import LanguageModel
from diffx.hub.convert import from_llama
from diffx.loading import load

# Kinds of requests, the method of lm-eval for them, and the lowest accepted ratio of speed.
CASES = {
    "a continuation each": ("loglikelihood", 1.0),
    "choices of one token": ("loglikelihood", 1.0),  # HFLM, too, runs the model once for the four
    "choices that share a prompt": ("loglikelihood", 1.5),
    "whole texts": ("loglikelihood_rolling", 1.0),
    "generation": ("generate_until", 1.0),
}
BATCHES = (1, 8)  # of HFLM; the fastest counts


def bench_eval(
    out: Path | None, checkpoint: str, documents: int, rounds: int, device: str
) -> dict[str, Any]:
    """Measure requests per second on text of a Python module; see ``diffx.bench``.

    Of each kind of request there are ``documents``, with one request or four choices each.
    ``checkpoint`` is a Llama of the hub, by name or folder.
    """
    torch_device, report = begin(out, device, documents=documents, rounds=rounds)
    loaded = load(checkpoint, Device(device))
    is_llama = isinstance(loaded.model, LlamaForCausalLM)
    require(is_llama, "checkpoint", checkpoint, "a Llama of the hub, to make a transformer of")
    try:
        decoder = LanguageModel(replace(loaded, model=from_llama(loaded.model), limit=None))
    except ValueError as error:
        raise UserError(f"checkpoint={checkpoint} cannot be used: {error}") from error
    original = LanguageModel(loaded)
    job = EvalJob(checkpoint=checkpoint, suite=HarnessSuite(name="harness", tasks=["bench"]))
    ask: dict[str, Callable[[str, list[Any]], list[Any]]] = {"diffx": DecoderLM(decoder).ask}
    for batch in BATCHES:
        model = PretrainedLM(original, replace(job, batch=batch))
        # the same start of texts without context
        model.hflm.custom_prefix_token_id = loaded.tokenizer.eot_id
        ask[f"HFLM, batch {batch}"] = model.ask
    rates: dict[str, dict[str, float]] = {}
    report |= {"checkpoint": loaded.name, "requests_per_second": rates}
    rows: list[Row] = []
    for work, requests in _requests(documents).items():
        method, target = CASES[work]
        with quiet():
            calls = {name: partial(call, method, requests) for name, call in ask.items()}
            times = report["seconds"][work] = time_in_turns(calls, rounds, torch_device)
        rates[work] = {name: len(requests) / statistics.median(times[name]) for name in ask}
        fastest = max(list(ask)[1:], key=rates[work].__getitem__)
        rows.append((work, "speed", "diffx", fastest, (target, None)))
    title = f"{loaded.name} on {torch_device}"
    show_figures(title, {"requests/s": rates})
    return show_ratios(report, rows, title, out)


def _requests(documents: int) -> dict[str, list[Instance]]:
    """Requests of every kind, with different contexts of 80 to 800 characters."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    rng = random.Random(0)

    def cut(least: int, most: int) -> str:
        start = rng.randrange(len(text) - most)
        return text[start : start + rng.randint(least, most)].strip() or "pass"

    def contexts() -> list[str]:
        return [cut(80, 800) for _ in range(documents)]

    settings = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    arguments: tuple[list[Any], ...] = (
        [(context, " " + cut(5, 60)) for context in contexts()],
        [(context, f" {letter}") for context in contexts() for letter in "ABCD"],
        [(context, " " + cut(20, 80)) for context in contexts() for _ in range(4)],
        [(cut(400, 1200),) for _ in range(documents)],
        [(context, settings) for context in contexts()],
    )
    return {
        work: [Instance(method, doc={}, arguments=each, idx=0) for each in case]
        for (work, (method, _)), case in zip(CASES.items(), arguments, strict=True)
    }
