"""Whole runs of a tiny model: the files, and killed runs that end as if never killed."""

import dataclasses
import itertools
import json
import math
import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffx.config import RunError, UserError
from diffx.config.data import BpeTokenizer, ShardsData, TextData
from diffx.config.model import MODEL_CONFIGS
from diffx.config.train import Precision, PrepareJob, WandbConfig, WandbMode
from diffx.data import open_data
from diffx.data.prepare import prepare
from diffx.errors import Stopped
from diffx.loading import load_run
from diffx.train import loop
from diffx.train.run import run_job


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder):
    """All that must be equal, bit for bit, in a run that was killed and resumed."""
    clocks = ("time", "train/tokens_per_second", "train/mfu", "train/peak_memory_bytes")
    return [
        {name: value for name, value in row.items() if name not in clocks} for row in rows(folder)
    ]


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def run(make_job):
    return lambda *args, **settings: run_job(make_job(*args, **settings), [])


def resume(job, words=(), **train_settings):
    return run_job(
        dataclasses.replace(
            job, train=dataclasses.replace(job.train, resume="auto", **train_settings)
        ),
        list(words),
    )


@pytest.mark.parametrize("kind", MODEL_CONFIGS)
def test_every_architecture_learns_and_leaves_its_folder(run, kind):
    folder = run("run", kind, steps=40, eval_every=20, save_every=20, lr=1e-2, log_every=10)
    summary = json.loads((folder / "summary.json").read_text())
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 10, 20, 30, 40]
    assert summary["val/loss"] == found[-1]["val/loss"] < found[0]["val/loss"] - 1
    assert summary["val/loss"] < summary["baselines"]["unigram"]["nats"]
    assert found[-1]["val/perplexity"] == pytest.approx(math.exp(found[-1]["val/loss"]))
    files = {
        "config.yaml",
        "overrides.yaml",
        "environment.json",
        "data.json",
        "metrics.jsonl",
        "train.log",
        "summary.json",
    }
    assert {p.name for p in folder.iterdir()} == files | {"tokenizer", "checkpoints"}
    logged = {name for name in found[1] if name.startswith(("diff/", "attention/"))}
    kinds = ["attention/context_rms", *(["diff/lambda"] if kind.startswith("diff") else [])]
    assert logged == {f"{what}/{layer}" for what in kinds for layer in ("00", "01")}
    assert load_run(str(folder)).step == 40


def test_the_first_losses_are_those_of_an_untrained_model_and_bits_are_per_byte(run, make_job):
    first = rows(run(model={"init_std": 1e-3}))[0]
    assert first["val/loss"] == pytest.approx(math.log(257), abs=0.01)
    job = make_job()
    val = open_data(job.data, job.tokenizer).val
    assert first["val/bpb"] == pytest.approx(
        first["val/loss"] * val.n_tokens / val.n_bytes / math.log(2)
    )


def test_two_runs_are_equal_and_another_seed_is_not(run):
    one, two, other = run("one"), run("two"), run("other", seed=1)
    assert figures(one) == figures(two) != figures(other)
    assert same(weights(one, 12), weights(two, 12))


def test_all_architectures_see_the_same_tokens(run, monkeypatch):
    seen = {}
    step = loop._accumulate_gradients

    def note(model, batch, *rest):
        seen.setdefault(model.config.kind, []).append(batch.inputs)
        return step(model, batch, *rest)

    monkeypatch.setattr(loop, "_accumulate_gradients", note)
    for kind in ("transformer", "diff_v1", "diff_v2"):
        run(kind, kind, steps=3)
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*seen.values(), strict=True)
    )


def test_micro_batches_add_up_to_the_whole_batch(run):
    whole, parts = rows(run("whole")), rows(run("parts", micro_batch_size=1))
    for a, b in zip(whole, parts, strict=True):
        assert [b[k] for k in b if k.endswith("loss")] == pytest.approx(
            [a[k] for k in a if k.endswith("loss")], rel=1e-5
        )


def test_checkpointed_activations_change_nothing(run):
    plain, checkpointed = (
        run("plain", steps=4),
        run("checkpointed", steps=4, activation_checkpointing=True),
    )
    assert figures(plain) == figures(checkpointed)
    assert same(weights(plain, 4), weights(checkpointed, 4))


def test_masked_documents_train(run):
    masked, free = rows(run("masked", mask_documents=True)), rows(run("free"))
    assert masked[-1]["val/loss"] != free[-1]["val/loss"]
    assert masked[-1]["val/loss"] == pytest.approx(free[-1]["val/loss"], abs=0.5)


