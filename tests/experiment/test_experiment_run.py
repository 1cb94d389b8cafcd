"""``diffx experiment`` from end to end on a claim of tiny runs."""

import json

import pandas as pd
import pytest
import yaml

from diffx.cli import main
from diffx.config.experiment import ExperimentJob
from diffx.experiment import claims
from diffx.experiment.claims import experiment_names, load_experiment
from diffx.experiment.plan import exported, make_bases, make_trials

TINY = [
    "tokenizer=bytes",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=4",
    "model.num_kv_heads=4",
    "train.steps=4",
    "train.seq_len=16",
    "train.batch_tokens=64",
    "train.sample_tokens=0",
    "data.val_tokens=500",
    "train.eval_every=2",
]
CLAIM = {
    "claim": "A claim.",
    "source": "a paper",
    "published": "a figure",
    "words": TINY,
    "arms": {"transformer": ["model=transformer"], "diff_v1": ["model=diff_v1"]},
    "measure": ["eval suite=long_context suite.texts=2 suite.length=16"],
    "effects": {
        "loss": {
            "candidate": ["diff_v1"],
            "baseline": ["transformer"],
            "select": {"source": "train", "metric": "val/loss"},
            "smallest": 0.01,
            "published": -0.025,
            "unit": "nats",
        },
        "others": {
            "candidate": ["diff_v1"],
            "baseline": ["transformer"],
            "select": {"source": "long_context", "metric": "nll/others"},
            "smallest": 0.01,
        },
    },
    "scales": {"laptop": {"seeds": 2}},
}
RUN = ["experiment", "run", "tiny", "dir=exp", "wandb.mode=disabled", "device=cpu"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder of claims that holds one; gives a function that changes it."""
    (tmp_path / "claims").mkdir()
    monkeypatch.setattr(claims, "CLAIMS", tmp_path / "claims")
    monkeypatch.setattr("diffx.experiment.report.RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        text = yaml.safe_dump(CLAIM | changes, sort_keys=False)
        (tmp_path / "claims" / "tiny.yaml").write_text(text)

    write()
    return write


def test_runs_are_trained_once_measured_and_judged(tiny, tmp_path, capsys):
    assert main([*RUN, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("model=diff_v1") == 2
    assert "4 runs, 0 of them done" in printed
    assert not (tmp_path / "exp").exists()

    assert main(RUN) == 0
    report = json.loads((tmp_path / "exp" / "tiny-laptop" / "report.json").read_text())
    assert [effect["name"] for effect in report["effects"]] == ["loss", "others"]
    assert report["runs"] == 4
    assert not report["rule_changed"]
    summaries = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "exp").glob("*/summary.json")
    }
    assert len(summaries) == 4
    losses = {
        (path.parent.name.split("-")[0], json.loads(path.read_text())["seed"]): json.loads(
            path.read_text()
        )["val/loss"]
        for path in summaries
    }
    loss = report["effects"][0]
    for seed in (0, 1):
        gap = losses["diff_v1", seed] - losses["transformer", seed]
        assert loss["by_seed"][str(seed)] == pytest.approx(gap)

    # Again: nothing is trained or measured, and the report is the same.
    measured = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "exp").glob("*/measured.json")
    }
    assert len(measured) == 4
    capsys.readouterr()
    assert main(RUN) == 0
    assert measured == {path: path.stat().st_mtime_ns for path in measured}
    assert summaries == {path: path.stat().st_mtime_ns for path in summaries}
    again = json.loads((tmp_path / "exp" / "tiny-laptop" / "report.json").read_text())
    assert again["effects"] == report["effects"]

    # From the rows alone, as others may send them.
    capsys.readouterr()
    rows = "exp/tiny-laptop/rows.parquet"
    assert main(["experiment", "report", "tiny", "--rows", rows]) == 0
    assert loss["sentence"] in " ".join(capsys.readouterr().out.split())
    assert set(pd.read_parquet(rows)["arm"]) == {"transformer", "diff_v1"}

    page = (tmp_path / "exp" / "tiny-laptop" / "README.md").read_text()
    assert "A claim." in page
    assert (tmp_path / "exp" / "tiny-laptop" / "figure.png").stat().st_size > 10_000

    # A rule that was changed after the runs is told.
    effects = {"loss": CLAIM["effects"]["loss"] | {"smallest": 5.0}}
    tiny(effects=effects)
    assert main(["experiment", "report", "tiny", "dir=exp"]) == 0
    assert "rule was changed" in capsys.readouterr().out
    changed = json.loads((tmp_path / "exp" / "tiny-laptop" / "report.json").read_text())
    assert changed["rule_changed"]

    assert main(["experiment", "list", "--dir", "exp"]) == 0
    assert "laptop: " in capsys.readouterr().out


def test_runs_are_shared_by_claims(tiny, tmp_path):
    """Another claim on the same runs, and on one more arm, finds them by their config."""
    job = ExperimentJob(name="tiny", dir="exp")
    folders = {(trial.arm, trial.seed): trial.folder for trial in make_trials(job)}
    arms = CLAIM["arms"] | {"no_norm": ["model=ablation/diff_v1_no_norm"]}
    tiny(arms=arms, claim="Another.")
    others = {(trial.arm, trial.seed): trial.folder for trial in make_trials(job)}
    assert folders.items() <= others.items()
    assert len({*others.values()}) == 6


def test_all_arms_of_a_seed_come_before_the_next_seed(tiny):
    trials = make_trials(ExperimentJob(name="tiny", seeds=[3, 5]))
    assert [(trial.seed, trial.arm) for trial in trials] == [
        (3, "transformer"),
        (3, "diff_v1"),
        (5, "transformer"),
        (5, "diff_v1"),
    ]


def test_an_arm_adapts_the_base_that_its_words_name():
    job = ExperimentJob(name="dex_families", seeds=[0, 1])
    bases = make_bases(job)
    assert {name: base.job.model.num_kv_heads for name, base in bases.items()} == {
        "first": 8,
        "second": 2,
    }
    for trial in make_trials(job):
        assert trial.job.base == str(exported(bases[trial.arm.partition(" ")[0]]))
    hub = ExperimentJob(name="dex_families", seeds=[0, 1], base="me/x")
    assert not make_bases(hub)
    assert {trial.job.base for trial in make_trials(hub)} == {"me/x"}
    gpu = ExperimentJob(name="dex_heads", scale="gpu", seeds=[0, 1])  # whose scale names a base
    assert not make_bases(gpu)
    assert {trial.job.base for trial in make_trials(gpu)} == {"HuggingFaceTB/SmolLM2-135M"}


@pytest.mark.parametrize("name", experiment_names())
def test_every_claim_composes_at_its_scales(name):
    experiment = load_experiment(name)
    assert experiment.effects
    for scale in experiment.scales:
        trials = make_trials(ExperimentJob(name=name, scale=scale, seeds=[0, 1]))
        assert len({trial.folder for trial in trials}) == len(trials)
        assert {trial.arm for trial in trials} >= {
            arm for effect in experiment.effects.values() for arm in effect.baseline
        }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "nothing"], ["nothing", "lm_loss"]),
        (["run", "lm_loss", "scale=pocket"], ["scale=pocket", "laptop"]),
        (["run", "lm_loss", "seeds=[1,x]"], ["seeds", "x"]),
        (["run", "lm_loss", "seeds=1"], ["seeds=1", "2 or more"]),
        (["run", "lm_loss", "seeds=[1,1]"], ["seeds=[1, 1]", "different"]),
        (["run", "lm_loss", "job=3"], ["job=3"]),
        (["run", "lm_loss", "train.steps=3"], ["train"]),
        (["report", "lm_loss", "dir=nowhere"], ["no run"]),
        (["report", "lm_loss", "--rows", "missing.parquet"], ["missing.parquet"]),
    ],
)
def test_bad_input_is_one_line(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in told)
    assert not [*tmp_path.iterdir()]
