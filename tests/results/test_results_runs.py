import json
import subprocess
import sys

import numpy as np
import pytest

from diffx.config import UserError
from diffx.results.runs import group_runs, read_run, read_runs, sweep_jobs

CURVE = [(0, 7.0), (100, 5.0), (200, 4.0)]


def test_a_run_reads_back(make_run):
    run = read_run(make_run("a", "diff_v1", curve=CURVE, seed=3, lambda_init=0.8))
    assert run.finished and run.job.seed == 3 and run.job.model.lambda_init == 0.8
    tokens, losses = run.curve("val/loss")
    assert tokens.tolist() == [0, 100, 200] and losses.tolist() == [7.0, 5.0, 4.0]


def test_a_killed_run_with_a_torn_last_line_reads_as_far_as_it_got(make_run):
    folder = make_run("a", curve=CURVE, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tokens": 300, "val/lo')
    run = read_run(folder)
    assert not run.finished and run.curve("val/loss")[0].tolist() == [0, 100, 200]


def test_a_run_resumed_for_more_steps_is_not_finished_by_its_old_summary(make_run):
    folder = make_run("a", curve=CURVE, steps=100)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"step": 50}))
    assert not read_run(folder).finished


@pytest.mark.parametrize("line", ["{torn\n", "[1, 2]\n", '{"step": 1}\n'])
def test_a_damaged_line_is_named(make_run, line):
    folder = make_run("a", curve=CURVE)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + line + '{"step": 9, "tokens": 9}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl.*line 4"):
        read_run(folder)


def test_a_damaged_last_line_with_its_newline_was_not_torn_by_a_kill(make_run):
    folder = make_run("a", curve=CURVE)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{torn\n")
    with pytest.raises(UserError, match="line 4"):
        read_run(folder)


def test_what_is_no_run_is_refused_in_one_line(make_run, tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"it has no config\.yaml"):
        read_run(tmp_path)
    folder = make_run("a", curve=CURVE)
    (folder / "summary.json").write_text('{"finished"')
    with pytest.raises(UserError, match=r"summary\.json") as error:
        read_run(folder)
    assert "\n" not in str(error.value)


def test_a_sweep_folder_is_its_jobs_in_order_and_a_run_named_twice_counts_once(make_run, tmp_path):
    for number in (10, 2, 0):
        make_run(f"sweep/{number}", curve=CURVE, seed=number)
    (tmp_path / "sweep/1").mkdir()  # a job that was refused before it made its config
    (tmp_path / "sweep/plots").mkdir()
    sweep = tmp_path / "sweep"
    assert [p.name for p in sweep_jobs(sweep)] == ["0", "2", "10"]
    assert sweep_jobs(sweep / "0") == []
    assert [run.job.seed for run in read_runs([sweep, sweep / "2"])] == [0, 2, 10]


def test_runs_that_differ_in_seed_alone_share_a_group(make_run):
    runs = [
        make_run("a0", curve=CURVE, seed=0),
        make_run("b0", "diff_v1", curve=CURVE, seed=0),
        make_run("a1", curve=CURVE, seed=1, train={"log_every": 7, "keep_last": 5}),
    ]
    groups = group_runs(read_runs(runs))
    assert [(g.label, list(g.final("val/loss"))) for g in groups] == [
        ("transformer", [0, 1]),
        ("diff_v1", [0]),
    ]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        (
            [{}, {"kind": "diff_v1"}, {"kind": "diff_v1", "lambda_init": 0.8}],
            ["transformer", "diff_v1", "diff_v1 lambda_init=0.8"],
        ),
        (
            [{"kind": "diff_v1"}, {"kind": "diff_v1", "sublayer_norm": False, "lambda_init": 0.5}],
            ["diff_v1", "diff_v1 lambda_init=0.5 sublayer_norm=false"],
        ),
        (
            [
                {"hidden_size": 128, "num_layers": 2},
                {"hidden_size": 256},
                {"kind": "diff_v2", "hidden_size": 256},
            ],
            [
                "transformer hidden_size=128",
                "transformer hidden_size=256",
                "diff_v2 hidden_size=256",
            ],
        ),
        (
            [{"train": {"lr": 0.001}}, {"kind": "diff_v1"}],
            ["transformer lr=0.001", "diff_v1 lr=0.005"],
        ),
        (
            [{"steps": 100}, {"steps": 100, "train": {"eval_every": 3}}, {"steps": 200}],
            ["transformer steps=100", "transformer steps=200"],
        ),
    ],
)
def test_labels_name_what_sets_groups_apart(make_run, settings, labels):
    runs = [make_run(str(i), curve=CURVE, **s) for i, s in enumerate(settings)]
    assert [group.label for group in group_runs(read_runs(runs))] == labels


def test_curves_of_different_cadence_meet_on_one_grid(make_run):
    runs = [
        make_run("a", curve=[(0, 8.0), (100, 6.0), (200, 4.0)], seed=0),
        make_run("b", curve=[(0, 8.0), (150, 2.0)], seed=1),
    ]
    (group,) = group_runs(read_runs(runs))
    tokens, losses = group.curves()
    assert tokens.tolist() == [0, 100, 150]
    np.testing.assert_allclose(losses, [[8, 6, 5], [8, 4, 2]])


def test_the_room_imports_no_torch():
    code = "import sys, diffx.report.compare, diffx.results.read; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