def test_bf16_keeps_fp32_weights(run):
    folder = run(
        precision=Precision.bf16, steps=4, batch_tokens=64
    )  # many a CPU multiplies bf16 slowly
    assert {w.dtype for w in weights(folder, 4).values()} == {torch.float32}
    assert rows(folder)[-1]["val/loss"] < rows(folder)[0]["val/loss"]


def test_the_golden_curve_has_not_moved(run):
    """The losses of 20 steps are the recorded ones: a refactoring must not change them."""
    found = [row["train/loss"] for row in rows(run(steps=20))[1:]]
    expected = json.loads((Path(__file__).parent / "golden_curve.json").read_text())
    assert found == pytest.approx(expected, rel=1e-4)


# Killed, stopped, damaged


def killed(job, tmp_path, at, number):
    """Run a job in a process that gets a signal in step ``at``; return exit code and message."""
    child = os.fork()
    if not child:
        step, done = loop._accumulate_gradients, itertools.count(1)

        def counted(*args):
            if next(done) == at:
                os.kill(os.getpid(), number)
            return step(*args)

        loop._accumulate_gradients = counted
        try:
            run_job(job, [])
        except Stopped as stopped:
            (tmp_path / "stopped.txt").write_text(str(stopped))
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told = tmp_path / "stopped.txt"
    return code, told.read_text() if told.exists() else ""


@pytest.mark.parametrize(
    "at, settings",
    [(1, {}), (7, {}), (8, {"log_every": 3, "save_every": 5, "eval_every": 6}), (12, {})],
)
def test_a_killed_run_resumes_bit_for_bit(make_job, run, tmp_path, at, settings):
    whole = run("whole", **settings)
    job = make_job("killed", **settings)
    assert killed(job, tmp_path, at, signal.SIGKILL) == (-signal.SIGKILL, "")
    folder = resume(job)
    assert figures(folder) == figures(whole)
    assert same(weights(folder, 12), weights(whole, 12))
    assert json.loads((folder / "summary.json").read_text())["finished"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_ends_cleanly(make_job, run, tmp_path, number):
    settings = {"log_every": 5, "save_every": 100}
    whole = run("whole", **settings)
    job = make_job("stopped", **settings)
    code, told = killed(job, tmp_path, 7, number)
    assert code == 0 and told.startswith(
        "stopped by " + signal.Signals(number).name + " after step 7"
    )
    folder = tmp_path / "stopped"
    assert [p.name for p in (folder / "checkpoints").iterdir() if not p.name.endswith("4")] == [
        "step_00000007"
    ]
    assert figures(resume(job)) == figures(whole)


def test_a_stop_raises_stopped_in_process(make_job, monkeypatch):
    step = loop._accumulate_gradients

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        return step(*args)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "_accumulate_gradients", interrupted)
    with pytest.raises(Stopped, match=r"after step 1; go on with train\.resume="):
        run_job(make_job(), [])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("at", "batches"), [(0, 3), (4, 2), (12, 1)])
def test_a_stop_in_a_validation_ends_within_a_batch_and_loses_nothing(
    make_job, run, monkeypatch, at, batches
):
    whole = run("whole", log_every=3)
    job = make_job("stopped", log_every=3)
    losses, measured = loop.token_losses, []

    def interrupted(model, *args):
        if not model.training:
            measured.append(Path(job.run.dir, "metrics.jsonl").read_text().count("val/loss") * 4)
            if measured.count(at) == batches and measured[-1] == at:
                signal.raise_signal(signal.SIGINT)
        return losses(model, *args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(Stopped, match=f"after step {at}; go on with"),
    ):
        patch.setattr(loop, "token_losses", interrupted)
        run_job(job, [])
    assert measured.count(at) == batches, "it went on"
    folder = resume(job)
    assert figures(folder) == figures(whole)
    assert same(weights(folder, 12), weights(whole, 12))
    best = [
        json.loads((place / "summary.json").read_text())["best/step"] for place in (folder, whole)
    ]
    assert best[0] == best[1]


