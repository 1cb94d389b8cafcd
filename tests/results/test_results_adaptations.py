"""Comparison of adaptations with the base and attn_only, beside the spread over seeds."""

import json

import pytest

from diffx.config import UserError
from diffx.config.bridge import save_config
from diffx.config.data import StdlibData
from diffx.config.dex import AdaptJob, DexConfig, Init, Variant
from diffx.config.train import TrainConfig
from diffx.report.compare import compare_runs
from diffx.results.runs import group_runs, read_runs
from diffx.results.training import analyse

SEEDS = (0, 1, 2)
SHIFT = (0.01, 0.0, -0.01)  # what a seed's data does to every variant's loss alike
OWN = (0.001, -0.001, 0.0)  # what it does to one variant alone


@pytest.fixture
def adapt_run(tmp_path):
    def make(
        name,
        variant="dex",
        final=2.9,
        *,
        start=3.0,
        seed=0,
        base="models/x",
        steps=10,
        branch=None,
        **dex,
    ):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        job = AdaptJob(
            base=base,
            dex=DexConfig(variant=Variant(variant), **dex),
            data=StdlibData(),
            train=TrainConfig(steps=steps, sample_tokens=0),
            seed=seed,
        )
        save_config(job, folder / "config.yaml")
        curve = [(0, start), (500, (start + final) / 2), (1000, final)]
        lines = [
            {"step": tokens // 100, "tokens": tokens, "val/loss": loss, "val/bpb": loss / 2}
            for tokens, loss in curve
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "data.json").write_text(json.dumps({"sha256": "aa"}))
        counts = {"trained": 1234, "embedding": 500, "rest": 1500, "total": 2000}
        (folder / "summary.json").write_text(
            json.dumps({"finished": True, "step": steps, "parameters": counts, "branch": branch})
        )
        return folder

    return make


@pytest.fixture
def controls(adapt_run, tmp_path):
    """Runs of each variant and seed, with these gains over the base."""
    gains = {
        "dex": 0.1005,
        "attn_only": 0.1,
        "adapter_only": 0.004,
        "full": 0.15,
        "lora": 0.101,
        "dex_mirror": 0.1005,
    }
    for number, (variant, gain) in enumerate(gains.items()):
        for seed in SEEDS:
            final = 3.0 - gain + SHIFT[seed] + (OWN[seed] if variant == "lora" else 0)
            branch = "the branch is OFF at the end" if Variant(variant).branches else None
            adapt_run(
                f"sweep/{10 * number + seed}",
                variant,
                final,
                seed=seed,
                branch=branch,
                init=Init.linear,
            )
    return tmp_path / "sweep"


def report_of(*folders):
    return analyse(group_runs(read_runs(folders)))


def test_table_picture_and_sentences(controls, capsys):
    compare_runs([controls])
    printed = " ".join(capsys.readouterr().out.split())
    figures = json.loads((controls / "compare.json").read_text())
    rows = {row["label"]: row for row in figures["groups"]}
    assert list(rows) == ["base", "dex", "attn_only", "adapter_only", "full", "lora", "dex_mirror"]
    assert (
        rows["base"]["val/loss"]["mean"] == 3.0
        and rows["base"]["tokens"] == 0
        and rows["base"]["difference_to_base"] is None
    )
    assert all(row["baseline"] == "attn_only" for row in rows.values())
    # The seeds change dex and attn_only alike: paired, their difference is certain, yet small.
    gap = rows["dex"]["difference"]
    assert [gap[key] for key in ("mean", "low", "high")] == pytest.approx([-0.0005] * 3) and gap[
        "pairs"
    ] == 3
    to_base = rows["dex"]["difference_to_base"]
    half = 4.302653 * 0.01 / 3**0.5  # Student's t(2), from a table
    assert (to_base["mean"], to_base["low"], to_base["high"]) == pytest.approx(
        (-0.1005, -0.1005 - half, -0.1005 + half), abs=1e-6
    )
    assert figures["noise_floor"] == pytest.approx(0.01, rel=1e-6)
    for sentence in (
        "Noise floor: 0.0100 nats a token",
        "by more than the noise, with intervals that exclude zero: "
        "adapter_only (0.0960 worse), full (0.0500 better).",
        "Different by less than the noise, though the interval excludes zero: dex (0.0005 better).",
        "Not to be told from attn_only: lora.",
        "dex ends 0.1005 nats a token below the base; attn_only, which has no branch, "
        "gains 100% of that.",
        "dex, seed 0: the branch is OFF at the end.",
        "dex and its mirror image dex_mirror end with the same loss, as they must "
        "(to the last digit).",
        "to the base", "1.23K", "-0.1005 [-0.1253, -0.0757]",
    ):  # fmt: skip
        assert sentence in printed
    assert (
        "wins" not in printed
        and "equal loss" not in printed
        and (controls / "compare.png").stat().st_size > 20_000
    )


def test_a_broken_mirror_is_a_warning(adapt_run):
    report = report_of(adapt_run("a", "dex", 2.9), adapt_run("b", "dex_mirror", 2.91))
    (warning,) = report["warnings"]
    assert warning.startswith(
        "dex and its mirror image dex_mirror end up to 0.01 nats a token apart"
    )
    assert not any("mirror" in sentence for sentence in report["sentences"])


def test_one_seed_says_that_there_is_no_noise_floor(adapt_run):
    report = report_of(adapt_run("a", "dex", 3.1), adapt_run("b", "attn_only", 2.9))
    assert report["noise_floor"] is None and report["sentences"][0].startswith("One seed each")
    assert (
        "dex ends 0.1000 nats a token above the base: it made it no better." in report["sentences"]
    )


def test_without_attn_only_the_base_is_the_baseline(adapt_run):
    report = report_of(*(adapt_run(f"{seed}", "dex", 2.9, seed=seed) for seed in SEEDS))
    assert [row["baseline"] for row in report["groups"]] == ["base", "base"]
    assert (
        "without attn_only there is no telling what the branch has to do with it"
        in report["sentences"][1]
    )


def test_options_that_a_variant_does_not_read_do_not_set_it_apart(adapt_run):
    runs = [
        adapt_run("a0", "attn_only"),
        adapt_run("a1", "attn_only", seed=1, init=Init.linear, heads="all", lora_rank=4),
    ]
    runs += [adapt_run("l4", "lora", lora_rank=4), adapt_run("l8", "lora", lora_rank=8, k=1)]
    runs += [
        adapt_run("d", "dex", init=Init.linear),
        adapt_run("dk", "dex", k=1),
        adapt_run("f", "fixed_lambda", init=Init.linear),
    ]
    groups = group_runs(read_runs(runs))
    assert [group.label for group in groups] == [
        "attn_only", "lora lora_rank=4", "lora lora_rank=8", "dex init=linear", "dex k=1",
        "fixed_lambda",
    ]  # fmt: skip
    assert len(groups[0].runs) == 2


def test_each_base_has_its_row(adapt_run):
    runs = [
        adapt_run(f"{base}{variant}", variant, start=start, base=base)
        for base, start in (("x", 3.0), ("y", 4.0))
        for variant in ("dex", "attn_only")
    ]
    report = report_of(*runs)
    rows = {row["label"]: row for row in report["groups"]}
    assert list(rows) == [
        "base base=x",
        "base base=y",
        "dex base=x",
        "attn_only base=x",
        "dex base=y",
        "attn_only base=y",
    ]
    assert rows["dex base=y"]["baseline"] == "attn_only base=y"
    assert (
        rows["dex base=y"]["difference_to_base"]["mean"] == pytest.approx(-1.1)
        and rows["base base=y"]["val/loss"]["mean"] == 4.0
    )


def test_trained_and_adapted_runs_are_not_compared(adapt_run, make_run):
    with pytest.raises(
        UserError,
        match=r"RUN=.*b cannot be compared with .*a: one was trained from nothing, "
        r"the other is an adaptation",
    ):
        read_runs([make_run("a", curve=[(0, 4.0)]), adapt_run("b")])
