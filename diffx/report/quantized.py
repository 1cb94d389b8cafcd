"""What few bits cost: a suite's main figure by bits, for one checkpoint or several side by side."""

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd

from diffx.config.quantize import EXACT
from diffx.console import Reporter, make_table
from diffx.report.write import write_report
from diffx.results import plot
from diffx.results.compare import Row, compare
from diffx.results.declare import Declaration
from diffx.results.evaluations import Evaluation, read_evaluation
from diffx.results.runs import group_runs, read_run
from diffx.results.statistics import t_interval
from diffx.results.verdict import cost_of_bits, on_bits

_PUBLISHED = (
    "published (arXiv 2410.05258, section 3.7; attention logits, HellaSwag): DIFF holds from 16 to "
    "6 bits; at 4 bits it is about where the Transformer is at 6, and about 25 points above the "
    "Transformer at 4"
)
Widths = dict[int, Path]  # bits to the folder of results


def report_quantization(checkpoints: list[Widths], out: Path) -> None:
    """Print, draw and write what the bits cost each checkpoint.

    Args:
        checkpoints: of each its evaluations by bits, 16 among them; all of one suite and method.
        out: the picture; beside it a JSON file of its name holds every figure.

    Raises:
        UserError: the rows are damaged.
        RunError: the picture cannot be written.
    """
    reporter = Reporter()
    report = analyse_quantization(checkpoints)
    reporter.table(make_table(report["title"], *_table(report)))
    for line in report["sentences"]:
        reporter.line(line)
    if report["method"]["kind"] == "attention_logits":
        reporter.line(_PUBLISHED)
    write_report(report, out, draw, reporter)


def analyse_quantization(checkpoints: list[Widths]) -> dict[str, Any]:
    """Work out every figure and sentence, JSON-able."""
    evaluations = [{b: read_evaluation(folder) for b, folder in c.items()} for c in checkpoints]
    first = evaluations[0]
    change = first[min(first)].results["settings"].get("change", {})
    method = {key: value for key, value in change.items() if key != "bits"}
    method.setdefault("kind", "nothing")  # only 16 bits were asked for
    declaration = first[EXACT].declaration
    frames = [{b: evaluation.rows() for b, evaluation in c.items()} for c in evaluations]
    main = _headline(compare(frames[0][EXACT], frames[0][EXACT], declaration))
    models = []
    for label, seeds in _groups([c[EXACT] for c in evaluations]):
        members = [frames[index] for index in seeds]
        shared = sorted(set.intersection(*({*c} for c in members)), reverse=True)
        by_bits = {bits: _cost(members, bits, main, declaration) for bits in shared}
        for bits, size in _sizes(evaluations[seeds[0]], shared).items():
            by_bits[bits]["bytes"] = size
        models.append({"label": label, "checkpoints": len(seeds), "by_bits": by_bits})
    name = first[EXACT].results["settings"]["suite"]["name"]
    return {
        "title": f"{name}: {main['label']}, {main['metric']} by bits of {method['kind']}",
        "suite": first[EXACT].results["suite"],
        "group": main["label"],
        "metric": main["metric"],
        "better": main["better"],
        "method": method,
        "models": models,
        "sentences": on_bits(models, EXACT),
        "folders": [{bits: str(folder) for bits, folder in c.items()} for c in checkpoints],
    }


def _headline(rows: list[Row]) -> Row:
    """The row that stands for the suite: its first average over groups, else its first figure."""
    judged = [row for row in rows if row["better"] != "none"]
    return next((row for row in judged if row["groups"] > 1), judged[0])


def _groups(exact: list[Evaluation]) -> list[tuple[str, list[int]]]:
    """Label and places of checkpoints that differ only in their seed; a hub model stands alone."""
    is_run = [(evaluation.run / "config.yaml").is_file() for evaluation in exact]
    runs = {i: read_run(e.run) for i, e in enumerate(exact) if is_run[i]}
    places = {id(run): index for index, run in runs.items()}
    groups = [
        (group.label, [places[id(run)] for run in group.runs])
        for group in group_runs(list(runs.values()))
    ]
    groups += [(e.label, [index]) for index, e in enumerate(exact) if not is_run[index]]
    return sorted(groups, key=lambda pair: pair[1])


