"""Comparisons of the tiny models in ``golden/``, against the figures of an earlier version.

``golden/new`` has run folders of ``diffx train``, ``adapt-dex``, ``eval`` and ``quantize`` without
their checkpoints; the rounds of ``speed`` are those of the evaluation that gave the old figures.
``golden/old`` has what ``diffx compare``, ``diffx quantize`` and ``diffx eval`` of the old code
wrote of the same models.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from diffx.cli import main
from diffx.report.quantized import analyse_quantization
from diffx.results.aggregate import aggregate
from diffx.results.evaluations import find_evaluations

GOLDEN = Path(__file__).with_name("golden")
SUITES = [
    "attention_allocation",
    "choice_shots",
    "hallucination",
    "harness",
    "icl",
    "icl_order",
    "long_context",
    "outliers",
    "retrieval",
    "speed",
]
# Old rows that have no counterpart, and why.
GONE = {
    # The average was over arrangements of one task; now it is over tasks, by arrangement.
    ("icl_order", "average", "accuracy"),
    # The same figure stood in the table twice: as a mean over queries, and over orders.
    ("icl_order", "synthetic", "random accuracy"),
    ("icl_order", "synthetic", "alternating accuracy"),
    # What is neither better nor worse is not averaged over tasks, as in the table of `diffx eval`.
    ("hallucination", "average", "answer_tokens"),
    ("hallucination", "average", "empty"),
    ("hallucination", "average", "text_seen"),
}
# Averages over groups of other examples: all groups were resampled by the same positions, which now
# holds only for groups that share their examples; others are resampled by themselves.
INDEPENDENT = {"attention_allocation", "retrieval", "speed"}
# Metrics whose examples' scores are a few steps between 0 and 1, so that ends of intervals jump.
STEPS = {"accuracy", "greedy", "constrained", "acc", "acc_norm", "exact_match"}


def renamed(suite, label, metric):
    """The label and the metric that an old row has now."""
    if suite == "icl_order" and metric.startswith(("random ", "alternating ")):
        # The arrangement is a column of its own, and no part of the metric's name.
        arrangement, metric = metric.split(" ", 1)
        return f"{label} {arrangement}", metric
    if suite == "long_context" and label.startswith("frequent"):
        # What counts as frequent stands in a note below the table.
        return "128 tokens", metric
    if suite == "long_context" and label.startswith("first"):
        # A mean over the first tokens is another figure than one over all.
        return label, f"cumulative {metric}"
    if suite == "outliers":
        # An example is a window of the text.
        return label, metric.replace("mean over examples", "mean over windows")
    return label, metric


def read_old(name):
    return json.loads((GOLDEN / "old" / f"{name}.json").read_text())


def require_equal(old, new):
    """Means and differences are equal."""
    for name, value in old.items():
        assert new[name] == pytest.approx(value, rel=0, abs=1e-12), name


def require_near(old, new, step=0.0, share=0.05):
    """The ends of a bootstrap interval are where they were, but for the draws.

    Args:
        old: a row of the old figures.
        new: the row of the new ones.
        step: how far apart the possible means are.
        share: of the interval's width, by which its ends may differ.
    """
    if old["low"] is None or old["n"] == 0:
        return
    tolerance = max(share * (old["high"] - old["low"]), step) + 1e-9
    assert new["low"] == pytest.approx(old["low"], rel=0, abs=tolerance)
    assert new["high"] == pytest.approx(old["high"], rel=0, abs=tolerance)


def require_independent(average, groups, scale):
    """The variance of an average is the sum of its groups' variances over their squared number."""
    old, new = (
        [scale(row["high"]) - scale(row["low"]) for row in rows] for rows in (groups, [average])
    )
    assert new[0] == pytest.approx(np.sqrt(np.sum(np.square(old))) / len(old), rel=0.2)


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """The figures of ``diffx compare`` in the folder of the new runs."""
    monkeypatch.chdir(GOLDEN / "new")

    def run(*words):
        assert main(["compare", *words, "--out", str(tmp_path / "x.svg")]) == 0
        return json.loads((tmp_path / "x.json").read_text())

    return run


