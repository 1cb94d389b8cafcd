import dataclasses

import pytest

from diffx.config import UserError
from diffx.config.bridge import load_config
from diffx.config.data import BpeTokenizer, StdlibData
from diffx.config.model import DiffV1Config, TransformerConfig
from diffx.config.train import RunConfig, TrainConfig, TrainJob, WandbConfig
from diffx.train.folder import given, hold_folder, new_folder, run_name, settle, write_start


def job(model=None, run=None, seed=0, wandb=None, **train):
    return TrainJob(
        model=model or DiffV1Config(),
        data=StdlibData(),
        tokenizer=BpeTokenizer(),
        train=TrainConfig(**train),
        run=RunConfig(dir=run),
        wandb=wandb or WandbConfig(),
        seed=seed,
    )


@pytest.fixture
def run(tmp_path, tokenizer):
    return start(
        tmp_path / "run",
        tokenizer,
        job(run=str(tmp_path / "run"), steps=100, lr=1e-3),
        ["train.steps=100", "train.lr=0.001"],
    )


def start(folder, tokenizer, run, words):
    with hold_folder(folder, new=True):
        write_start(folder, run, words, tokenizer, {"sha256": "f"})
    return folder


def test_a_new_run_takes_the_folder_it_is_given_or_one_of_its_own():
    assert str(new_folder(job(run="a/b"))) == "a/b"
    assert new_folder(job(seed=3)).parent.name == "runs"
    assert run_name(job(seed=3)) == "diff_v1-stdlib-seed3"


def test_a_folder_that_exists_is_refused(run):
    with pytest.raises(UserError, match=r"run\.dir=.*it exists"):
        settle(job(run=str(run)), [])


def test_auto_starts_afresh_without_a_run_and_resumes_with_one(run, tmp_path):
    fresh = job(run=str(tmp_path / "other"), resume="auto")
    assert settle(fresh, []) == (fresh, None)
    assert settle(job(resume="auto"), []) == (job(resume="auto"), None)
    (tmp_path / "empty").mkdir()
    assert settle(job(run=str(tmp_path / "empty"), resume="auto"), [])[1] is None
    again, folder = settle(
        job(run=str(run), resume="auto", steps=100, lr=1e-3), ["train.steps=100", "train.lr=0.001"]
    )
    assert folder == run
    assert again.train.lr == 1e-3


def test_the_saved_config_wins_over_what_was_not_said(run):
    again, folder = settle(job(resume=str(run)), [f"train.resume={run}"])
    assert folder == run
    assert (again.train.steps, again.train.lr, again.run.dir) == (100, 1e-3, str(run))


@pytest.mark.parametrize(
    "word, given_job, key",
    [
        ("train.lr=0.002", {"lr": 2e-3}, "train.lr"),
        ("seed=1", {"seed": 1}, "seed"),
        ("model=transformer", {"model": TransformerConfig()}, "model.kind"),
        ("model.lambda_init=0.8", {"model": DiffV1Config(lambda_init=0.8)}, "model.lambda_init"),
        ("size=mini", {"model": DiffV1Config(hidden_size=512)}, "model.hidden_size"),
        ("experiment=x", {"seed": 7, "lr": 1e-3, "steps": 100}, "seed"),
    ],
)
def test_a_word_that_conflicts_is_refused_by_name(run, word, given_job, key):
    with pytest.raises(UserError, match=f"^{key}="):
        settle(job(resume=str(run), **given_job), [word])


def test_steps_cadence_and_tracker_may_change(run):
    words = ["train.tokens=1M", "train.eval_every=7", "wandb.project=p"]
    again, _ = settle(
        job(resume=str(run), tokens="1M", eval_every=7, wandb=WandbConfig(project="p")), words
    )
    assert (again.train.steps, again.train.tokens, again.train.eval_every, again.wandb.project) == (
        None,
        10**6,
        7,
        "p",
    )
    assert again.train.lr == 1e-3


def test_resume_of_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        settle(job(resume=str(tmp_path / "nowhere")), [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="not a run folder"):
        settle(job(resume=str(tmp_path / "other")), [])
    with pytest.raises(UserError, match="it exists"):
        settle(job(resume="auto", run=str(tmp_path / "other")), [])


def test_the_folder_holds_what_shaped_the_run(run, tokenizer):
    assert load_config(run / "config.yaml") == job(run=str(run), steps=100, lr=1e-3)
    assert (run / "overrides.yaml").read_text() == "- train.steps=100\n- train.lr=0.001\n"
    again = job(run=str(run), steps=200, lr=1e-3)
    write_start(run, again, ["train.steps=200"], tokenizer, {"sha256": "f"})
    assert (run / "overrides.yaml").read_text() == "- train.steps=100\n- train.lr=0.001\n"
    assert load_config(run / "config.yaml") == again
    assert '"overrides": [' in (run / "environment.json").read_text()


def test_the_environment_holds_no_secrets(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    for path in [
        path
        for path in start(tmp_path / "secret", tokenizer, job(), []).rglob("*")
        if path.is_file()
    ]:
        assert "0123456789abcdef" not in path.read_text()


def test_given_ignores_keys_the_other_architecture_lacks():
    mine, saved = job(), dataclasses.replace(job(), model=TransformerConfig())
    keys = given(["model=diff_v1", "model.lambda_init=depth"], mine, saved)
    assert keys == {"model.kind": ("diff_v1", "transformer")}


def test_a_held_folder_is_refused_to_others(run, tmp_path):
    with (
        hold_folder(run, new=False),
        pytest.raises(UserError, match=r"run\.dir=.* another process"),
        hold_folder(run, new=False),
    ):
        pass
    with hold_folder(run, new=False):  # given up at the end
        pass
    with pytest.raises(UserError, match="it exists"), hold_folder(run, new=True):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"run\.dir=.*cannot be used"),
        hold_folder(tmp_path / "file" / "run", new=True),
    ):
        pass


def test_what_an_early_kill_leaves_can_be_started_again(tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".config.yaml.tmp").write_text("kind: tr")
    fresh = job(run=str(folder), resume="auto")
    assert settle(fresh, []) == (fresh, None)
    assert settle(job(run=str(folder)), [])[1] is None
    with pytest.raises(UserError, match=r"its start was killed early.*train\.resume=auto"):
        settle(job(resume=str(folder)), [])
