"""`diffx compare A B suite=S`: its report, the evaluations it takes, what it refuses."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import bootstrap, gmean

from diffx.cli import main
from diffx.config import UserError
from diffx.config.eval import JudgeConfig
from diffx.config.suite import (
    HallucinationSuite,
    IclOrderSuite,
    OutliersSuite,
    RetrievalSuite,
    SpeedSuite,
)
from diffx.evaluation import hallucination, icl_order, outliers, retrieval, speed
from diffx.evaluation.suite import rows_of
from diffx.report.evals import compare_evaluations
from diffx.results import plot
from diffx.results.table import make_frame, write_frame

DECLARATIONS = {
    "retrieval": retrieval.declare(SimpleNamespace(suite=RetrievalSuite(name="retrieval"))),
    "icl_order": icl_order.declare(SimpleNamespace(suite=IclOrderSuite(name="icl_order"))),
    "outliers": outliers.declare(SimpleNamespace(suite=OutliersSuite(name="outliers"))),
    "hallucination": hallucination.declare(
        SimpleNamespace(
            suite=HallucinationSuite(name="hallucination"), job=SimpleNamespace(judge=JudgeConfig())
        )
    ),
    "speed": speed.declare(SimpleNamespace(suite=SpeedSuite(name="speed"))),
}


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Writes evaluations as `diffx eval` leaves them, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def make(
        run,
        records,
        suite="retrieval",
        step=20,
        digest="aaa",
        given=(),
        finished=True,
        age=0,
        samples=50,
        limit=None,
        size=1000,
        **results,
    ):
        """`records`: a list of (example, columns, scores); `given`: rows of the suite itself."""
        folder = tmp_path / run / "evals" / str(step) / suite / digest
        folder.mkdir(parents=True)
        if not finished:
            (folder / "records.jsonl").write_text("")
            return folder
        declaration = DECLARATIONS[suite]
        records = [dict(zip(("id", "by", "scores"), record, strict=True)) for record in records]
        model = {"checkpoint": run, "parameters": size, "source": suite}
        write_frame(
            make_frame([model | row for row in [*rows_of(records, declaration), *given]]),
            folder / "rows.parquet",
        )
        made = {
            "suite": suite,
            "settings_hash": digest,
            "settings": {"suite": {"name": suite, "samples": samples}, "limit": limit, "seed": 0},
            "checkpoint": {"name": run, "step": step, "fingerprint": run},
            "judge": {"kind": "none"},
            "metrics": [],
            "declaration": declaration.as_json(),
            "examples": len(records),
            "finished": True,
        }
        (folder / "results.json").write_text(json.dumps(made | results))
        os.utime(folder / "results.json", (1e9 - age, 1e9 - age))
        return folder

    return make


def cells(rates, n=100, name="greedy", seed=0):
    """`n` scores of 0 or 1 in each task; a higher rate is right wherever a lower rate is."""
    luck = np.random.default_rng(seed).random((len(rates), n))
    return [
        (f"{task}/{i}", {"task": task}, {name: float(luck[row, i] < rate)})
        for row, (task, rate) in enumerate(rates.items())
        for i in range(n)
    ]


def compared(*words, out="compared.png"):
    words = (
        words if any(word.startswith("suite=") for word in words) else [*words, "suite=retrieval"]
    )
    assert main(["compare", *words, "--out", out]) == 0
    with open(out.replace(".png", ".json")) as file:
        return json.load(file)


def row_of(figures, label, metric="greedy", rival=0):
    (row,) = [
        row
        for row in figures["comparisons"][rival]["rows"]
        if (row["label"], row["metric"]) == (label, metric)
    ]
    return row


def test_differences_are_paired_by_example(evaluated, capsys):
    a, b = cells({"N=1 R=1": 0.6, "N=4 R=2": 0.3}), cells({"N=1 R=1": 0.6, "N=4 R=2": 0.5})
    evaluated("a", a)
    evaluated("b", b[::-1])  # the order of records does not matter
    figures = compared("a", "b")
    same, row, average = (row_of(figures, label) for label in ("N=1 R=1", "N=4 R=2", "average"))
    assert (same["difference"], same["low"], same["high"], same["n"]) == (0, 0, 0, 100)
    base, values = (
        np.array([scores["greedy"] for _, by, scores in part if by["task"] == "N=4 R=2"])
        for part in (a, b)
    )
    assert (row["baseline"], row["value"], row["difference"]) == pytest.approx(
        (base.mean(), values.mean(), (values - base).mean())
    )
    expected = bootstrap(
        (values - base,), np.mean, method="percentile", n_resamples=20000, rng=1
    ).confidence_interval
    assert (row["low"], row["high"]) == pytest.approx(expected, abs=0.015)
    assert (row["paired"], row["unit"], row["better"], row["task"]) == (
        "example",
        "share of numbers right",
        "higher",
        "N=4 R=2",
    )
    assert average["difference"] == pytest.approx(row["difference"] / 2) and average["n"] == 200
    assert average["high"] - average["low"] == pytest.approx(
        (row["high"] - row["low"]) / 2, rel=0.1
    )  # only one of the two varies
    assert (
        row["published_gain"] == {"DIFF - Transformer (paper)": 0.22}
        and average["published_gain"] == {}
    )
    out = " ".join(capsys.readouterr().out.split())
    assert (
        f"{average['difference']:+.3f} [{average['low']:+.3f}, {average['high']:+.3f}] "
        "over 200 examples" in out
    )
    assert "retrieval: b (step 20) against a (step 20)" in out and "+0.220" in out
    picture = imread("compared.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05
    assert compared("a", "b") == figures  # the same numbers again


def test_without_out_nothing_is_written(evaluated, tmp_path, capsys):
    for run in "ab":
        evaluated(run, cells({"N=1 R=1": 0.5}))
    before = set(tmp_path.rglob("*"))
    assert main(["compare", "a", "b", "suite=retrieval"]) == 0
    assert set(tmp_path.rglob("*")) == before and "--out" in capsys.readouterr().out


def test_one_query_in_many_orders_is_one_example(evaluated):
    place = {"task": "trec", "variant": "random"}
    for run, right in (("a", 0.0), ("b", 1.0)):
        records = [
            (f"trec/random/{query}", place, {"accuracy": right * (query % 2)})
            for _ in range(10)
            for query in range(12)
        ]
        spread = {
            "metric": "max - min",
            "example": "seed 0",
            "aggregate": "example",
            "value": 0.2 - 0.1 * right,
            **place,
        }
        evaluated(
            run, records, "icl_order", given=[spread, spread | {"metric": "std", "value": None}]
        )
    figures = compared("a", "b", "suite=icl_order")
    row = row_of(figures, "trec random", "accuracy")
    assert row["n"] == 12 and row["difference"] == 0.5
    spread = row_of(figures, "trec random", "max - min")  # of one seed: no interval
    assert (
        spread["difference"] == pytest.approx(-0.1) and spread["low"] is None and spread["n"] == 1
    )
    assert spread["published_gain"] == {"DIFF - Transformer (paper)": -0.15}
    assert len(figures["comparisons"][0]["rows"]) == 2


def test_the_same_needles_at_several_lengths_are_one_example(evaluated):
    for run, right in (("a", 0.0), ("b", 1.0)):
        records = [
            (
                f"N=1 R=1/depth=0/{n}",
                {"task": "N=1 R=1", "length": length, "depth": 0.0},
                {"greedy": right * (length > 100)},
            )
            for length in (100, 200)
            for n in range(12)
        ]
        evaluated(run, records)
    figures = compared("a", "b")
    (row,) = figures["comparisons"][0]["rows"]
    assert row["n"] == 12 and row["difference"] == 0.5


def test_what_is_no_mean_is_not_taken_for_one(evaluated):
    groups = ("attention logits", "hidden states")
    for run, scale in (("a", 2.0), ("b", 1.0)):
        records = [
            (f"{task}/{i}", {"task": task}, {"top-1, mean over windows": scale * (i + 1)})
            for task in groups
            for i in range(12)
        ]
        whole = {
            "metric": "top-1",
            "unit": "magnitude",
            "better": "lower",
            "aggregate": "rank",
            "value": scale * 12,
            "n": 12,
        }
        evaluated(run, records, "outliers", given=[whole | {"task": task} for task in groups])
    figures = compared("a", "b", "suite=outliers")
    metrics = {(row["label"], row["metric"]) for row in figures["comparisons"][0]["rows"]}
    assert metrics == {
        (task, metric) for task in groups for metric in ("top-1", "top-1, mean over windows")
    }
    largest = row_of(figures, "hidden states", "top-1")
    assert (largest["difference"], largest["low"], largest["n"], largest["paired"]) == (
        -12,
        None,
        0,
        "none",
    )
    sentence = figures["comparisons"][0]["sentences"][1]
    assert (
        "lower" in sentence
        and "which is better" in sentence
        and "top-1, mean over windows (hidden states)" in sentence
    )
    assert "-6.500" in sentence


@pytest.mark.parametrize(
    ("rates", "n", "mentions"),
    [
        (
            (0.5, 0.5),
            50,
            ["No difference", "b and a", "retrieval greedy", "+0.000 [+0.000, +0.000] over 50"],
        ),
        ((0.9, 0.1), 50, ["b scores lower than a", "which is worse", "retrieval greedy", "-0."]),
        ((0.1, 0.9), 50, ["b scores higher than a", "which is better", "retrieval greedy", "+0."]),
        ((0.0, 1.0), 9, ["No verdict", "b differs from a by +1.000", "(9)"]),
        ((0.0, 1.0), 1, ["No verdict", "b differs from a by +1.000", "(1)"]),
    ],
)
def test_sentences(evaluated, rates, n, mentions):
    for run, rate in zip("ab", rates, strict=True):
        evaluated(run, cells({"N=1 R=1": rate}, n))
    (said,) = compared("a", "b")["comparisons"][0]["sentences"]
    assert all(mention in said for mention in mentions)


def test_three_checkpoints_and_what_only_some_have(evaluated, capsys):
    evaluated("a", cells({"N=1 R=1": 0.4}))
    evaluated(
        "b",
        [
            *cells({"N=1 R=1": 0.5})[:40],
            ("extra", {"task": "N=1 R=1"}, {"greedy": 1.0, "constrained": float("nan")}),
        ],
    )
    evaluated("runs/hub/org--model@abc", cells({"N=1 R=1": 0.8}), step=0)
    figures = compared("a", "b", "org/model")
    assert [row_of(figures, "N=1 R=1", rival=i)["n"] for i in (0, 1)] == [40, 100]
    out = capsys.readouterr().out
    assert (
        "61 scores that not both of a and b have are left out" in out
        and "retrieval: org/model against a (step 20)" in out
    )


def test_which_evaluations_are_compared(evaluated, capsys):
    low, high = cells({"N=1 R=1": 0.2}), cells({"N=1 R=1": 0.9})
    evaluated("a", low, step=10)
    evaluated("a", high, step=100)
    evaluated("b", low, step=7, digest="old", age=100)
    evaluated("b", high, step=7, age=50)
    assert row_of(compared("a", "b"), "N=1 R=1")["difference"] == 0  # the newest step of each
    assert row_of(compared("a@10", "b@7"), "N=1 R=1")["difference"] == pytest.approx(0.7, abs=0.1)
    evaluated("a", high, step=100, digest="old", age=-10)  # measured last
    assert row_of(compared("a", "b/"), "N=1 R=1")["difference"] == pytest.approx(-0.7, abs=0.1)
    assert "the newest, old, are compared, and aaa are not" in capsys.readouterr().out


def rounds(shapes, **factors):
    """Rows of `suite=speed`: seven rounds in each shape, whose noise is the same for all models."""
    noise = np.exp(np.random.default_rng(0).normal(0, 0.02, 7))
    return [
        {
            "metric": f"{phase} tokens/s",
            "unit": "tokens/s",
            "better": "higher",
            "aggregate": "example",
            "variant": f"B={batch}",
            "length": length,
            "example": f"B={batch} T={length}, round {number}",
            "value": 1000 * factor * noise[number],
        }
        for batch, length in shapes
        for phase, factor in factors.items()
        for number in range(7)
    ]


def test_what_the_second_map_costs(evaluated, make_run, capsys):
    shapes = [(1, 512), (8, 512)]
    for run, kind, final, factor in (("a", "transformer", 4.0, 1.0), ("b", "diff_v1", 0.0, 0.8)):
        make_run(run, kind, curve=[(0, 8.0), (1000, final)])
        given = rounds(shapes, train=factor, prefill=2 - factor, decode=1.0)
        evaluated(run, [], "speed", given=given, size=1_000_000 + 600 * (run == "b"))
    figures = compared("a", "b", "suite=speed")
    row = row_of(figures, "average", "train tokens/s")
    assert (row["difference"], row["n"], row["ratio"]) == (pytest.approx(0.8), 14, True) and row[
        "low"
    ] == pytest.approx(0.8)
    assert len(figures["comparisons"][0]["rows"]) == 9
    sentences = figures["comparisons"][0]["sentences"]
    for mention in (
        "train",
        "at equal parameters (1M and 1M)",
        "0.800 [0.800, 0.800]",
        "0.800 to 0.800 by shape",
    ):
        assert mention in sentences[0]
    for mention in (
        "at equal loss (4.0000)",
        "50.0%",
        "0.800 of its speed",
        "62.5% of its time: less",
    ):
        assert mention in sentences[1]  # half of the tokens at 0.8 of the speed
    assert (
        "slower at train; faster at prefill; neither clearly slower nor faster at decode"
        in sentences[-2]
    )
    assert "0.916 (3B, 2K tokens)" in " ".join(capsys.readouterr().out.split())
    assert imread("compared.png").std() > 0.05


def test_a_rate_is_compared_by_its_ratio(evaluated):
    """By geometric means over rounds, whose noise is not the same."""
    values = {
        run: np.random.default_rng(seed).lognormal(6, 0.3, 40) for seed, run in enumerate("ab")
    }
    for run, of_run in values.items():
        row = {"metric": "train tokens/s", "aggregate": "example", "variant": "B=1", "length": 8}
        evaluated(
            run,
            [],
            "speed",
            given=[row | {"example": str(n), "value": v} for n, v in enumerate(of_run)],
        )
    row = row_of(compared("a", "b", "suite=speed"), "B=1 T=8", "train tokens/s")
    assert row["difference"] == pytest.approx(gmean(values["b"]) / gmean(values["a"]))
    assert row["value"] == pytest.approx(gmean(values["b"]))
    gaps = np.log(values["b"] / values["a"])
    expected = bootstrap(
        (gaps,), np.mean, method="percentile", n_resamples=20000, rng=1
    ).confidence_interval
    assert (row["low"], row["high"]) == pytest.approx(np.exp(expected), rel=0.02)


def test_speed_of_models_that_are_no_runs(evaluated, capsys):
    for run, size in (("a", 1e6), ("b", 2e6)):
        evaluated(
            run, [], "speed", given=rounds([(1, 512)], decode=1.0), size=int(size), device=run
        )
    (first, last, _) = compared("a", "b", "suite=speed")["comparisons"][0]["sentences"]
    assert (
        "unequal parameters (1M and 2M)" in first and "by shape" not in first and "unequal" in last
    )
    assert "different devices" in capsys.readouterr().out


def test_different_judges_are_said(evaluated, capsys):
    for run in "ab":
        evaluated(
            run,
            cells({"xsum": 0.5}, name="faithful"),
            "hallucination",
            judge={"kind": "endpoint", "model": run},
        )
    compare_evaluations(["a", "b", "suite=hallucination"])
    assert "a and b had different judges" in capsys.readouterr().out


@pytest.mark.parametrize(
    "runs", [["a", "b"], ["runs/diff_v1_of_a_long_name_in_a_folder", "b", "c"]]
)
def test_the_note_is_whole_where_there_is_one_panel(evaluated, monkeypatch, runs):
    for run in runs:
        evaluated(run, cells({"N=1 R=1": 0.5}, n=12))
    drawn = []
    monkeypatch.setattr(
        plot, "Figure", lambda **settings: drawn.append(Figure(**settings)) or drawn[-1]
    )
    compared(*runs)
    (canvas,) = drawn
    canvas.draw_without_rendering()
    (note,) = [text for text in canvas.texts if "hollow" in text.get_text()]
    assert " ".join(note.get_text().split()).endswith("diamonds: averages")
    box = note.get_window_extent()
    assert (
        box.x0 >= 0
        and box.y0 >= 0
        and box.x1 <= canvas.bbox.x1
        and box.y1 < canvas.axes[0].get_tightbbox().y0
    )


def bad(words, *mentions):
    with pytest.raises(UserError) as error:
        compare_evaluations(words.split())
    for mention in mentions:
        assert mention in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(evaluated, tmp_path):
    records = cells({"N=1 R=1": 0.5})
    evaluated("a", records)
    evaluated("b", records, digest="bbb", limit=10, samples=5)
    evaluated("c", records, finished=False)
    evaluated("runs/hub/m@1", records), evaluated("runs/hub/m@2", records)
    (tmp_path / "empty").mkdir()
    bad("suite=retrieval", "suite=retrieval", "two or more")
    bad("a b suite=icl suite=retrieval", "one suite")
    bad("a b suite=retreival", "suite=retreival", "outliers", "retrieval")
    bad("a nowhere suite=retrieval", "RUN=nowhere", "no folder")
    bad("a empty suite=retrieval", "RUN=empty", "diffx eval checkpoint=empty suite=retrieval")
    bad("a@7 b suite=retrieval", "RUN=a@7", "only at 20")
    bad("a c suite=retrieval", "RUN=c", "unfinished", "goes on")
    bad("a b suite=retrieval", "a has", "limit=null", "b has", "limit=10", "suite.samples=5")
    bad("a m suite=retrieval", "RUN=m", "runs/hub/m@1, runs/hub/m@2")
    with pytest.raises(UserError, match=r"out=.*x\.txt"):
        compare_evaluations(["a", "b", "suite=retrieval"], tmp_path / "x.txt")
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "damage", [lambda content: content[:200] + b"xx", lambda content: b"", None]
)
def test_damaged_rows_are_one_line(evaluated, damage):
    folder = evaluated("a", cells({"N=1 R=1": 0.5}))
    evaluated("b", cells({"N=1 R=1": 0.5}))
    path = folder / "rows.parquet"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    bad("a b suite=retrieval", "rows.parquet cannot be used", "force=true")


def test_rows_of_other_columns_are_one_line(evaluated):
    folder = evaluated("a", cells({"N=1 R=1": 0.5}))
    evaluated("b", cells({"N=1 R=1": 0.5}))
    pd.read_parquet(folder / "rows.parquet").drop(columns="value").to_parquet(
        folder / "rows.parquet"
    )
    bad("a b suite=retrieval", "rows.parquet cannot be used", "force=true")


PICTURE = {"kind": "heat", "title": "{panel}", "x": "length", "y": "depth"}
TABLE = {"by": ["task"], "label": "{task}", "metrics": None, "average": None, "compared": True}


@pytest.mark.parametrize(
    "declaration",
    [
        None,
        5,
        {},
        {"metrics": 5},
        {"tables": [5]},
        {"tables": [TABLE | {"label": "{task.__class__}"}]},
        {"tables": [TABLE | {"label": "{task:9999999999}"}]},
        {"tables": [TABLE | {"label": "{task:{task}}"}]},
        {"tables": [TABLE | {"label": "{task:.0%}"}]},
        {"tables": [TABLE | {"label": "{length}"}]},
        {"tables": [TABLE | {"label": "{"}]},
        {"tables": [TABLE | {"label": 5}]},
        {"tables": [TABLE | {"by": 5}]},
        {"tables": [TABLE | {"by": ["value"]}]},
        {"tables": [TABLE | {"x": 1}]},
        {"tables": [TABLE | {"average": {"over": ["nothing"]}}]},
        {"tables": [TABLE | {"average": {"over": ["task"], "label": "{task[0]}"}}]},
        {"tables": [TABLE | {"average": {"over": ["task"], "metrics": {"x": ["greedy"]}}}]},
        {"pictures": [PICTURE | {"title": "{panel.__class__}"}]},
        {"pictures": [PICTURE | {"title": "{panel:9999999999}"}]},
        {"pictures": [PICTURE | {"x": "value"}]},
        {"pictures": [PICTURE | {"y": None}]},
        {"pictures": [PICTURE | {"panels": ["nothing"]}]},
        {"metrics": []},
        {"metrics": [{"name": "greedy", "aggregate": "exec"}]},
        {"references": [{"label": "a", "metric": "greedy"}]},
    ],
)
def test_a_declaration_that_is_none_is_one_line(evaluated, declaration):
    """A results.json may come from someone else: what it declares cannot do harm."""
    good = DECLARATIONS["retrieval"].as_json()
    declaration = (
        good | declaration if isinstance(declaration, dict) and declaration else declaration
    )
    for run in "ab":
        evaluated(run, cells({"N=1 R=1": 0.5}), declaration=declaration)
    bad("a b suite=retrieval", "results.json cannot be used", "force=true")


def test_results_of_the_old_form_are_one_line(evaluated):
    """An evaluation of an older version has no declaration and no rows."""
    for run in "ab":
        folder = evaluated(run, cells({"N=1 R=1": 0.5}))
        results = json.loads((folder / "results.json").read_text())
        del results["declaration"]
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "rows.parquet").unlink()
    bad("a b suite=retrieval", "results.json cannot be used", "force=true")


def test_the_command_takes_both_kinds(evaluated, capsys, tmp_path):
    for run in "ab":
        evaluated(run, cells({"N=1 R=1": 0.5}))
    assert main(["compare", "a", "b", "suite=retrieval", "--out", "shown/x.png"]) == 0
    assert (tmp_path / "shown/x.png").exists() and (tmp_path / "shown/x.json").exists()
    assert main(["compare", "a", "b"]) == 2  # no runs
    assert "config.yaml" in capsys.readouterr().err


def test_an_evaluation_is_shown_and_drawn_again_from_its_rows(tmp_path, monkeypatch, capsys):
    golden = Path(__file__).parents[1] / "results" / "golden" / "new"
    monkeypatch.chdir(golden)
    out = tmp_path / "again.png"
    assert main(["compare", "sweep/0", "suite=retrieval", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    (results,) = (golden / "sweep" / "0").glob("evals/*/retrieval/*/results.json")
    expected = json.loads(results.read_text())["metrics"]
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    names = ("label", "metric", "value", "n")
    assert [[row[k] for k in names] for row in rows] == [
        [row[k] for k in names] for row in expected
    ]
    assert "N=2 R=2" in shown and imread(out).std() > 0.05