@pytest.mark.parametrize("suite", SUITES)
def test_comparisons_of_evaluations(compared, suite):
    old = read_old(suite)["comparisons"][0]["rows"]
    new = compared("sweep/0", "sweep/3", f"suite={suite}")["comparisons"][0]["rows"]
    by_name = {(row["label"], row["metric"]): row for row in new}
    assert len(by_name) == len(new) and len(old) >= 3
    for row in old:
        name = (row["group"], row["score"])
        if (suite, *name) in GONE:
            continue
        rival = by_name[renamed(suite, *name)]
        require_equal({key: row[key] for key in ("baseline", "value", "difference")}, rival)
        # Issue 13: a query behind several numbers of shots is one example.
        expected = row["n"] // row["groups"] if suite == "icl" else row["n"]
        assert rival["n"] == expected or (row["n"] == 0 and row["low"] is None)
        assert rival["published_gain"] == row["published_gain"]
        if row["groups"] > 1 and suite in INDEPENDENT:
            groups = [r for r in old if r["score"] == row["score"] and r["groups"] == 1]
            if row["low"] is not None:
                require_independent(rival, groups, np.log if rival["ratio"] else float)
            continue
        step = 1 / rival["n"] if row["score"] in STEPS and rival["n"] else 0.0
        require_near(row, rival, step)


@pytest.mark.parametrize("model", ["0", "3"])
@pytest.mark.parametrize("suite", SUITES)
def test_metrics_of_evaluations(monkeypatch, suite, model):
    monkeypatch.chdir(GOLDEN / "new")
    (evaluation,) = find_evaluations(f"sweep/{model}", suite)
    rows = aggregate(evaluation.rows(), evaluation.declaration)
    by_name = {(row["label"], row["metric"]): row for row in rows}
    for row in read_old("metrics")[suite][model]:
        rival = by_name[renamed(suite, row["group"], row["name"])]
        require_equal({"value": row["value"]}, rival)
        if row["low"] is not None:
            # Few examples have few possible means, so that ends jump from one to another.
            require_near(row, rival, 1 / row["n"] if row["name"] in STEPS else 0.0, 1 / row["n"])


@pytest.mark.parametrize("folder", ["sweep", "sizes", "lengths", "adapted"])
def test_comparisons_of_runs(compared, folder):
    def walk(old, new, path):
        if isinstance(old, dict):
            assert old.keys() <= new.keys(), path
            for key in old:
                walk(old[key], new[key], f"{path}/{key}")
        elif isinstance(old, list):
            assert len(old) == len(new), path
            for index, (one, other) in enumerate(zip(old, new, strict=True)):
                walk(one, other, f"{path}/{index}")
        elif isinstance(old, float):
            assert new == pytest.approx(old, rel=0, abs=1e-12), path
        elif not path.endswith("/sentence") and "/sentences/" not in path:
            assert new == old, path

    old = read_old(folder)
    assert len(old["groups"]) >= 2 and old["sentences"]
    walk(old, compared(folder), folder)


def test_the_cost_of_bits_over_three_seeds(monkeypatch):
    monkeypatch.chdir(GOLDEN / "new")
    old = read_old("quantized")
    widths = [{int(bits): Path(p) for bits, p in folders.items()} for folders in old["folders"]]
    new = analyse_quantization(widths)
    assert (new["group"], new["metric"], new["better"]) == (old["group"], old["score"], "lower")
    assert len(old["models"]) == len(new["models"]) == 2
    for model, rival in zip(old["models"], new["models"], strict=True):
        assert (rival["label"], rival["checkpoints"]) == (model["label"], 3)
        for bits, cost in model["by_bits"].items():
            # The hull of the intervals over examples and over seeds; the latter is Student's.
            require_equal(
                {key: cost[key] for key in ("value", "loss")}, rival["by_bits"][int(bits)]
            )
            require_near(cost, rival["by_bits"][int(bits)])
