import json
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard
from matplotlib.figure import Figure
from matplotlib.image import imread
from scipy.stats import bootstrap

from diffx.cli import main
from diffx.config import UserError
from diffx.report import evals_picture
from diffx.report.evals import compare_evaluations, paired_rows


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Writes evaluations as `diffx eval` leaves them, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def make(run, records, suite="retrieval", step=20, digest="aaa", metrics=None, finished=True, age=0, samples=50, limit=None):
        """`records` is a list of (id, group, scores) or whole records; `metrics` are (group, name): value, or the records' means."""
        folder = tmp_path / run / "evals" / str(step) / suite / digest
        folder.mkdir(parents=True)
        records = [r if isinstance(r, dict) else dict(zip(("id", "group", "scores"), r, strict=True)) for r in records]
        if metrics is None:
            values = {}
            for record in records:
                for name, score in record["scores"].items():
                    values.setdefault((record["group"], name), []).append(score)
            metrics = {key: float(np.mean(own)) for key, own in values.items()}
        if not finished:
            (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            return folder
        with zstandard.open(folder / "records.jsonl.zst", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        results = {
            "suite": suite,
            "settings_hash": digest,
            "settings": {"suite": {"name": suite, "samples": samples}, "limit": limit, "seed": 0},
            "checkpoint": {"name": run, "step": step, "fingerprint": run},
            "judge": {"kind": "none"},
            "metrics": [{"group": group, "name": name, "value": value} for (group, name), value in metrics.items()],
            "examples": len(records),
            "finished": True,
        }
        (folder / "results.json").write_text(json.dumps(results))
        os.utime(folder / "results.json", (1e9 - age, 1e9 - age))
        return folder

    return make


def cells(rates, n=100, name="greedy", seed=0):
    """`n` scores of 0 or 1 in each group, drawn so that a higher rate never answers wrongly what a lower one answers rightly."""
    luck = np.random.default_rng(seed).random((len(rates), n))
    return [
        (f"{group}/{i}", group, {name: float(luck[row, i] < rate)}) for row, (group, rate) in enumerate(rates.items()) for i in range(n)
    ]


def compared(*words):
    compare_evaluations([*words, "suite=retrieval"] if not any(w.startswith("suite=") for w in words) else words)
    (figures,) = Path().glob("*.json")
    return json.loads(figures.read_text())


def row_of(figures, group, score="greedy", rival=0):
    (row,) = [row for row in figures["comparisons"][rival]["rows"] if (row["group"], row["score"]) == (group, score)]
    return row


def test_differences_are_paired_by_example(evaluated, capsys):
    a, b = cells({"N=1 R=1": 0.6, "N=4 R=2": 0.3}), cells({"N=1 R=1": 0.6, "N=4 R=2": 0.5})
    evaluated("a", a)
    evaluated("b", b[::-1])  # the order of records does not matter
    figures = compared("a", "b")
    same, row, average = (row_of(figures, group) for group in ("N=1 R=1", "N=4 R=2", "average"))
    assert (same["difference"], same["low"], same["high"], same["n"]) == (0, 0, 0, 100)
    theirs, ours = (np.array([scores["greedy"] for _, group, scores in part if group == "N=4 R=2"]) for part in (a, b))
    assert (row["baseline"], row["value"], row["difference"]) == pytest.approx((theirs.mean(), ours.mean(), (ours - theirs).mean()))
    expected = bootstrap((ours - theirs,), np.mean, method="percentile", n_resamples=20000, rng=1).confidence_interval
    assert (row["low"], row["high"]) == pytest.approx(expected, abs=0.015)
    assert average["difference"] == pytest.approx(row["difference"] / 2) and average["n"] == 200
    assert average["high"] - average["low"] == pytest.approx((row["high"] - row["low"]) / 2)
    assert row["published_gain"] == {"DIFF - Transformer (paper)": 0.22} and average["published_gain"] == {}
    out = " ".join(capsys.readouterr().out.split())
    told = f"{average['difference']:+.3f} [{average['low']:+.3f}, {average['high']:+.3f}] over 200 examples"
    assert f"b scores higher than a on retrieval greedy (average): {told}." in out
    assert "retrieval: b (step 20) against a (step 20)" in out and "+0.220" in out
    picture = imread("compare-retrieval.png")
    assert picture.shape[0] > 300 and picture.std() > 0.05
    compare_evaluations(["a", "b", "suite=retrieval"])
    assert compared("a", "b") == figures  # the same numbers again


def test_the_same_questions_in_two_groups_are_no_more_evidence(evaluated):
    """Groups that ask the same examples: the interval of their average is as wide as that of one."""
    gaps = np.random.default_rng(0).normal(size=80)
    theirs = {(group, "acc"): {f"{group}/{i}": 0.0 for i in range(80)} for group in ("0 shots", "1 shot")}
    ours = {key: {f"{key[0]}/{i}": gap for i, gap in enumerate(gaps)} for key in theirs}
    one, _, average = paired_rows(theirs, ours)
    assert (average["low"], average["high"]) == (one["low"], one["high"])


@pytest.mark.parametrize(
    ("suite", "groups", "averages", "gain"),
    [
        (
            "paper_lm",
            ["piqa (0-shot)", "boolq (0-shot)", "piqa (5-shot)", "boolq (5-shot)"],
            ["average (0-shot)", "average (5-shot)"],
            0.008,
        ),
        ("icl", ["trec 1 shots", "trec 2 shots", "my 1 shots"], ["trec"], 0.18),
        ("icl", ["trec 1 shots a class", "trec 0 shots a class"], ["trec"], 0.18),
        ("harness", ["x", "y"], ["average"], None),
        ("harness", ["x"], [], None),
    ],
)
def test_averages_are_of_what_belongs_together(evaluated, suite, groups, averages, gain):
    score = "accuracy" if suite == "icl" else "acc"
    for run in "ab":
        evaluated(run, cells(dict.fromkeys(groups, 0.5), n=12, name=score), suite, metrics={("average over all", score): 0.5})
    rows = compared("a", "b", f"suite={suite}")["comparisons"][0]["rows"]
    assert [row["group"] for row in rows] == [*groups, *averages]
    if gain:
        assert rows[len(groups)]["published_gain"] == {"DIFF - Transformer (paper)": pytest.approx(gain)}


def test_one_query_in_many_orders_is_one_example(evaluated):
    for run, right in (("a", 0.0), ("b", 1.0)):
        records = [
            {"id": f"trec/random/0/{order}/{query}", "group": "trec random", "order": order, "scores": {"accuracy": right * (query % 2)}}
            for order in range(10)
            for query in range(12)
        ]
        evaluated(run, records, "icl_order", metrics={("trec", "random max - min"): 0.2 - 0.1 * right, ("trec", "nothing"): None})
    figures = compared("a", "b", "suite=icl_order")
    row = row_of(figures, "trec random", "accuracy")
    assert row["n"] == 12 and row["difference"] == 0.5
    spread = row_of(figures, "trec", "random max - min")  # no mean over examples: no interval
    assert spread["difference"] == pytest.approx(-0.1) and spread["low"] is None and spread["n"] == 0
    assert spread["published_gain"] == {"DIFF - Transformer (paper)": -0.15}
    assert len(figures["comparisons"][0]["rows"]) == 2


def test_the_same_needles_at_several_lengths_are_one_example(evaluated):
    for run, right in (("a", 0.0), ("b", 1.0)):
        records = [
            {"id": f"N=1 R=1/T={length}/depth=0/{n}", "group": "N=1 R=1", "length": length, "scores": {"greedy": right * (length > 100)}}
            for length in (100, 200)
            for n in range(12)
        ]
        evaluated(run, records, "retrieval")
    row = row_of(compared("a", "b", "suite=retrieval"), "N=1 R=1", "greedy")
    assert row["n"] == 12 and row["difference"] == 0.5


def test_what_is_no_mean_is_not_taken_for_one(evaluated):
    for run, scale in (("a", 2.0), ("b", 1.0)):
        records = [(f"{g}/{i}", g, {"top-1": scale * (i + 1)}) for g in ("attention logits", "hidden states") for i in range(12)]
        metrics = {("attention logits", "top-1"): scale * 12, ("hidden states", "top-1"): scale * 12}
        evaluated(run, records, "outliers", metrics=metrics)
    figures = compared("a", "b", "suite=outliers")
    scores = {(row["group"], row["score"]) for row in figures["comparisons"][0]["rows"]}
    assert scores == {(g, s) for g in ("attention logits", "hidden states") for s in ("top-1", "top-1, mean over examples")}
    assert row_of(figures, "hidden states", "top-1")["difference"] == -12
    assert figures["comparisons"][0]["sentences"][1].startswith(
        "b scores lower than a on outliers top-1, mean over examples (hidden states): -6.500"
    )


@pytest.mark.parametrize(
    ("rates", "n", "sentence"),
    [
        ((0.5, 0.5), 50, "No difference can be told between b and a on retrieval greedy: +0.000 [+0.000, +0.000] over 50 examples."),
        ((0.9, 0.1), 50, "b scores lower than a on retrieval greedy: -0."),
        ((0.0, 1.0), 9, "No verdict on retrieval greedy: b differs from a by +1.000 in too few examples (9)."),
        ((0.0, 1.0), 1, "No verdict on retrieval greedy: b differs from a by +1.000 in too few examples (1)."),
    ],
)
def test_sentences(evaluated, rates, n, sentence):
    for run, rate in zip("ab", rates, strict=True):
        evaluated(run, cells({"N=1 R=1": rate}, n))
    (said,) = compared("a", "b")["comparisons"][0]["sentences"]
    assert said.startswith(sentence)


def test_three_checkpoints_and_what_only_some_have(evaluated, capsys):
    evaluated("a", cells({"N=1 R=1": 0.4}))
    evaluated("b", [*cells({"N=1 R=1": 0.5})[:40], ("extra", "N=1 R=1", {"greedy": 1.0, "new": float("nan")})])
    evaluated("runs/hub/org--model@abc", cells({"N=1 R=1": 0.8}), step=0)
    figures = compared("a", "b", "org/model")
    assert [row_of(figures, "N=1 R=1", rival=i)["n"] for i in (0, 1)] == [40, 100]
    out = capsys.readouterr().out
    assert "61 scores that not both of a and b have are left out" in out and "retrieval: org/model against a (step 20)" in out


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
    """Records of `suite=speed`: seven rounds in each shape, whose noise is the same for all models."""
    noise = np.exp(np.random.default_rng(0).normal(0, 0.02, 7))
    return [
        {
            "id": shape,
            "group": shape,
            "rounds": {name.replace("_", " ") + " tokens/s": (1000 * factor * noise).tolist() for name, factor in factors.items()},
            "scores": {name.replace("_", " ") + " tokens/s": 1000 * factor for name, factor in factors.items()},
        }
        for shape in shapes
    ]


def test_what_the_second_map_costs(evaluated, make_run, capsys):
    shapes = ["B=1 T=512", "B=8 T=512"]
    for run, kind, final, speed in (("a", "transformer", 4.0, 1.0), ("b", "diff_v1", 0.0, 0.8)):
        make_run(run, kind, curve=[(0, 8.0), (1000, final)])
        sizes = {("model", "parameters"): 1_000_000.0 + 600 * (run == "b")}
        evaluated(run, rounds(shapes, train=speed, prefill=2 - speed, decode=1.0), "speed", metrics=sizes)
    figures = compared("a", "b", "suite=speed")
    row = row_of(figures, "average", "train tokens/s")
    assert (row["difference"], row["n"]) == (pytest.approx(0.8), 14) and row["low"] == pytest.approx(0.8)
    assert figures["what"] == "ratio" and len(figures["comparisons"][0]["rows"]) == 9
    sentences = figures["comparisons"][0]["sentences"]
    assert sentences[0] == (
        "train, at equal parameters (1M and 1M): b does 0.800 [0.800, 0.800] of a's tokens a second; 0.800 to 0.800 by shape."
    )
    assert sentences[1].startswith(  # half of the tokens at 0.8 of the speed
        "train, at equal loss (4.0000): b needs 50.0% of a's tokens at 0.800 of its speed, which is 62.5% of its time: less."
    )
    assert (
        "So at equal parameters (1M and 1M) b is slower at train; faster at prefill; neither clearly slower nor faster at decode"
        in sentences[-2]
    )
    assert "0.916 (3B, 2K tokens)" in capsys.readouterr().out
    assert imread("compare-speed.png").std() > 0.05


def test_speed_of_models_that_are_no_runs(evaluated, capsys):
    for run, size in (("a", 1e6), ("b", 2e6)):
        folder = evaluated(run, rounds(["B=1 T=512"], decode=1.0), "speed", metrics={("model", "parameters"): size})
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(results | {"device": run}))
    (first, last, _) = compared("a", "b", "suite=speed")["comparisons"][0]["sentences"]
    assert "unequal parameters (1M and 2M)" in first and "by shape" not in first and last.startswith("So at unequal")
    assert "different devices" in capsys.readouterr().out


def test_different_judges_are_said(evaluated, capsys):
    for run in "ab":
        folder = evaluated(run, cells({"xsum": 0.5}, name="faithful"), "hallucination")
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(results | {"judge": {"kind": "endpoint", "model": run}}))
    compare_evaluations(["a", "b", "suite=hallucination"])
    assert "a and b had different judges" in capsys.readouterr().out


