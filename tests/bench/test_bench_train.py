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
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    work = "25m, T=512"
    names = [*MODEL_CONFIGS, "Llama", "DiffLlama"]
    for key in ("parameters", "bytes", "seconds", "tokens_per_second"):
        assert list(report[key]) == [work] and list(report[key][work]) == names
    seconds = report["seconds"][work]
    assert all(len(times) == 2 for times in seconds.values())
    median = sum(seconds["diff_v1"]) / 2
    assert report["tokens_per_second"][work]["diff_v1"] == pytest.approx(2048 / median)
    targets = {(ratio["of"], ratio["to"]): ratio["target"][0] for ratio in report["ratios"]}
    assert (
        targets.pop(("transformer", "Llama")) == 1.0
        and targets.pop(("diff_v1", "DiffLlama")) == 1.25
    )
    lowest = {kind: target for (kind, _), target in targets.items()}
    assert lowest == dict.fromkeys(lowest) | {"diff_v1": 0.8, "diff_v2": 0.75}
    assert all((ratio["met"] is None) == (ratio["target"][0] is None) for ratio in report["ratios"])
    # The same shape: DIFF V1 alone has a gain of 2d a layer on its norm.
    parameters, d = report["parameters"][work], 32 // 4
    assert (
        parameters["Llama"] == parameters["transformer"]
        and parameters["DiffLlama"] == parameters["diff_v1"] - 2 * 2 * d
    )
    assert report["machine"]["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "diff_v1 / DiffLlama" in printed and "1.25" in printed and "tokens per second" in printed


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
