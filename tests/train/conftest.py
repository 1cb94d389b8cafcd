import json

import pytest

from diffx.config.data import BytesTokenizer, TextData
from diffx.config.model import MODEL_CONFIGS
from diffx.config.train import Device, RunConfig, TrainConfig, TrainJob, WandbConfig, WandbMode

SHAPE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Two hundred short documents that differ."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    rows = (
        {"text": f"Document {n} says that {n} times {n} is {n * n}, and that is all it says. " * 2}
        for n in range(200)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_job(text, tmp_path, monkeypatch):
    """Make a tiny job on the CPU: ``make_job("folder", "diff_v2", {"rope_theta": 5.0})``."""
    monkeypatch.setenv("DIFFX_CACHE", str(text.parent / "cache"))

    def make(name="run", kind="diff_v1", model=None, seed=0, **train):
        settings = {
            "steps": 12,
            "batch_tokens": 128,
            "seq_len": 32,
            "warmup": 2,
            "log_every": 1,
            "eval_every": 4,
            "save_every": 4,
        }
        settings |= {"sample_tokens": 0, "lr": 3e-3} | train
        return TrainJob(
            model=MODEL_CONFIGS[kind](**SHAPE, **(model or {})),
            data=TextData(path=str(text), val_tokens=1000),
            tokenizer=BytesTokenizer(),
            train=TrainConfig(**settings),
            wandb=WandbConfig(mode=WandbMode.disabled),
            run=RunConfig(dir=str(tmp_path / name)),
            device=Device.cpu,
            seed=seed,
        )

    return make