def test_a_finished_run_says_so_and_is_not_loaded_again(make_job, monkeypatch, capsys):
    job = make_job(steps=4)
    folder = run_job(job, [])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        for name in ("run.open_data", "scratch.build_model", "scratch.load_tokenizer"):
            patch.setattr(f"diffx.train.{name}", None)
        assert resume(job) == folder
    (told,) = capsys.readouterr().out.splitlines()
    assert f"{folder} is finished: 4 steps" in told
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "summary.json").write_text("{")  # damaged: the end is done again
    assert resume(job) == folder and "finished" in (folder / "summary.json").read_text()


def test_wandb_gets_samples_at_each_validation_and_they_change_nothing(make_job, run, monkeypatch):
    plain = run("plain")
    given, logged = {}, []
    wandb_run = types.SimpleNamespace(
        id="x",
        log=lambda row, step: logged.append((step, row)),
        define_metric=lambda *_, **__: None,
        finish=lambda **_: None,
        summary={},
    )
    stub = types.SimpleNamespace(
        init=lambda **more: given.update(more) or wandb_run,
        Settings=lambda **_: None,
        Table=lambda columns, data: data,
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    job = dataclasses.replace(
        make_job("shown", sample_tokens=5),
        wandb=WandbConfig(mode=WandbMode.offline, group="sweep"),
    )
    folder = run_job(
        job, ["train.lr=3e-3", "seed=0", "device=cpu", "run.dir=shown", "model=diff_v1"]
    )
    assert figures(folder) == figures(plain)
    samples = [(step, row["samples"]) for step, row in logged if "samples" in row]
    assert [step for step, _ in samples] == [0, 4, 8, 12]
    assert all(prompt == "" and len(text) > 0 for _, ((_, prompt, text),) in samples)
    assert given["name"] == "diff_v1-text-seed0 train.lr=3e-3"
    assert given["group"] == "sweep" and given["tags"] == ["train", "diff_v1", "text"]
    baselines = json.loads((folder / "summary.json").read_text())["baselines"]
    drawn = [row["baselines/unigram/nats"] for _, row in logged if "val/loss" in row]
    assert drawn == [baselines["unigram"]["nats"]] * 4


def test_a_damaged_checkpoint_is_passed_over(make_job, run, capsys):
    whole = run("whole")
    job = make_job("damaged", keep_last=3)
    folder = run_job(job, [])
    newest = folder / "checkpoints" / "step_00000012" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\0")
    resume(job)
    said = capsys.readouterr().out
    assert "step_00000012 is damaged: model.safetensors" in said
    assert "resumed from step 8" in said
    assert figures(folder) == figures(whole)


def test_more_steps_go_on_from_where_it_ended(make_job):
    job = make_job(steps=4)
    folder = run_job(job, [])
    words = ["train.resume=auto", "train.steps=6"]
    resume(job, words, steps=6)
    assert [row["step"] for row in rows(folder)] == list(range(7))


def test_a_loss_that_is_not_finite_stops_the_run(make_job, monkeypatch):
    losses = loop.token_losses
    calls = itertools.count(1)

    def broken(model, inputs, targets, boundaries):
        loss = losses(model, inputs, targets, boundaries)
        return loss * float("nan") if model.training and next(calls) == 6 else loss

    monkeypatch.setattr(loop, "token_losses", broken)
    with pytest.raises(
        RunError,
        match=r"the loss is nan at step 6 \(batch at batch 5 .*last good checkpoint is "
        r".*step_00000004",
    ):
        run_job(make_job(log_every=3), [])


def test_an_update_that_is_not_finite_is_not_saved(make_job):
    with pytest.raises(RunError, match=r"gradient norm is (nan|inf) at step 2|loss is (nan|inf)"):
        run_job(make_job(lr=1e30, warmup=0, save_every=1), [])


def test_a_refused_resume_leaves_the_run_as_it_was(make_job, tmp_path):
    path = tmp_path / "changing.jsonl"
    lines = [
        json.dumps({"text": f"line {n} of a text that changes " * 5}) + "\n" for n in range(100)
    ]
    path.write_text("".join(lines))
    job = dataclasses.replace(
        make_job(),
        data=TextData(path=str(path), val_tokens=500),
        tokenizer=BpeTokenizer(vocab_size=300),
    )
    folder = run_job(job, [])
    assert (
        resume(job, ["train.steps=14"], steps=14) == folder
    )  # a trained tokenizer is read back, not trained again
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    path.write_text("".join(lines[:-1]) + json.dumps({"text": "something else"}) + "\n")
    with pytest.raises(UserError, match="not those that the checkpoint was trained on"):
        resume(job, ["train.steps=20"], steps=20)
    with pytest.raises(UserError, match=r"train\.steps=3 cannot be used: .* has done 14 steps"):
        path.write_text("".join(lines))
        resume(job, ["train.steps=3"], steps=3)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_run_stopped_at_its_last_step_is_measured_there(make_job, monkeypatch):
    job = make_job(eval_every=100, log_every=100)
    step = loop._accumulate_gradients
    calls = itertools.count(1)

    def interrupted(*args):
        if next(calls) == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(loop, "_accumulate_gradients", interrupted)
    with pytest.raises(Stopped):
        run_job(job, [])
    folder = resume(job, ["train.steps=5"], steps=5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["step"] == 5
    assert summary["val/loss"] == rows(folder)[-1]["val/loss"] < rows(folder)[0]["val/loss"]


# Another run's weights


def test_init_from_starts_from_the_weights_at_another_length_and_theta(make_job, text):
    source = run_job(make_job("source"), [])
    words = ["model.rope_theta=640000", f"train.init_from={source}@8"]
    settings = {
        "seq_len": 64,
        "batch_tokens": 256,
        "init_from": f"{source}@8",
        "lr": 1e-9,
        "steps": 1,
        "warmup": 0,
    }
    job = make_job("long", model={"rope_theta": 640_000.0}, **settings)
    folder = run_job(job, words)
    assert load_run(str(folder)).model.config.rope_theta == 640_000.0
    for name, weight in weights(source, 8).items():
        torch.testing.assert_close(weights(folder, 1)[name], weight, rtol=0, atol=1e-6)
    assert not same(weights(source, 8), weights(source, 12))
    source.rename(source.parent / "moved")
    again = resume(job, ["train.steps=2"], steps=2)  # needs nothing of the run that it came from
    assert rows(again)[-1]["step"] == 2
    (source.parent / "moved").rename(source)
    untouched = run_job(make_job("same", init_from=str(source), lr=1e-9, steps=1, warmup=0), [])
    assert rows(untouched)[0]["val/loss"] == rows(source)[-1]["val/loss"]
    with pytest.raises(UserError, match=r"model\.hidden_size=64 conflicts with train\.init_from"):
        wide = dataclasses.replace(
            job,
            model=dataclasses.replace(job.model, hidden_size=64),
            run=dataclasses.replace(job.run, dir=None),
        )
        run_job(wide, ["model.hidden_size=64"])


def test_prompts_carry_no_loss(make_job, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{n} + {n} = " * 3, "text": str(2 * n)}) + "\n"
            for n in range(300)
        )
    )
    job = dataclasses.replace(
        make_job("pairs"), data=TextData(path=str(path), prompt_key="prompt", val_tokens=1000)
    )
    corpus = open_data(job.data, job.tokenizer)
    batch = next(corpus.batches(32, 4, 0))
    assert 0 < (batch.targets >= 0).float().mean() < 0.5
    assert rows(run_job(job, []))[-1]["train/loss"] > 0


def test_shards_bring_their_tokenizer(make_job, tmp_path):
    job = make_job("bytes")
    shards = prepare(
        PrepareJob(data=job.data, tokenizer=job.tokenizer, out=str(tmp_path / "shards"), workers=1)
    )
    other = dataclasses.replace(job, data=ShardsData(path=str(shards)), tokenizer=BpeTokenizer())
    with pytest.raises(
        UserError, match=r"tokenizer=bpe cannot be used with data=shards: these hold bytes tokens"
    ):
        run_job(other, ["tokenizer=bpe"])
    assert load_run(str(run_job(other, []))).tokenizer.kind == "bytes"


def test_refusals_leave_nothing_behind(make_job, tmp_path):
    jobs = {
        "below the": make_job("a", seq_len=2**20, batch_tokens=2**20),
        "vocab_size=100": make_job("b", model={"vocab_size": 100}),
        "init_from": make_job("c", init_from=str(tmp_path / "nowhere")),
    }
    for words, job in jobs.items():
        with pytest.raises(UserError, match=words):
            run_job(job, [])
    assert not [p for p in tmp_path.iterdir() if p.name in "abc"]


def test_memory_that_runs_out_is_one_line(make_job, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmany more lines")

    monkeypatch.setattr("diffx.train.run.fit", full)
    with pytest.raises(
        RunError,
        match=r"memory of cpu is full \(tried to allocate 3 GiB\); lower train.micro_batch_size",
    ):
        run_job(make_job(), [])
