"""What few bits cost: a suite's main figure against the bits, for one checkpoint or for several side by side."""

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffx.config.quantize import EXACT
from diffx.console import Reporter, make_table
from diffx.report.compare import write_report
from diffx.report.evals import FEW, paired_rows
from diffx.report.evaluations import Evaluation, Key, read_evaluation
from diffx.report.picture import COLOURS, TITLE
from diffx.report.runs import group_runs, read_run
from diffx.report.statistics import paired_difference

_LOSSES = ("nll", "loss", "perplexity", "bpb")  # scores of which less is better
_EQUAL = 5e-5  # what is smaller is shown as 0
_PUBLISHED = (
    "published (arXiv 2410.05258, section 3.7; attention logits, HellaSwag): DIFF holds from 16 to 6 bits; at 4 bits it is about where the "
    "Transformer is at 6, and about 25 points above the Transformer at 4"
)
Found = dict[int, Path]  # bits to the folder of results
Scores = dict[Key, dict[str, float]]


def report_quantization(found: list[Found], out: Path) -> None:
    """Print, draw and write what the bits cost each checkpoint.

    Args:
        found: of each checkpoint its evaluations by bits, 16 among them; all of one suite and method.
        out: the picture; beside it a JSON file of its name holds every figure.

    Raises:
        UserError: the records are damaged.
        RunError: the picture cannot be written.
    """
    reporter = Reporter()
    report = analyse_quantization(found)
    reporter.table(make_table(report["title"], *_table(report)))
    for line in report["sentences"]:
        reporter.line(line)
    if report["method"]["kind"] == "attention_logits":
        reporter.line(_PUBLISHED)
    write_report(report, out, draw, reporter)


def analyse_quantization(found: list[Found]) -> dict[str, Any]:
    """Work out every figure and sentence, JSON-able."""
    checkpoints = [{bits: read_evaluation(folder) for bits, folder in own.items()} for own in found]
    first = checkpoints[0]
    fewest = first[min(first)]
    method = {key: value for key, value in fewest.results["settings"].get("change", {}).items() if key != "bits"}
    method.setdefault("kind", "nothing")  # only 16 bits were asked for
    scores = [{bits: evaluation.scores() for bits, evaluation in own.items()} for own in checkpoints]
    group, score = _headline(paired_rows(scores[0][EXACT], scores[0][EXACT]))
    worse = 1 if any(part in score for part in _LOSSES) else -1  # the sign of a change for the worse
    models = []
    for label, seeds in _groups([own[EXACT] for own in checkpoints]):
        members = [scores[index] for index in seeds]
        shared = sorted(set.intersection(*({*own} for own in members)), reverse=True)
        by_bits = {bits: _figures(members, bits, (group, score), worse) for bits in shared}
        for bits, size in _sizes([checkpoints[index] for index in seeds], shared).items():
            by_bits[bits]["bytes"] = size
        models.append({"label": label, "checkpoints": len(seeds), "by_bits": by_bits})
    what = f"{group}, {score}" if group else score
    return {
        "title": f"{fewest.results['settings']['suite']['name']}: {what} by bits of {method['kind']}",
        "suite": first[EXACT].results["suite"],
        "group": group,
        "score": score,
        "less_is_better": worse > 0,
        "method": method,
        "models": models,
        "sentences": _sentences(models),
        "folders": [{bits: str(folder) for bits, folder in own.items()} for own in found],
    }


def _headline(rows: list[dict[str, Any]]) -> Key:
    """The group and score that stand for the suite: its first average over groups, else its first figure."""
    row = next((row for row in rows if row["group"].startswith("average")), rows[0])
    return row["group"], row["score"]


def _groups(exact: list[Evaluation]) -> list[tuple[str, list[int]]]:
    """Label and places of the checkpoints that differ only in their seed; a model of the hub stands alone."""
    runs = {index: evaluation.run for index, evaluation in enumerate(exact) if (evaluation.run / "config.yaml").is_file()}
    read = {index: read_run(path) for index, path in runs.items()}
    places = {id(run): index for index, run in read.items()}
    found = [(group.label, [places[id(run)] for run in group.runs]) for group in group_runs(list(read.values()))]
    found += [(evaluation.label, [index]) for index, evaluation in enumerate(exact) if index not in runs]
    return sorted(found, key=lambda pair: pair[1])


def _figures(members: list[dict[int, Scores]], bits: int, key: Key, worse: int) -> dict[str, Any]:
    """Value and loss against 16 bits, means over seeds; the interval is the hull of that over examples and that over seeds."""

    def row(exact: Scores, few: Scores) -> dict[str, Any]:
        return next(row for row in paired_rows(exact, few) if (row["group"], row["score"]) == key)

    whole = row(_mean([own[EXACT] for own in members]), _mean([own[bits] for own in members]))
    ends = [] if whole["low"] is None else [worse * whole["low"], worse * whole["high"]]
    if len(members) > 1:
        losses = {seed: worse * row(own[EXACT], own[bits])["difference"] for seed, own in enumerate(members)}
        between = paired_difference(losses, dict.fromkeys(losses, 0.0))
        ends += [end for end in (between.low, between.high) if end is not None]
    low, high = (min(ends), max(ends)) if ends else (None, None)
    return {"value": whole["value"], "loss": worse * whole["difference"], "low": low, "high": high, "n": whole["n"]}


