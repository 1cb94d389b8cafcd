"""``diffx bench eval``: the harness adapter on a Llama as a ``transformer``, against HFLM."""

import argparse
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from transformers import LlamaForCausalLM

from diffx.bench.targets import check_out
from diffx.bench.timing import machine, speed_ratio, time_in_turns
from diffx.config import UserError
from diffx.config.eval import EvalJob
from diffx.config.suite import HarnessSuite
from diffx.config.train import Device
from diffx.console import Reporter, make_table
from diffx.evaluation.adapter import DecoderLM, PretrainedLM, quiet
from diffx.evaluation.model import LanguageModel
from diffx.files import write_json
from diffx.hub.convert import from_llama
from diffx.loading import load

# Kinds of requests, the method of lm-eval that answers them, and the lowest accepted speed ratio.
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
    """Measure requests per second, on text cut from the source of a Python module.

    Args:
        out: where to write the figures as JSON; None writes none.
        checkpoint: a Llama of the hub, by name or folder.
        documents: documents of each kind of request; a document has one request or four choices.
        rounds: turns of each contestant.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        The report: the machine, and for each kind of request the seconds of every round, requests
            per second, the ratio to the
        fastest batch size of HFLM, and the largest difference between answers.

    Raises:
        UserError: the checkpoint is not a Llama that can be converted, the device is missing, or
            ``out`` cannot be a file.
    """
    check_out(out)
    loaded = load(checkpoint, Device(device))
    if not isinstance(loaded.model, LlamaForCausalLM):
        raise UserError(
            f"checkpoint={checkpoint} cannot be used: it must be a Llama of the hub, which our "
            "transformer can be made of"
        )
    try:
        decoder = LanguageModel(replace(loaded, model=from_llama(loaded.model), limit=None))
    except ValueError as error:
        raise UserError(f"checkpoint={checkpoint} cannot be used: {error}") from error
    original = LanguageModel(loaded)
    job = EvalJob(checkpoint=checkpoint, suite=HarnessSuite(name="harness", tasks=["bench"]))
    ask: dict[str, Callable[[str, list[Any]], list[Any]]] = {"ours": DecoderLM(decoder).ask}
    for batch in BATCHES:
        model = PretrainedLM(original, replace(job, batch=batch))
        # the same start of texts without context
        model.hflm.custom_prefix_token_id = loaded.tokenizer.eot_id
        ask[f"HFLM, batch {batch}"] = model.ask
    reporter = Reporter()
    report: dict[str, Any] = {
        "machine": machine(decoder.device),
        "checkpoint": loaded.name,
        "rounds": rounds,
        "cases": [],
    }
    with quiet():
        for (name, (method, target)), requests in zip(
            CASES.items(), _requests(documents), strict=True
        ):
            report["cases"].append(
                {
                    "requests": name,
                    "number": len(requests),
                    **_measure(ask, method, requests, rounds, decoder, target),
                }
            )
    columns = (
        "requests",
        "ours, a second",
        "HFLM, a second",
        "median ratio",
        "lowest to highest round",
        "target",
        "met",
        "largest difference",
    )
    reporter.table(
        make_table(f"{loaded.name} on {decoder.device}", columns, map(_row, report["cases"]))
    )
    if out is not None:
        write_json(out, report)
        reporter.line(f"figures: {out}")
    return report


def _requests(documents: int) -> list[list[Instance]]:
    """Requests of every kind, with different contexts of 80 to 800 characters."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    rng = random.Random(0)

    def cut(least: int, most: int) -> str:
        start = rng.randrange(len(text) - most)
        return text[start : start + rng.randint(least, most)].strip() or "pass"

    def instances(kind: Any, arguments: Any) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]

    pairs = [(cut(80, 800), " " + cut(5, 60)) for _ in range(documents)]
    letters = [
        (context, letter)
        for context in (cut(80, 800) for _ in range(documents))
        for letter in (" A", " B", " C", " D")
    ]
    choices = [
        (context, " " + cut(20, 80))
        for context in (cut(80, 800) for _ in range(documents))
        for _ in range(4)
    ]
    texts = [(cut(400, 1200),) for _ in range(documents)]
    prompts = [
        (cut(80, 800), {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False})
        for _ in range(documents)
    ]
    return [
        instances(method, made)
        for (method, _), made in zip(
            CASES.values(), (pairs, letters, choices, texts, prompts), strict=True
        )
    ]


def _measure(
    ask: dict[str, Callable[[str, list[Any]], list[Any]]],
    method: str,
    requests: list[Instance],
    rounds: int,
    lm: LanguageModel,
    target: float,
) -> dict[str, Any]:
    answers = ask["ours"](method, requests)
    expected = ask[f"HFLM, batch {BATCHES[0]}"](method, requests)
    if method == "generate_until":
        # texts that differ
        difference = float(sum(one != other for one, other in zip(answers, expected, strict=True)))
    else:
        scores = (
            (a[0], b[0]) if method == "loglikelihood" else (a, b)
            for a, b in zip(answers, expected, strict=True)
        )
        difference = max(abs(one - other) for one, other in scores)
    seconds = time_in_turns(
        {name: partial(call, method, requests) for name, call in ask.items()}, rounds, lm.device
    )
    fastest = min(
        (name for name in seconds if name != "ours"),
        key=lambda name: statistics.median(seconds[name]),
    )
    ratio = speed_ratio(seconds, "ours", fastest)
    return {
        "seconds": seconds,
        "requests_per_second": {
            name: len(requests) / statistics.median(times) for name, times in seconds.items()
        },
        "to": fastest,
        "ratio": asdict(ratio),
        "target": target,
        "met": ratio.median >= target,
        "largest_difference": difference,
    }


def _row(case: dict[str, Any]) -> list[str]:
    speed, ratio = case["requests_per_second"], case["ratio"]
    hflm = f"{speed[case['to']]:.2f} ({case['to'].removeprefix('HFLM, ')})"
    rounds = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    met = "yes" if case["met"] else "no"
    return [
        case["requests"],
        f"{speed['ours']:.2f}",
        hflm,
        f"{ratio['median']:.2f}",
        rounds,
        f"{case['target']:.2f}",
        met,
        f"{case['largest_difference']:.2g}",
    ]
