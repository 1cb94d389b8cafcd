"""What few bits cost: a suite's main figure by bits, for one checkpoint or several side by side."""

from pathlib import Path
from typing import Any

import pandas as pd

from diffx.config.quantize import EXACT
from diffx.console import Reporter, make_table
from diffx.report.write import write_report
from diffx.results.compare import Row, compare
from diffx.results.declare import Declaration, Picture
from diffx.results.draw import draw_results
from diffx.results.evaluations import Evaluation, read_evaluation
from diffx.results.runs import group_runs, read_run
from diffx.results.statistics import t_interval
from diffx.results.verdict import cost_of_bits, on_bits

_PUBLISHED = (
    "arXiv 2410.05258, section 3.7 (attention logits, HellaSwag): DIFF holds from 16 to 6 bits; at "
    "4 bits it is about where the Transformer is at 6, and about 25 points above the Transformer "
    "at 4"
)
Widths = dict[int, Path]  # bits to the folder of results


def report_quantization(checkpoints: list[Widths], out: Path) -> None:
    """Print, draw and write what the bits cost each checkpoint.

    Args:
        checkpoints: of each its evaluations by bits, 16 among them; all of one suite and method.
        out: the picture, with every figure in a JSON file beside it.

    Raises:
        UserError: the rows are damaged.
        RunError: the picture cannot be written.
    """
    reporter = Reporter()
    report = analyse_quantization(checkpoints)
    reporter.table(make_table(report["title"], *_table(report)))
    write_report(report, out, draw, reporter)


def analyse_quantization(checkpoints: list[Widths]) -> dict[str, Any]:
    """Compute every figure and sentence, JSON-able."""
    evaluations = [{b: read_evaluation(folder) for b, folder in c.items()} for c in checkpoints]
    frames = [{b: evaluation.rows() for b, evaluation in c.items()} for c in evaluations]
    first = evaluations[0]
    exact, declaration = first[EXACT].results, first[EXACT].declaration
    change = first[min(first)].results["settings"].get("change", {})
    method = {"kind": "nothing"} | {key: change[key] for key in change if key != "bits"}
    # The first average over groups stands for the suite, else its first figure.
    rows = compare(frames[0][EXACT], frames[0][EXACT], declaration)
    judged = [row for row in rows if row["better"] != "none"]
    main = next((row for row in judged if row["groups"] > 1), judged[0])
    models = []
    for label, seeds in _groups([c[EXACT] for c in evaluations]):
        members = [frames[index] for index in seeds]
        shared = sorted(set.intersection(*({*c} for c in members)), reverse=True)
        by_bits = {bits: _cost(members, bits, main, declaration) for bits in shared}
        # Bytes of the weights, where they were stored; seeds are alike.
        for bits in shared:
            change = evaluations[seeds[0]][bits].results.get("change", {})
            if "bytes" in change:
                by_bits[bits]["bytes"] = change["bytes"]
                by_bits[EXACT]["bytes"] = change["bytes_before"]
        models.append({"label": label, "checkpoints": len(seeds), "by_bits": by_bits})
    figure = f"{main['label']}, {main['metric']} by bits of {method['kind']}"
    return {
        "title": f"{exact['settings']['suite']['name']}: {figure}",
        "suite": exact["suite"],
        "group": main["label"],
        "metric": main["metric"],
        "better": main["better"],
        "method": method,
        "models": models,
        "sentences": on_bits(models, EXACT),
        "published": _PUBLISHED if method["kind"] == "attention_logits" else "",
        "folders": [{bits: str(folder) for bits, folder in c.items()} for c in checkpoints],
    }


def _groups(exact: list[Evaluation]) -> list[tuple[str, list[int]]]:
    """Label and places of checkpoints that differ only in their seed; a hub model stands alone."""
    runs = {i: read_run(e.run) for i, e in enumerate(exact) if (e.run / "config.yaml").is_file()}
    places = {id(run): index for index, run in runs.items()}
    groups = [(g.label, [places[id(run)] for run in g.runs]) for g in group_runs(runs.values())]
    groups += [(e.label, [index]) for index, e in enumerate(exact) if index not in runs]
    return sorted(groups, key=lambda pair: pair[1])


def _cost(
    members: list[dict[int, pd.DataFrame]], bits: int, main: Row, declaration: Declaration
) -> Row:
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
        names = (main["label"], main["metric"])
        return next(row for row in rows if (row["label"], row["metric"]) == names)

    whole = change(_mean([c[EXACT] for c in members]), _mean([c[bits] for c in members]))
    seeds = t_interval([change(c[EXACT], c[bits])["difference"] for c in members])
    every = (seeds.low, seeds.high, whole["low"], whole["high"])
    ends = [sign * end for end in every if end is not None]
    figures = {"value": whole["value"], "loss": sign * whole["difference"], "n": whole["n"]}
    return figures | {"low": min(ends, default=None), "high": max(ends, default=None)}


def _mean(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Every figure's mean over seeds."""
    if len(frames) == 1:
        return frames[0]
    rows = pd.concat(frames)
    figures = ["value", "weight"]
    of_model = {"checkpoint", "seed", "parameters", "stderr", "low", "high", "n", *figures}
    keys = [name for name in rows.columns if name not in of_model]
    means = rows.groupby(keys, sort=False, dropna=False)[figures].mean().reset_index()
    return means.reindex(columns=rows.columns)


def _table(report: Row) -> tuple[list[str], list[list[str]]]:
    costs = [(model, *cost) for model in report["models"] for cost in model["by_bits"].items()]
    several = any(model["checkpoints"] > 1 for model in report["models"])
    change = f"change for the worse\n[95% interval over examples{' and over seeds' * several}]"
    columns = ["model", "runs", "bits", report["metric"], change, "examples"]
    rows = []
    for model, bits, cost in costs:
        exact = bits == EXACT
        row = [model["label"], model["checkpoints"], f"{bits}{' (as it is)' * exact}"]
        row += [f"{cost['value']:.4f}", "-" if exact else cost_of_bits(cost), cost["n"]]
        rows.append([str(cell) for cell in row])
    if any("bytes" in cost for _, _, cost in costs):
        columns.append("weights")
        for row, (_, _, cost) in zip(rows, costs, strict=True):
            row.append(f"{cost['bytes'] / 1e6:,.1f} MB")
    return columns, rows


def draw(report: Row, path: Path) -> None:
    """Draw the figure against the bits, and its change for the worse against 16 bits."""
    metric, kind = report["metric"], f"bits of {report['method']['kind']}"
    better = {"lower": "less is better", "higher": "more is better"}[report["better"]]
    change = f"change for the worse against {EXACT} bits"
    rows: list[Row] = []
    for model in report["models"]:
        runs = f" ({model['checkpoints']} runs)" if model["checkpoints"] > 1 else ""
        for bits, cost in model["by_bits"].items():
            row = {"label": f"{model['label']}{runs}", "bits": bits, "aggregate": "mean"}
            whole = {"metric": metric, "value": cost["value"], "low": None, "high": None}
            worse = {"metric": change, "value": cost["loss"]}
            rows += [row | whole, row | cost | worse]
    pictures = [
        Picture(kind="curve", x="bits", series="label", xlabel=kind, **panel)
        for panel in (
            {"metrics": [metric], "title": metric, "ylabel": f"{metric} ({better})"},
            {"metrics": [change], "title": change, "ylabel": "change (band: 95% interval)"},
        )
    ]
    notes = [f"published: {_PUBLISHED}"] if report["published"] else []
    declaration = Declaration(metrics=[], tables=[], pictures=pictures, notes=notes)
    draw_results(rows, (), declaration, report["title"], path)
