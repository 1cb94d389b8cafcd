import pytest

from diffx.results.runs import group_runs, read_runs
from diffx.results.training import analyse


def line(final, start=8.0, points=5, tokens=1000):
    """A straight validation curve from `start` to `final`."""
    return [
        (i * tokens // (points - 1), start + (final - start) * i / (points - 1))
        for i in range(points)
    ]


def report_of(*folders):
    return analyse(group_runs(read_runs(folders)))


def test_the_winner_is_named_when_the_interval_excludes_zero(make_run):
    runs = [make_run(f"t{seed}", curve=line(4.0 + 0.1 * seed), seed=seed) for seed in range(3)]
    runs += [
        make_run(
            f"w{seed}",
            "transformer_wide_head",
            curve=line(4.2 + 0.1 * seed + 0.001 * seed),
            seed=seed,
        )
        for seed in range(3)
    ]
    sentences = report_of(*runs)["sentences"]
    assert sentences[0].startswith(
        "transformer wins: transformer_wide_head ends 0.2010 nats a token above transformer"
    )
    assert "excludes zero" in sentences[0]


def test_token_ratio_is_of_the_group_to_the_baseline(make_run):
    base, better, worse = (
        make_run("t", curve=line(4.0)),
        make_run("d", "diff_v1", curve=line(0.0)),
        make_run("w", "diff_v2", curve=line(6.0)),
    )
    groups = report_of(base, better, worse)["groups"]
    assert [g["tokens_at_equal_loss"] and g["tokens_at_equal_loss"]["ratio"] for g in groups] == [
        None,
        0.5,
        2.0,
    ]
    assert groups[1]["tokens_at_equal_loss"]["sentence"] == (
        "diff_v1 reaches transformer's final loss of 4.0000 with 500 tokens instead of 1K: "
        "diff_v1 needs 50.0% of transformer's tokens at equal loss."
    )
    assert (
        "transformer reaches diff_v2's final loss of 6.0000 with 500 tokens instead of 1K"
        in groups[2]["tokens_at_equal_loss"]["sentence"]
    )


def test_a_worse_architecture_is_extrapolated_and_says_so(make_run):
    runs = [
        make_run(f"{kind}{hidden}", kind, curve=line(a * n**-0.1), parameters=n, hidden_size=hidden)
        for kind, a in (("transformer", 20.0), ("diff_v2", 21.0))
        for hidden, n in ((64, 10**5), (128, 10**6), (256, 10**7))
    ]
    (pair,) = report_of(*runs)["scaling"]["equal_loss"]
    assert (
        pair["ratio"] == pytest.approx(1.05**10)
        and pair["extrapolated"]
        and "extrapolated" in pair["sentence"]
    )


def test_what_cannot_be_compared_is_said(make_run):
    a = make_run("a", curve=line(4.0), sha256="aa")
    b = make_run(
        "b",
        "diff_v1",
        curve=line(3.0, tokens=500),
        sha256="bb",
        train={"lr": 0.001},
        finished=False,
    )
    warnings = "\n".join(report_of(a, b)["warnings"])
    assert (
        "b is still going or was stopped (step 4 of 100): it is used as far as it got" in warnings
    )
    assert "different data" in warnings and "different token counts, 500 and 1K" in warnings
    assert "train.lr is 0.005 and 0.001" in warnings
    assert report_of(a)["warnings"] == []


def test_an_unfinished_run_does_not_blur_its_finished_group(make_run):
    done, going = (
        make_run("a", curve=line(4.0), seed=0),
        make_run("b", curve=line(4.0)[:2], seed=1, finished=False),
    )
    report = report_of(done, going)
    assert report["groups"][0]["seeds"] == [0] and "it is left out" in report["warnings"][0]
