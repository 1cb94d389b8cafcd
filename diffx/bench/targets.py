"""Shared by the benches: inference times, ratios with targets, their table and file."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffx.bench.timing import speed_ratio, time_in_turns
from diffx.config import UserError
from diffx.console import Reporter, make_table
from diffx.files import write_json
from diffx.hub.attention import cache_keyword

DECODED = 32  # tokens
Target = tuple[float | None, float | None]  # the lowest and the highest accepted ratio


def check_out(out: Path | None) -> None:
    """Refuse a file that cannot be written, before measuring.

    Raises:
        UserError: ``out`` cannot be a file.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(
            f"out={out} cannot be used: it must be the name of a JSON file in a folder that exists"
        )


def inference(
    models: Mapping[str, Any], ids: Tensor, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Time the prefill of ``ids`` (B, T) and the decoding of ``DECODED`` tokens, model by model.

    Returns:
        Seconds of every round, by work (``prefill``, ``decoding``) and by name.
    """

    @torch.inference_mode()
    def prefill(model: Any) -> None:
        last = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        model(input_ids=ids, use_cache=True, **last)

    @torch.inference_mode()
    def decode(model: Any) -> None:
        name, cache, token = cache_keyword(model), None, ids[:, :1]
        for _ in range(DECODED):
            output = model(input_ids=token, use_cache=True, **{name: cache})
            cache, token = output[name], output.logits[:, -1:].argmax(-1)

    return {
        work: time_in_turns(
            {name: partial(call, model) for name, model in models.items()}, rounds, ids.device
        )
        for work, call in (("prefill", prefill), ("decoding", decode))
    }


def target_ratio(
    report: dict[str, Any], work: str, figure: str, of: str, to: str, target: Target
) -> dict[str, Any]:
    """The ratio of one contestant to another, and whether it meets its target.

    Args:
        report: ``seconds`` of every round by work and name; ``bytes`` by figure and name, None
            where they cannot be measured.
        work: a key of ``seconds``.
        figure: ``time``, ``speed``, or one of ``report["bytes"]``.
        of: the contestant.
        to: the contestant it is compared with.
        target: the accepted medians.
    """
    result: dict[str, Any] = {"work": work, "figure": figure, "of": of, "to": to}
    if figure in ("time", "speed"):
        seconds = report["seconds"][work]
        result |= asdict(
            speed_ratio(seconds, of, to) if figure == "speed" else speed_ratio(seconds, to, of)
        )
    else:
        size = report["bytes"][figure]
        result |= {"median": size[of] / size[to] if size[of] else None, "low": None, "high": None}
    low, high = target
    median, has_target = result["median"], low is not None or high is not None
    met = (
        (low is None or median >= low) and (high is None or median <= high)
        if has_target and median is not None
        else None
    )
    return {**result, "target": target, "met": met}


def show_ratios(
    ratios: list[dict[str, Any]], title: str, report: dict[str, Any], out: Path | None
) -> None:
    """Print a table of the ratios and the missed targets, and write the report."""
    reporter = Reporter()
    columns = ("work", "figure", "", "median ratio", "lowest to highest round", "target", "met")
    reporter.table(make_table(title, columns, map(_row, ratios)))
    missed = [
        f"{ratio['work']}, {ratio['figure']} of {ratio['of']}"
        for ratio in ratios
        if ratio["met"] is False
    ]
    if any(ratio["met"] is not None for ratio in ratios):
        reporter.line(f"targets not met: {'; '.join(missed)}" if missed else "all targets are met")
    if out is not None:
        write_json(out, report)
        reporter.line(f"figures: {out}")


def _row(ratio: dict[str, Any]) -> list[str]:
    low, high = ratio["target"]
    span = "-" if ratio["low"] is None else f"{ratio['low']:.3f} to {ratio['high']:.3f}"
    accepted = (
        f"{low:.2f} to {high:.2f}"
        if low and high
        else f"at least {low:.2f}"
        if low
        else f"at most {high:.2f}"
        if high
        else "-"
    )
    median = "-" if ratio["median"] is None else f"{ratio['median']:.3f}"
    met = {None: "-", True: "yes", False: "no"}[ratio["met"]]
    return [
        ratio["work"],
        ratio["figure"],
        f"{ratio['of']} / {ratio['to']}",
        median,
        span,
        accepted,
        met,
    ]
