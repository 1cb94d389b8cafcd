"""A run folder under faults: a kill at each change of a file, a second process, a deletion."""

import dataclasses
import json
import os
import shutil
import sys
from itertools import count, takewhile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffx.config import RunError, UserError
from diffx.train import loop
from diffx.train.folder import hold_folder
from diffx.train.run import run_job

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
SHORT = {"steps": 4, "eval_every": 2, "save_every": 2, "keep_last": 1}


def is_change(event, args, folder):
    """Whether an audit event is a change of a file below ``folder``."""
    if event == "open":
        path, _, flags = args
        return (
            isinstance(path, str)
            and path.startswith(folder)
            and bool(flags & (os.O_WRONLY | os.O_RDWR))
        )
    return event in CHANGES and any(
        isinstance(arg, str | Path) and str(arg).startswith(folder) for arg in args
    )


def killed_before(number, job):
    """Kill a job's process before change ``number`` of its folder; False if there is none."""
    child = os.fork()
    if not child:
        seen = count(1)

        def hook(event, args):
            if is_change(event, args, job.run.dir) and next(seen) == number:
                os._exit(9)

        sys.addaudithook(hook)
        try:
            run_job(job, [])
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def outcome(folder):
    """All that must be equal in a run that was killed and one that was not."""
    clocks = ("time", "train/tokens_per_second", "train/mfu", "train/peak_memory_bytes")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "checkpoints" / "step_00000004" / "model.safetensors")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return (
        [{key: value for key, value in row.items() if key not in clocks} for row in rows],
        weights,
        files,
    )


def check_kills(make_job, numbers):
    """Kill a run before each of these changes, resume it, and compare the final states."""
    rows, weights, files = outcome(run_job(make_job("whole", **SHORT), []))
    job = make_job("killed", **SHORT)
    auto = dataclasses.replace(job, train=dataclasses.replace(job.train, resume="auto"))
    killed = 0
    for _ in takewhile(lambda number: killed_before(number, job), numbers):
        killed += 1
        folder = run_job(auto, [])
        again_rows, again_weights, again_files = outcome(folder)
        assert again_rows == rows, killed
        assert all(torch.equal(again_weights[name], weight) for name, weight in weights.items())
        assert again_files == files
        shutil.rmtree(folder)
    return killed


def test_a_start_that_is_killed_at_any_change_of_a_file_can_be_resumed(make_job):
    assert check_kills(make_job, (2, 5, 8)) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_change_of_a_file_can_be_resumed(make_job):
    assert check_kills(make_job, count(1)) >= 30


def test_a_second_process_on_a_run_is_refused(make_job):
    job = make_job(**SHORT)
    folder = run_job(job, [])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = dataclasses.replace(job, train=dataclasses.replace(job.train, resume="auto", steps=6))
    with (
        hold_folder(folder, new=False),
        pytest.raises(UserError, match=r"run\.dir=.* another process is writing it"),
    ):
        run_job(again, ["train.steps=6"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run_job(again, ["train.steps=6"])


@pytest.mark.parametrize(
    "settings", [{"log_every": 1}, {"log_every": 100, "eval_every": 100, "save_every": 5}]
)
def test_a_folder_that_is_deleted_while_its_run_goes_is_an_error(make_job, monkeypatch, settings):
    job = make_job(**settings)
    step, done = loop._accumulate_gradients, count(1)

    def deleting(*args):
        if next(done) == 3:
            shutil.rmtree(job.run.dir)
        return step(*args)

    monkeypatch.setattr(loop, "_accumulate_gradients", deleting)
    with pytest.raises(
        RunError, match=r"deleted or moved|step 5 in .* cannot be written: No such file"
    ):
        run_job(job, [])
    assert not Path(job.run.dir).exists()
