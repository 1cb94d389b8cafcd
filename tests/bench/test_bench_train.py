import json

import pytest
import torch

from diffx.bench import timing, train
from diffx.config import UserError
from diffx.config.data import BpeTokenizer, StdlibData
from diffx.config.model import MODEL_CONFIGS
from diffx.config.train import TrainJob

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 64}


@pytest.fixture
def tiny(monkeypatch):
    """Every size is a tiny one, and turns are short."""

    def compose(name, words):
        kind = words[0].removeprefix("model=")
        return TrainJob(
            model=MODEL_CONFIGS[kind](**SHAPE), data=StdlibData(), tokenizer=BpeTokenizer()
        )

    monkeypatch.setattr(train, "compose", compose)
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)


@pytest.mark.slow
def test_figures_and_table(tiny, tmp_path, capsys):
    out = tmp_path / "bench.json"
    report = train.bench_train(out, ["25m"], [512], rounds=2, device="cpu")
    assert json.loads(out.read_text()) == report
    (case,) = report["cases"]
    names = [*MODEL_CONFIGS, "Llama", "DiffLlama"]
    for key in ("parameters", "peak_memory_bytes", "seconds_per_step", "tokens_per_second"):
        assert list(case[key]) == names
    assert case["batch_size"] == 4 and all(
        len(times) == 2 for times in case["seconds_per_step"].values()
    )
    median = sum(case["seconds_per_step"]["diff_v1"]) / 2
    assert case["tokens_per_second"]["diff_v1"] == pytest.approx(2048 / median)
    by_pair = {(ratio["of"], ratio["to"]): ratio for ratio in case["ratios"]}
    assert by_pair["diff_v1", "transformer"]["target"] == 0.8
    assert all(
        ratio["met"] == (ratio["target"] and ratio["median"] >= ratio["target"])
        for ratio in case["ratios"]
    )
    # The same shape: DIFF V1 alone has a gain of 2d a layer on its norm.
    parameters, d = case["parameters"], 32 // 4
    assert (
        parameters["Llama"] == parameters["transformer"]
        and parameters["DiffLlama"] == parameters["diff_v1"] - 2 * 2 * d
    )
    assert report["machine"]["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "diff_v1 / DiffLlama" in printed and "1.25" in printed and "MiB" in printed


def test_targets():
    assert train.target("transformer", "Llama", "nano", 2048) == 1.0
    assert train.target("diff_v1", "DiffLlama", "25m", 512) == 1.25
    assert [
        train.target(kind, "transformer", "25m", t)
        for t in (512, 2048)
        for kind in ("diff_v1", "diff_v2")
    ] == [0.8, 0.75, 0.65, 0.65]
    assert train.target("diff_v1", "transformer", "nano", 512) is None


def test_a_step_trains():
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    before = [p.detach().clone() for p in model.parameters()]
    train.training_step(model, torch.arange(8).reshape(2, 4))()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_input_that_cannot_be_used(tmp_path):
    for out in (tmp_path, tmp_path / "nowhere" / "bench.json"):
        with pytest.raises(UserError, match=r"out=.* cannot be used: it must be the name"):
            train.bench_train(out, ["pico"], [64], rounds=1, device="cpu")
    with pytest.raises(UserError, match="seq_len=0 cannot be used"):
        train.bench_train(None, ["pico"], [0], rounds=1, device="cpu")
    with pytest.raises(UserError, match="size=pic"):
        train.bench_train(None, ["pic"], [64], rounds=1, device="cpu")
