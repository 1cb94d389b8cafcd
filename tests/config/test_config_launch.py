"""Config values, the user's config files, and sweeps, in which single jobs may fail."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra.types import RunMode

from diffx.config import RunError, UserError
from diffx.config.bridge import register_schemas
from diffx.config.composition import compose_config, composer
from diffx.config.launch import _plain_text, compose, launch
from diffx.console import Reporter


class Work:
    """A stand-in for training that records its jobs and raises the failure given for a seed."""

    def __init__(self, failures=None, losses=None):
        self.losses = losses or {}
        self.jobs, self.words, self.argv, self.failures = [], [], [], failures or {}

    def __call__(self, job, words):
        self.jobs.append(job)
        self.words.append(words)
        self.argv.append(sys.argv)
        if job.seed in self.failures:
            raise self.failures[job.seed]
        if job.run.dir is not None:
            Path(job.run.dir).mkdir()
            Reporter().line("hello")
        return self.losses.get(job.seed)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_words_reach_the_job_as_written(here, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diffx", "train", "as typed"])
    work = Work()
    words = [
        "train.lr=1e-4",
        "train.sample_prompt='a, b = c'",
        "data=text",
        "data.path=[a,'b c']",
        "run.name=${model.kind}",
    ]
    assert launch("train", work, words) == 0
    (job,) = work.jobs
    assert (job.train.lr, job.train.sample_prompt, job.data.path, job.run.name) == (
        1e-4,
        "a, b = c",
        ["a", "b c"],
        "diff_v1",
    )
    assert work.words == [words]
    assert work.argv == [["diffx", "train", "as typed"]] and sys.argv == work.argv[0]
    assert list(here.iterdir()) == [], "Hydra wrote something"


def test_logging_is_left_alone(caplog):
    log = logging.getLogger("diffx.somewhere")
    launch("train", lambda job, words: log.warning("heard"), [])
    assert "heard" in caplog.text


def test_a_deleted_group_is_asked_for():
    with pytest.raises(UserError, match="tokenizer is missing: give it as tokenizer="):
        launch("train", Work(), ["~tokenizer"])


def test_what_work_raises_comes_out_as_it_is(capfd):
    bug = KeyError("a bug")
    with pytest.raises(KeyError) as raised:
        launch("train", Work({0: bug}), [])
    assert raised.value is bug
    assert capfd.readouterr() == ("", ""), "Hydra had something to say"


def test_a_users_own_configs_come_first(here):
    for path, text in {
        "mine/size/nano.yaml": "# @package model\nhidden_size: 64\nnum_heads: 4\n",
        "mine/model/small.yaml": "defaults:\n  - diff_v2\n  - _self_\nhidden_size: 32\n",
        "mine/experiment/quick.yaml": "# @package _global_\ntrain:\n  steps: 5\n",
    }.items():
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_text(text)
    work = Work()
    launch("train", work, ["model=small", "experiment=quick"], config_dir=Path("mine"))
    launch("train", work, [])
    with_mine, without = work.jobs
    assert (with_mine.model.kind, with_mine.model.hidden_size, with_mine.train.steps) == (
        "diff_v2",
        64,
        5,
    )
    assert without.model.hidden_size == 96, "the folder outlived its command"


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("train:\n  steps: [5\n", ["experiment/odd.yaml", "line 3"]),
        ("train:\n  stepz: 5\n", ["experiment/odd", "train.stepz", "train.steps"]),
        ("train:\n  lr: fast\n", ["experiment/odd", "train.lr=fast", "a number"]),
        ("train:\n  lr: ${nowhere}\n", ["train.lr", "nowhere"]),
        ("defaults:\n  - override /model: diff_v9\n", ["model=diff_v9", "diff_v1"]),
        ("defaults:\n  - nowhere\n", ["experiment/odd", "experiment=nowhere"]),
        ("extra: 1\n", ["experiment/odd", "extra is not a key"]),
        ("\udcff", ["a config file cannot be read"]),
    ],
)
def test_a_slip_in_a_users_config_is_one_line(here, text, mentions):
    folder = here / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "odd.yaml").write_text("# @package _global_\n" + text, errors="surrogateescape")
    with pytest.raises(UserError) as refused:
        launch("train", Work(), ["experiment=odd"], config_dir=here / "mine")
    assert "\n" not in str(refused.value)
    for mention in mentions:
        assert mention in str(refused.value)


def test_a_sweep_gives_each_job_its_folder_and_one_group(here):
    work = Work()
    assert launch("train", work, ["model=transformer,diff_v1", "seed=3,4"], multirun=True) == 0
    (sweep,) = (here / "runs").iterdir()
    assert [(job.model.kind, job.seed) for job in work.jobs] == [
        (m, s) for m in ("transformer", "diff_v1") for s in (3, 4)
    ]
    assert [job.run.dir for job in work.jobs] == [
        f"runs/{sweep.name}/{number}" for number in range(4)
    ]
    assert {job.wandb.group for job in work.jobs} == {sweep.name}
    assert not set("=,") & set(sweep.name)
    assert work.words[1] == ["model=transformer", "seed=4"]
    assert sorted(path.name for path in sweep.iterdir()) == [
        "0",
        "1",
        "2",
        "3",
        "jobs.jsonl",
        "multirun.yaml",
    ]


def test_a_sweep_names_its_jobs_and_ends_with_a_table(here, capfd):
    def best(job, words):
        if job.seed == 2:  # as Hydra's sweeper for optuna writes it, at its end
            Path("s/optimization_results.yaml").write_text(
                "name: optuna\nbest_params:\n  seed: 1\nbest_value: 2.5\n"
            )
        return work(job, words)

    work = Work({2: UserError("bad input")}, {0: 2.75, 1: 2.5})
    words = ["train.steps=5", "seed=0,1,2", "hydra.sweep.dir=s"]
    assert launch("train", best, words, multirun=True) == 2
    told = capfd.readouterr().out.splitlines()
    assert told[:3] == ["job 0 (seed=0): hello", "job 1 (seed=1): hello", "Sweep"]
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in told if line.startswith("│")
    ]
    assert cells == [
        ["0", "seed=0", "2.7500", "s/0"],
        ["1", "seed=1", "2.5000", "s/1"],
        ["2", "seed=2", "failed: bad input", ""],
    ]
    assert told[-2:] == ["best trial of optuna: job 1 (seed=1), 2.5000", "diffx compare s"]
    for number in (0, 1):
        Path(f"s/{number}").rmdir()
    launch("train", Work(), words, multirun=True)
    assert "optuna" not in capfd.readouterr().out, "that is of the sweep before"


def test_the_table_shows_where_results_are(capfd):
    def work(job, words):
        return (
            {8: "runs/x/quantized/8", 4: "runs/x/quantized/4"}
            if job.limit == 1
            else "runs/x/evals/y"
        )

    launch("quantize", work, ["checkpoint=x", "limit=1,2", "hydra.sweep.dir=s"], multirun=True)
    told = capfd.readouterr().out
    assert [line.split("│")[-2].strip() for line in told.splitlines() if line.startswith("│")] == [
        "runs/x/quantized",
        "runs/x/evals/y",
    ]
    assert "compare" not in told


@pytest.mark.parametrize(
    ("group", "package", "word"),
    [
        ("experiment", "_global_", "experiment=odd"),
        ("size", "model", "size=odd"),
        ("experiment", "_global_", "experiment=odd,odd"),
    ],
)
def test_a_config_without_its_package_line_says_so(here, group, package, word):
    file = here / "mine" / group / "odd.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        "# My own.\ntrain:\n  steps: 5\n" if group == "experiment" else "hidden_size: 64\n"
    )
    with pytest.raises(
        UserError, match=rf"{file} cannot be used: its first line must be `# @package {package}`"
    ):
        launch("train", Work(), [word], config_dir=here / "mine", multirun="," in word)


def test_a_group_of_ones_own_is_kept():
    work = Work()
    launch("train", work, ["seed=0,1", "wandb.group=mine", "hydra.sweep.dir=s"], multirun=True)
    assert [(job.wandb.group, job.run.dir) for job in work.jobs] == [
        ("mine", "s/0"),
        ("mine", "s/1"),
    ]


def test_an_experiment_with_a_sweep_needs_no_flag(here):
    work = Work()
    assert launch("train", work, ["experiment=diff/architectures", "seed=7"]) == 0
    assert [job.seed for job in work.jobs] == [7] * 8
    assert len({job.model.kind for job in work.jobs}) == 8


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ({1: UserError("bad input"), 2: RunError("no disk")}, 1),
        pytest.param({1: UserError("bad input")}, 2, marks=pytest.mark.slow),
        pytest.param({2: ZeroDivisionError("a bug")}, 1, marks=pytest.mark.slow),
    ],
)
def test_a_failed_job_is_recorded_and_the_others_go_on(here, capfd, failures, code):
    work = Work(failures)
    assert (
        launch("train", work, ["train.steps=5", "seed=0,1,2,3", "hydra.sweep.dir=s"], multirun=True)
        == code
    )
    assert [job.seed for job in work.jobs] == [0, 1, 2, 3]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    expected = [
        f"error: job {seed} (seed={seed}): "
        f"{'' if isinstance(e, UserError | RunError) else 'ZeroDivisionError: '}{e}"
        for seed, e in failures.items()
    ]
    assert told[:-1] == expected, "each is told once, when it happens"
    count = "1 job" if len(failures) == 1 else f"{len(failures)} jobs"
    which = ", ".join(f"{seed} (seed={seed})" for seed in failures)
    assert (
        told[-1]
        == f"error: {count} of the sweep failed: {which}; the reasons are in s/failed.jsonl"
    )
    records = [json.loads(line) for line in (here / "s" / "failed.jsonl").read_text().splitlines()]
    assert [(record["job"], record["overrides"]) for record in records] == [
        (seed, ["train.steps=5", f"seed={seed}"]) for seed in failures
    ]
    # The same sweep again, the failures mended: its record is a new one.
    for number in (0, 1, 2, 3):
        if number not in failures:
            (here / "s" / str(number)).rmdir()
    assert (
        launch(
            "train", Work(), ["train.steps=5", "seed=0,1,2,3", "hydra.sweep.dir=s"], multirun=True
        )
        == 0
    )
    assert not (here / "s" / "failed.jsonl").exists()


def test_a_check_that_fails_in_one_job_is_that_jobs_failure(here, capfd):
    work = Work()
    assert launch("train", work, ["model.num_heads=8,7", "hydra.sweep.dir=s"], multirun=True) == 2
    assert len(work.jobs) == 1
    assert (
        "error: job 1 (model.num_heads=7): model.num_heads=7 cannot be used"
        in capfd.readouterr().err
    )


@pytest.mark.parametrize(
    "word", ["model=diff_v1,diff_v9", "train.stepz=1,2", "train.lr=1,fast", "run.dir=x"]
)
def test_a_sweep_that_cannot_be_composed_leaves_nothing(here, word):
    work = Work()
    with pytest.raises(UserError):
        launch("train", work, [word], multirun=True)
    assert work.jobs == []
    assert list(here.iterdir()) == []


def test_a_sweep_goes_on_in_its_folders(here):
    launch("train", Work(), ["seed=0,1", "hydra.sweep.dir=s"], multirun=True)
    work = Work()
    for folder in here.glob("s/*/"):
        folder.rmdir()  # such as this test's jobs make
    assert launch("train", work, ["seed=0,1", "sweep.resume=s"], multirun=True) == 0
    assert [job.run.dir for job in work.jobs] == ["s/0", "s/1"]
    assert {job.train.resume for job in work.jobs} == {"auto"}
    evaluate = Work()
    launch("eval", evaluate, ["checkpoint=a,b", "suite=speed", "sweep.resume=s"], multirun=True)
    assert [job.checkpoint for job in evaluate.jobs] == ["a", "b"]
    for words, multirun in ((["sweep.resume=s"], False), (["sweep.resume=none"], True)):
        with pytest.raises(UserError, match=r"sweep\.resume="):
            launch("train", work, words, multirun=multirun)


def test_an_interrupt_ends_the_sweep(here, capfd):
    work = Work({0: UserError("bad input"), 1: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        launch("train", work, ["seed=0,1,2", "hydra.sweep.dir=s"], multirun=True)
    assert [job.seed for job in work.jobs] == [0, 1]
    told = capfd.readouterr().err
    assert "sweep.resume=s" in told
    assert told.count("bad input") == 1 and "error: 1 job of the sweep failed: 0 (seed=0)" in told


@pytest.mark.parametrize(
    "text",
    [
        "def main(",
        "a=b, c",
        "it's",
        "x\\'y",
        "end\\",
        "${foo} bar",
        "\\n",
        "{'a': [1]}",
        "tab\there",
        "two\nlines",
        "",
        "\\${x}",
        "a: 1",
        "-",
    ],
)
def test_a_prompt_is_plain_text(text):
    assert compose("generate", [_plain_text(f"prompt={text}"), "checkpoint=x"]).prompt == text


def test_a_quoted_prompt_is_left_to_hydra():
    assert compose("generate", [_plain_text("prompt='a, b'"), "checkpoint=x"]).prompt == "a, b"
    assert _plain_text("train.lr=1e-3") == "train.lr=1e-3"


def test_a_second_composition_takes_hydra_no_time(monkeypatch):
    words = ["model=diff_v2", "size=pico", "train.lr=1e-4"]
    first = compose("train", words)
    monkeypatch.setattr(Hydra, "compose_config", None)  # the groups are composed already
    again = compose("train", [*words, "seed=3", "data.val_fraction=0.1"])
    assert (again.seed, again.data.val_fraction, again.train, again.model) == (
        3,
        0.1,
        first.train,
        first.model,
    )
    assert compose("train", words) == first, "the words of one composition reached another"


@pytest.mark.parametrize(
    "words",
    [
        ["model=diff_v2", "train.lr=1e-4", "+train.extra=1", "size=pico"],
        ["train.tokens=20M", "seed=1"],
        ["experiment=diff/retrieval_tiny", "model.num_heads=2"],
        ["model={hidden_size:64}", "seed=2"],
        ["run.name=${model.kind}", "++train.lr=3"],
    ],
)
def test_a_composition_is_what_hydra_composes(words):
    with composer() as app:
        expected = app.compose_config("train", words, RunMode.RUN)
        for _ in range(2):
            cfg = compose_config(app, "train", words)
            assert {key: cfg._get_node(key) for key in cfg if key != "hydra"} == {
                key: expected._get_node(key) for key in expected if key != "hydra"
            }
            assert cfg.hydra.overrides == expected.hydra.overrides


def test_a_single_job_is_composed_once_and_called(monkeypatch):
    calls = []
    compose_config = Hydra.compose_config
    monkeypatch.setattr(
        Hydra, "compose_config", lambda *args, **kw: calls.append(1) or compose_config(*args, **kw)
    )
    monkeypatch.setattr("hydra.main", None)
    monkeypatch.setattr("hydra.core.utils.run_job", None)
    work = Work()
    launch("train", work, ["run.name=${hydra:job.config_name}", "seed=9", "hydra.sweep.dir=unused"])
    assert [(job.run.name, job.seed) for job in work.jobs] == [("train", 9)]
    assert len(calls) == 1


@pytest.mark.parametrize(
    "word",
    ["hydra.run.dir=x", "hydra.job.chdir=true", "hydra.output_subdir=x", "+hydra.job.env_set.A=b"],
)
def test_what_hydra_would_do_for_a_single_job_is_refused(here, word):
    work = Work()
    with pytest.raises(
        UserError, match=re.escape(word.lstrip("+").partition(".A")[0].partition("=")[0])
    ):
        launch("train", work, [word])
    assert work.jobs == list(here.iterdir()) == []


def test_a_users_file_may_change_an_option_that_is_a_dataclass(here, recwarn):
    file = here / "mine" / "model" / "diff_v1.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("rope_theta: 500\n")
    register_schemas.cache_clear()  # pytest has reset the filter of warnings
    work = Work()
    launch("train", work, [], config_dir=here / "mine")
    assert (work.jobs[0].model.kind, work.jobs[0].model.rope_theta) == ("diff_v1", 500)
    assert not recwarn.list
