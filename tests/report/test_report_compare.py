import json

import pytest
from matplotlib.image import imread

from diffx.config import RunError, UserError
from diffx.report.compare import compare_runs
from diffx.report.findings import analyse
from diffx.report.runs import group_runs, read_runs


def line(final, start=8.0, points=5, tokens=1000):
    """A straight validation curve from `start` to `final`."""
    return [(i * tokens // (points - 1), start + (final - start) * i / (points - 1)) for i in range(points)]


def report_of(*folders):
    return analyse(group_runs(read_runs(folders)))


@pytest.fixture
def architectures(make_run, tmp_path):
    """Two architectures, three seeds: `diff_v1` is better by .1, .2 and .3."""
    for seed in range(3):
        make_run(f"sweep/{seed}", "diff_v1", curve=line(3.9 - 0.05 * seed), seed=seed)
        make_run(f"sweep/{seed + 3}", "transformer", curve=line(4.0 + 0.05 * seed), seed=seed, parameters=2_000_000)
    return tmp_path / "sweep"


def test_table_picture_and_figures(architectures, capsys):
    compare_runs([architectures])
    out = " ".join(capsys.readouterr().out.split())
    assert "transformer" in out and "2M" in out and "4.0500 ± 0.0500 (n=3)" in out and "baseline" in out
    assert "-0.2000 [-0.4484, +0.0484]" in out  # mean ± t(2) · .1 / sqrt(3)
    assert "No winner: diff_v1 ends 0.2000 nats a token below transformer" in out and "includes zero" in out
    figures = json.loads((architectures / "compare.json").read_text())
    assert [group["label"] for group in figures["groups"]] == ["diff_v1", "transformer"]
    assert figures["groups"][0]["val/loss"]["by_seed"] == {"0": pytest.approx(3.9), "1": pytest.approx(3.85), "2": pytest.approx(3.8)}
    picture = imread(architectures / "compare.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1500 and picture.std() > 0.05
    assert sorted(p.name for p in architectures.iterdir() if not p.name.isdecimal()) == ["compare.json", "compare.png"]


def test_the_winner_is_named_when_the_interval_excludes_zero(make_run):
    runs = [make_run(f"t{seed}", curve=line(4.0 + 0.1 * seed), seed=seed) for seed in range(3)]
    runs += [make_run(f"w{seed}", "transformer_wide_head", curve=line(4.2 + 0.1 * seed + 0.001 * seed), seed=seed) for seed in range(3)]
    sentences = report_of(*runs)["sentences"]
    assert sentences[0].startswith("transformer wins: transformer_wide_head ends 0.2010 nats a token above transformer")
    assert "excludes zero" in sentences[0]


def test_token_ratio_is_of_the_group_to_the_baseline(make_run):
    base, better, worse = (
        make_run("t", curve=line(4.0)),
        make_run("d", "diff_v1", curve=line(0.0)),
        make_run("w", "diff_v2", curve=line(6.0)),
    )
    groups = report_of(base, better, worse)["groups"]
    assert [g["tokens_at_equal_loss"] and g["tokens_at_equal_loss"]["ratio"] for g in groups] == [None, 0.5, 2.0]
    assert groups[1]["tokens_at_equal_loss"]["sentence"] == (
        "diff_v1 reaches transformer's final loss of 4.0000 with 500 tokens instead of 1K: "
        "diff_v1 needs 50.0% of transformer's tokens at equal loss."
    )
    assert (
        "transformer reaches diff_v2's final loss of 6.0000 with 500 tokens instead of 1K" in groups[2]["tokens_at_equal_loss"]["sentence"]
    )


def test_scaling_fit_and_parameter_ratio(make_run, tmp_path, capsys):
    sizes = {64: 100_000, 128: 400_000, 192: 1_000_000, 256: 2_000_000}
    for kind, a in (("transformer", 20.0), ("diff_v1", 19.0)):
        for hidden, n in sizes.items():
            make_run(f"sweep/{kind == 'diff_v1':d}{hidden}", kind, curve=line(a * n**-0.15 + 1.5), parameters=n, hidden_size=hidden)
    compare_runs([tmp_path / "sweep"])
    report = json.loads((tmp_path / "sweep/compare.json").read_text())
    first, second = report["scaling"]["laws"]
    assert (first["kind"], first["a"], first["b"], first["c"]) == ("transformer", *(pytest.approx(x, rel=1e-3) for x in (20, 0.15, 1.5)))
    assert second["a"] == pytest.approx(19, rel=1e-3)
    (pair,) = report["scaling"]["equal_loss"]
    assert pair["ratio"] == pytest.approx((19 / 20) ** (1 / 0.15), rel=1e-3) and not pair["extrapolated"]
    assert "71.0% of the parameters" in capsys.readouterr().out
    # Each size is held against the transformer of that size.
    assert {g["label"]: g["baseline"] for g in report["groups"]}["diff_v1 hidden_size=64"] == "transformer hidden_size=64"


def test_a_worse_architecture_is_extrapolated_and_says_so(make_run):
    runs = [
        make_run(f"{kind}{hidden}", kind, curve=line(a * n**-0.1), parameters=n, hidden_size=hidden)
        for kind, a in (("transformer", 20.0), ("diff_v2", 21.0))
        for hidden, n in ((64, 10**5), (128, 10**6), (256, 10**7))
    ]
    (pair,) = report_of(*runs)["scaling"]["equal_loss"]
    assert pair["ratio"] == pytest.approx(1.05**10) and pair["extrapolated"] and "extrapolated" in pair["sentence"]


def test_what_cannot_be_compared_is_said(make_run):
    a = make_run("a", curve=line(4.0), sha256="aa")
    b = make_run("b", "diff_v1", curve=line(3.0, tokens=500), sha256="bb", train={"lr": 0.001}, finished=False)
    warnings = "\n".join(report_of(a, b)["warnings"])
    assert "b is still going or was stopped (step 4 of 100): it is used as far as it got" in warnings
    assert "different data" in warnings and "different token counts, 500 and 1K" in warnings
    assert "train.lr is 0.005 and 0.001" in warnings
    assert report_of(a)["warnings"] == []


def test_an_unfinished_run_does_not_blur_its_finished_group(make_run):
    done, going = make_run("a", curve=line(4.0), seed=0), make_run("b", curve=line(4.0)[:2], seed=1, finished=False)
    report = report_of(done, going)
    assert report["groups"][0]["seeds"] == [0] and "it is left out" in report["warnings"][0]


def test_runs_without_a_validation_are_left_out(make_run, tmp_path, capsys):
    empty = make_run("empty", curve=[], finished=False)
    with pytest.raises(UserError, match="no run given has a validation"):
        compare_runs([empty])
    compare_runs([empty, make_run("a", curve=line(4.0))], tmp_path / "new" / "x.png")
    assert "empty is left out" in capsys.readouterr().out.replace("\n", "") and (tmp_path / "new/x.json").exists()


def test_the_picture_goes_where_it_is_asked_to(make_run, tmp_path, monkeypatch):
    run = make_run("a", curve=line(4.0))
    with pytest.raises(UserError, match=r"out=.*x\.txt cannot be used"):
        compare_runs([run], tmp_path / "x.txt")
    monkeypatch.chdir(tmp_path)
    compare_runs([run])
    assert (tmp_path / "compare.png").exists() and not (run / "compare.png").exists()


def test_a_picture_that_cannot_be_written_is_one_line(make_run, tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(RunError, match=r"x\.png cannot be written: "):
        compare_runs([make_run("a", curve=line(4.0))], tmp_path / "x.png")
