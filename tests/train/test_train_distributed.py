"""Several processes under torchrun: same results as one, same checkpoints, one report."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from diffx.config.bridge import save_config
from diffx.config.train import Schedule
from diffx.train.run import run_job

pytestmark = pytest.mark.slow
MAIN = """
import os, sys
from pathlib import Path
from diffx.config.bridge import load_config
from diffx.cli import main
from diffx.train.run import run_job
job = load_config(Path(sys.argv[1]))
if sys.argv[2:]:  # let the first step be seen before the rest
    from diffx.train import loop
    import time
    step = loop._accumulate_gradients
    loop._accumulate_gradients = lambda *args: (time.sleep(0.2), step(*args))[1]
run_job(job, [f"train.steps={job.train.steps}"])
"""


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def command(tmp_path, job, processes, *words):
    save_config(job, tmp_path / "job.yaml")
    (tmp_path / "main.py").write_text(MAIN)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    return [*torchrun, str(tmp_path / "main.py"), str(tmp_path / "job.yaml"), *words]


def launch(tmp_path, job, processes):
    return subprocess.run(
        command(tmp_path, job, processes), capture_output=True, text=True, timeout=240
    )


def test_any_number_of_processes_goes_on_with_a_run(make_job, tmp_path):
    """1, 2, 2, 4 and 1 processes after each other end as one process does."""
    settings = {"sample_tokens": 8, "warmup": 2, "schedule": Schedule.constant}
    one = run_job(make_job("one", steps=8, **settings), [])
    job = make_job("several", resume="auto", **settings)
    for steps, processes in ((2, 1), (4, 2), (5, 2), (7, 4), (8, 1)):
        part = dataclasses.replace(job, train=dataclasses.replace(job.train, steps=steps))
        if processes == 1:
            run_job(part, [f"train.steps={steps}"])
        else:
            done = launch(tmp_path, part, processes)
            assert done.returncode == 0, done.stderr[-2000:]
            assert done.stdout.count("resumed from step") == 1  # one process speaks
    several = tmp_path / "several"
    losses = [[row["train/loss"] for row in rows(folder)[1:]] for folder in (one, several)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    names = (
        f"checkpoints/step_{8:08d}/model.safetensors",
        f"checkpoints/step_{8:08d}/optimizer.safetensors",
    )
    for name in names:
        expected, weights = load_file(one / name), load_file(several / name)
        assert weights.keys() == expected.keys()
        for key in weights.keys() - {"rng.cpu"}:
            torch.testing.assert_close(weights[key], expected[key], rtol=1e-3, atol=1e-5)
    samples = [
        json.loads((folder / "summary.json").read_text())["sample"] for folder in (one, several)
    ]
    assert samples[0] == samples[1] != ""


def test_an_error_is_told_once(make_job, tmp_path):
    job = make_job("there", steps=2)
    (tmp_path / "there" / "file").mkdir(parents=True)
    done = launch(tmp_path, job, 2)
    lines = [line for line in done.stderr.splitlines() if "run.dir=" in line]
    assert [line.startswith("error: run.dir=") for line in lines] == [True], done.stderr
    assert re.search(
        r"exitcode\s*: 2", done.stderr
    )  # torchrun's own report, behind its own traceback


def test_sigterm_to_the_launcher_saves_a_checkpoint(make_job, tmp_path):
    job = make_job("stopped", steps=400, log_every=1)
    process = subprocess.Popen(
        command(tmp_path, job, 2, "slowly"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder, begun = tmp_path / "stopped", time.monotonic()
    try:
        while not (
            (folder / "metrics.jsonl").exists()
            and rows(folder)[-1:]
            and rows(folder)[-1]["step"] >= 2
        ):
            assert time.monotonic() - begun < 120 and process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert told.count("stopped by SIGTERM after step") == 1
    step = int(told.split("after step ")[1].split(";")[0])
    assert step < 400 and (folder / "checkpoints" / f"step_{step:08d}" / "state.json").is_file()
