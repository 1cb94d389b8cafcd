import json

import pytest
from matplotlib.image import imread

from diffx.config import RunError, UserError
from diffx.report.compare import compare_runs


def line(final, start=8.0, points=5, tokens=1000):
    """A straight validation curve from `start` to `final`."""
    return [
        (i * tokens // (points - 1), start + (final - start) * i / (points - 1))
        for i in range(points)
    ]


@pytest.fixture
def architectures(make_run, tmp_path):
    """Two architectures, three seeds: `diff_v1` is better by .1, .2 and .3."""
    for seed in range(3):
        make_run(f"sweep/{seed}", "diff_v1", curve=line(3.9 - 0.05 * seed), seed=seed)
        make_run(
            f"sweep/{seed + 3}",
            "transformer",
            curve=line(4.0 + 0.05 * seed),
            seed=seed,
            parameters=2_000_000,
        )
    return tmp_path / "sweep"


def test_table_picture_and_figures(architectures, capsys):
    compare_runs([architectures])
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "transformer" in out
        and "2M" in out
        and "4.0500 ± 0.0500 (n=3)" in out
        and "baseline" in out
    )
    assert "-0.2000 [-0.4484, +0.0484]" in out  # mean ± t(2) · .1 / sqrt(3)
    assert (
        "No winner: diff_v1 ends 0.2000 nats a token below transformer" in out
        and "includes zero" in out
    )
    figures = json.loads((architectures / "compare.json").read_text())
    assert [group["label"] for group in figures["groups"]] == ["diff_v1", "transformer"]
    assert figures["groups"][0]["val/loss"]["by_seed"] == {
        "0": pytest.approx(3.9),
        "1": pytest.approx(3.85),
        "2": pytest.approx(3.8),
    }
    picture = imread(architectures / "compare.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1500 and picture.std() > 0.05
    assert sorted(p.name for p in architectures.iterdir() if not p.name.isdecimal()) == [
        "compare.json",
        "compare.png",
    ]


def test_scaling_fit_and_parameter_ratio(make_run, tmp_path, capsys):
    sizes = {64: 100_000, 128: 400_000, 192: 1_000_000, 256: 2_000_000}
    for kind, a in (("transformer", 20.0), ("diff_v1", 19.0)):
        for hidden, n in sizes.items():
            make_run(
                f"sweep/{kind == 'diff_v1':d}{hidden}",
                kind,
                curve=line(a * n**-0.15 + 1.5),
                parameters=n,
                hidden_size=hidden,
            )
    compare_runs([tmp_path / "sweep"])
    report = json.loads((tmp_path / "sweep/compare.json").read_text())
    first, second = report["scaling"]["laws"]
    assert (first["kind"], first["a"], first["b"], first["c"]) == (
        "transformer",
        *(pytest.approx(x, rel=1e-3) for x in (20, 0.15, 1.5)),
    )
    assert second["a"] == pytest.approx(19, rel=1e-3)
    (pair,) = report["scaling"]["equal_loss"]
    assert (
        pair["ratio"] == pytest.approx((19 / 20) ** (1 / 0.15), rel=1e-3)
        and not pair["extrapolated"]
    )
    assert "71.0% of the parameters" in capsys.readouterr().out
    # Each size is held against the transformer of that size.
    assert {g["label"]: g["baseline"] for g in report["groups"]}[
        "diff_v1 hidden_size=64"
    ] == "transformer hidden_size=64"


def test_runs_without_a_validation_are_left_out(make_run, tmp_path, capsys):
    empty = make_run("empty", curve=[], finished=False)
    with pytest.raises(UserError, match="no run given has a validation"):
        compare_runs([empty])
    compare_runs([empty, make_run("a", curve=line(4.0))], tmp_path / "new" / "x.png")
    assert (
        "empty is left out" in capsys.readouterr().out.replace("\n", "")
        and (tmp_path / "new/x.json").exists()
    )


def test_a_picture_is_made_where_it_is_asked_for(make_run, tmp_path, monkeypatch, capsys):
    run = make_run("a", curve=line(4.0))
    with pytest.raises(UserError, match=r"out=.*x\.txt cannot be used"):
        compare_runs([run], tmp_path / "x.txt")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    compare_runs([run])
    assert set(tmp_path.rglob("*")) == before and "--out" in capsys.readouterr().out
    compare_runs([run], tmp_path / "new" / "x.svg")
    assert (tmp_path / "new/x.svg").read_text().startswith("<?xml") and (
        tmp_path / "new/x.json"
    ).exists()


def test_a_picture_that_cannot_be_written_is_one_line(make_run, tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(RunError, match=r"x\.png cannot be written: "):
        compare_runs([make_run("a", curve=line(4.0))], tmp_path / "x.png")