@pytest.mark.parametrize("runs", [["a", "b"], ["runs/diff_v1_of_a_long_name_in_a_folder", "b", "c"]])
def test_the_note_is_whole_where_there_is_one_panel(evaluated, monkeypatch, runs):
    for run in runs:
        evaluated(run, cells({"synthetic 1 shots": 0.5}, n=12, name="accuracy"), "icl")
    drawn = []
    monkeypatch.setattr(evals_picture, "Figure", lambda **settings: drawn.append(Figure(**settings)) or drawn[-1])
    compared(*runs, "suite=icl")
    (canvas,) = drawn
    canvas.draw_without_rendering()
    note = canvas.legends[0].get_title()
    assert " ".join(note.get_text().split()).endswith("diamonds: averages")
    box = note.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= canvas.bbox.x1 and box.y1 < canvas.axes[0].get_tightbbox().y0


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
    bad("a suite=retrieval", "suite=retrieval", "two or more")
    bad("a a suite=retrieval", "two or more")
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
    assert not list(tmp_path.glob("compare*"))


def test_damaged_records_are_one_line(evaluated):
    folder = evaluated("a", cells({"N=1 R=1": 0.5}))
    evaluated("b", cells({"N=1 R=1": 0.5}))
    path = folder / "records.jsonl.zst"
    path.write_bytes(path.read_bytes()[:20] + b"xx")
    bad("a b suite=retrieval", "records.jsonl.zst cannot be used", "force=true")


def test_the_command_takes_both_kinds(evaluated, capsys, tmp_path):
    for run in "ab":
        evaluated(run, cells({"N=1 R=1": 0.5}))
    assert main(["compare", "a", "b", "suite=retrieval", "--out", "shown/x.png"]) == 0
    assert (tmp_path / "shown/x.png").exists() and (tmp_path / "shown/x.json").exists()
    assert main(["compare", "a", "b"]) == 2  # no runs
    assert "config.yaml" in capsys.readouterr().err