def _mean(seeds: list[Scores]) -> Scores:
    """Every example's mean over seeds."""
    return {key: {example: float(np.mean([own[key][example] for own in seeds])) for example in first} for key, first in seeds[0].items()}


def _sizes(members: list[dict[int, Evaluation]], shared: list[int]) -> dict[int, int]:
    """Bytes of the weights at each number of bits, where they were stored; of the seeds' the first, for they are alike."""
    facts = {bits: members[0][bits].results.get("change", {}) for bits in shared}
    sizes = {bits: own["bytes"] for bits, own in facts.items() if "bytes" in own}
    return sizes | {EXACT: facts[min(sizes)]["bytes_before"]} if sizes else {}


def _sentences(models: list[dict[str, Any]]) -> list[str]:
    """What each number of bits costs; who loses less is said where the intervals tell it."""
    lines = []
    shared = set.intersection(*({*model["by_bits"]} for model in models)) - {EXACT}
    for bits in sorted(shared, reverse=True):
        costs = sorted(((model["by_bits"][bits], model["label"]) for model in models), key=lambda pair: pair[0]["loss"])
        told = ", ".join(f"{label} {_change(figures)}" for figures, label in costs)
        line = f"Change for the worse at {bits} bits: {told}."
        (least, first), (most, last) = costs[0], costs[-1]
        gap, few = most["loss"] - least["loss"], min(figures["n"] for figures, _ in costs)
        if len(costs) > 1 and gap < _EQUAL:
            line += " They lose alike."
        elif len(costs) > 1 and few < FEW:
            line += f" No verdict: {few} examples are too few."
        elif len(costs) > 1 and least["high"] is not None and most["low"] is not None and least["high"] < most["low"]:
            line += f" {first} loses less than {last}, by {gap:.4f}."
        elif len(costs) > 1:
            line += f" No verdict: {first} and {last} differ by {gap:.4f}, and their intervals overlap or are not known."
        lines.append(line)
    return lines


def _change(figures: dict[str, Any]) -> str:
    loss, low, high = (None if (x := figures[key]) is None else f"{x if abs(x) >= _EQUAL else 0.0:+.4f}" for key in ("loss", "low", "high"))
    return f"{loss} [{low}, {high}]" if low else str(loss)


def _table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    several = any(model["checkpoints"] > 1 for model in report["models"])
    sizes = any("bytes" in own for model in report["models"] for own in model["by_bits"].values())
    over = "examples and over seeds" if several else "examples"
    columns = ["model", "runs", "bits", report["score"], f"change for the worse\n[95% interval over {over}]", "examples"]
    columns += ["weights"] if sizes else []
    rows = []
    for model in report["models"]:
        for bits, own in model["by_bits"].items():
            exact = bits == EXACT
            row = [model["label"], str(model["checkpoints"]), f"{bits} (as it is)" if exact else str(bits), f"{own['value']:.4f}"]
            rows.append([*row, "-" if exact else _change(own), str(own["n"]), *([f"{own['bytes'] / 1e6:,.1f} MB"] if sizes else [])])
    return columns, rows


def draw(report: dict[str, Any], path: Path) -> None:
    """The figure against the bits, and what it lost against 16 bits."""
    canvas = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for place, model in enumerate(report["models"]):
        bits, own = list(model["by_bits"]), list(model["by_bits"].values())
        look: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": "o", "markersize": 4.5, "linewidth": 1.8}
        runs = f" ({model['checkpoints']} runs)" if model["checkpoints"] > 1 else ""
        left.plot(bits, [figures["value"] for figures in own], label=f"{model['label']}{runs}", **look)
        losses = np.array([figures["loss"] for figures in own])
        ends = np.array([[figures["loss"] if figures[end] is None else figures[end] for figures in own] for end in ("low", "high")])
        right.errorbar(bits, losses, yerr=np.abs(ends - losses), capsize=3, **look)
    shown = sorted({bits for model in report["models"] for bits in model["by_bits"]}, reverse=True)
    direction = "less is better" if report["less_is_better"] else "more is better"
    left.set(ylabel=f"{report['score']} ({direction})")
    right.set(ylabel="change for the worse (bars: 95% interval)")
    left.set_title(report["title"], **TITLE)
    right.set_title(f"against {EXACT} bits", **TITLE)
    right.axhline(0, color="#444444", linewidth=1)
    for axes in (left, right):
        axes.set(xlabel=f"bits of {report['method']['kind']}")
        axes.set_xticks(shown, [f"{bits}" for bits in shown])
        axes.invert_xaxis()
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9.5)
    if report["method"]["kind"] == "attention_logits":
        canvas.supxlabel(fill(_PUBLISHED, 150), fontsize=8.5, color="#444444")
    canvas.savefig(path, dpi=150)