def _cost(
    members: list[dict[int, pd.DataFrame]], bits: int, main: Row, declaration: Declaration
) -> dict[str, Any]:
    """Value, and change for the worse against 16 bits, means over seeds.

    The interval is the hull of that over examples and that over seeds.
    """
    sign = 1 if main["better"] == "lower" else -1

    averages = [table.average.metrics for table in declaration.tables if table.average]
    stand_ins = {name for metrics in averages for name in (metrics or {}).get(main["metric"], ())}
    metrics = {main["metric"], *stand_ins}

    def change(exact: pd.DataFrame, quantized: pd.DataFrame) -> Row:
        exact, quantized = (f[f["metric"].isin(metrics)] for f in (exact, quantized))
        rows = compare(exact, quantized, declaration)
        keys = ("label", "metric")
        return next(row for row in rows if all(row[key] == main[key] for key in keys))

    whole = change(_mean([c[EXACT] for c in members]), _mean([c[bits] for c in members]))
    ends = [] if whole["low"] is None else [sign * whole["low"], sign * whole["high"]]
    losses = [sign * change(c[EXACT], c[bits])["difference"] for c in members]
    seeds = t_interval(losses)
    ends += [end for end in (seeds.low, seeds.high) if end is not None]
    low, high = (min(ends), max(ends)) if ends else (None, None)
    loss = sign * whole["difference"]
    return {"value": whole["value"], "loss": loss, "low": low, "high": high, "n": whole["n"]}


def _mean(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Every figure's mean over seeds."""
    if len(frames) == 1:
        return frames[0]
    rows = pd.concat(frames)
    of_model = ["checkpoint", "seed", "parameters", "stderr", "low", "high", "n"]
    figures = ["value", "weight"]
    keys = [name for name in rows.columns if name not in (*of_model, *figures)]
    means = rows.groupby(keys, sort=False, dropna=False)[figures].mean().reset_index()
    return means.reindex(columns=rows.columns)


def _sizes(evaluations: dict[int, Evaluation], shared: list[int]) -> dict[int, int]:
    """Bytes of the weights at each number of bits, where they were stored; seeds are alike."""
    facts = {bits: evaluations[bits].results.get("change", {}) for bits in shared}
    sizes = {bits: fact["bytes"] for bits, fact in facts.items() if "bytes" in fact}
    return sizes | {EXACT: facts[min(sizes)]["bytes_before"]} if sizes else {}


def _table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    several = any(model["checkpoints"] > 1 for model in report["models"])
    sizes = any("bytes" in c for model in report["models"] for c in model["by_bits"].values())
    over = "examples and over seeds" if several else "examples"
    change = f"change for the worse\n[95% interval over {over}]"
    columns = ["model", "runs", "bits", report["metric"], change, "examples"]
    columns += ["weights"] if sizes else []
    rows = []
    for model in report["models"]:
        for bits, cost in model["by_bits"].items():
            exact = bits == EXACT
            width = f"{bits} (as it is)" if exact else str(bits)
            row = [model["label"], str(model["checkpoints"]), width, f"{cost['value']:.4f}"]
            row += ["-" if exact else cost_of_bits(cost), str(cost["n"])]
            rows.append([*row, *([f"{cost['bytes'] / 1e6:,.1f} MB"] if sizes else [])])
    return columns, rows


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the figure against the bits, and its change for the worse against 16 bits."""
    figure, (values, changes) = plot.canvas(1, 2)
    for number, model in enumerate(report["models"]):
        bits, costs = list(model["by_bits"]), list(model["by_bits"].values())
        look = plot.look(number)
        runs = f" ({model['checkpoints']} runs)" if model["checkpoints"] > 1 else ""
        none = [None] * len(bits)
        label = f"{model['label']}{runs}"
        plot.curve(values, bits, [cost["value"] for cost in costs], none, none, label, look)
        losses = np.array([cost["loss"] for cost in costs])
        known = [
            [cost["loss"] if cost[end] is None else cost[end] for cost in costs]
            for end in ("low", "high")
        ]
        errors = np.abs(np.array(known) - losses)
        changes.errorbar(bits, losses, yerr=errors, capsize=3, marker="o", markersize=4, **look)
    kind = f"bits of {report['method']['kind']}"
    better = {"lower": " (less is better)", "higher": " (more is better)"}[report["better"]]
    plot.style(values, fill(report["title"], 48), kind, f"{report['metric']}{better}")
    what = "change for the worse (bars: 95% interval)"
    plot.style(changes, f"against {EXACT} bits", kind, what)
    changes.axhline(0, color="#444444", linewidth=1)
    shown = sorted({bits for model in report["models"] for bits in model["by_bits"]})
    for axes in (values, changes):
        axes.set_xticks(shown, [f"{bits}" for bits in shown])
        axes.invert_xaxis()
    plot.legend(values)
    if report["method"]["kind"] == "attention_logits":
        figure.supxlabel(fill(_PUBLISHED, 130), fontsize=8.5, color="#444444")
    plot.save(figure, path)
