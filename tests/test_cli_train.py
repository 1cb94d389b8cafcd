"""The door to a real training run, and a sweep of them in processes of their own."""

import json
import subprocess
import sys

import pytest

from diffx.cli import main

DATA = ["data=text", "data.path=text.jsonl"]
TINY = (
    "tokenizer=bytes model.hidden_size=32 model.num_layers=1 model.num_heads=4 "
    "model.num_kv_heads=2 train.steps=2 train.seq_len=16 train.batch_tokens=32 "
    "train.sample_tokens=4 wandb.mode=disabled device=cpu data.val_tokens=500"
)
WORDS = [*DATA, *TINY.split()]


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    rows = (
        {"text": f"Document {n} says that {n} times {n} is {n * n}, no more. " * 3}
        for n in range(60)
    )
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return tmp_path


def test_train_then_generate_and_compare(here, capfd):
    assert main(["train", *WORDS, "run.dir=a", "model=transformer"]) == 0
    assert main(["train", *WORDS, "run.dir=b", "model=diff_v2"]) == 0
    assert "run folder: b" in capfd.readouterr().out
    overrides = (here / "a" / "overrides.yaml").read_text()
    assert "model=transformer" in overrides and "run.dir=a" in overrides
    assert main(["generate", "checkpoint=a", "max_tokens=3", "prompt=Document (a, b = {c}"]) == 0
    assert capfd.readouterr().out.startswith("Document")
    assert main(["compare", "a", "b", "--out", "curves.png"]) == 0
    assert (here / "curves.png").stat().st_size > 1000
    assert main(["data", "prepare", *DATA, "tokenizer=bytes", "out=shards"]) == 0
    assert main(["train", *TINY.split(), "data=shards", "data.path=shards", "run.dir=c"]) == 0
    assert main(["params", "size=1.4b", "model.vocab_size=100288"]) == 0
    assert "1,438,6" in capfd.readouterr().out


def test_a_sweep_in_two_processes(here):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = [
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.sweep.dir=s",
        "model=transformer,diff_v1",
        "train.lr=1e-3,-1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "diffx", "train", *WORDS, *sweep],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    failed = [json.loads(line) for line in (here / "s" / "failed.jsonl").read_text().splitlines()]
    assert sorted(entry["job"] for entry in failed) == [1, 3]
    for number, model in ((1, "transformer"), (3, "diff_v1")):
        assert (
            done.stderr.count(
                f"error: job {number} (model={model} train.lr=-1): train.lr=-1.0 cannot be used"
            )
            == 1
        )
    both = "1 (model=transformer train.lr=-1), 3 (model=diff_v1 train.lr=-1)"
    assert (
        done.stderr.splitlines()[-1]
        == f"error: 2 jobs of the sweep failed: {both}; the reasons are in s/failed.jsonl"
    )
    for number in ("0", "2"):
        assert json.loads((here / "s" / number / "summary.json").read_text())["finished"]
    assert not (here / "s" / "1").exists()
    argv = json.loads((here / "s" / "0" / "environment.json").read_text())["argv"]
    assert "model=transformer,diff_v1" in argv, "the sweep's own command line is lost"
