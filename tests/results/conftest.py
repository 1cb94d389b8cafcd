"""Run folders made of given curves, written as `diffx train` writes them."""

import json

import pytest

from diffx.config.bridge import save_config
from diffx.config.data import BpeTokenizer, StdlibData
from diffx.config.model import MODEL_CONFIGS
from diffx.config.train import TrainConfig, TrainJob


@pytest.fixture
def make_run(tmp_path):
    def make(name, kind="transformer", *, curve, seed=0, steps=100, train=None, finished=True, parameters=1000, sha256="aa", **model):
        """`curve` is a list of (tokens, loss); `model` and `train` are settings of the config."""
        folder = tmp_path / name
        folder.mkdir(parents=True)
        job = TrainJob(
            model=MODEL_CONFIGS[kind](**model),
            data=StdlibData(),
            tokenizer=BpeTokenizer(),
            train=TrainConfig(steps=steps, **(train or {})),
            seed=seed,
        )
        save_config(job, folder / "config.yaml")
        lines = [
            {"step": i, "tokens": t, "time": float(i), "val/loss": loss, "val/bpb": loss / 2, "train/tokens_per_second": 1000.0 + i}
            for i, (t, loss) in enumerate(curve)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "data.json").write_text(json.dumps({"sha256": sha256}))
        if finished:
            counts = {"embedding": 500, "rest": parameters, "total": 500 + parameters}
            (folder / "summary.json").write_text(json.dumps({"finished": True, "step": steps, "parameters": counts}))
        return folder

    return make
