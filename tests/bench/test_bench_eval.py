import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from diffx.bench import eval as bench
from diffx.bench import timing
from diffx.config import UserError


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)


@pytest.mark.slow
def test_figures_and_table(hf_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "BATCHES", (1, 2))
    out = tmp_path / "bench.json"
    report = bench.bench_eval(out, str(hf_folder), documents=2, rounds=2, device="cpu")
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert list(report["seconds"]) == list(bench.CASES)
    numbers = dict(zip(bench.CASES, (2, 8, 8, 2, 2), strict=True))
    for ratio, (work, (_, target)) in zip(report["ratios"], bench.CASES.items(), strict=True):
        seconds, rates = report["seconds"][work], report["requests_per_second"][work]
        assert list(seconds) == ["diffx", "HFLM, batch 1", "HFLM, batch 2"] and all(
            len(times) == 2 for times in seconds.values()
        )
        assert ratio["work"] == work and ratio["target"] == (target, None)
        assert rates[ratio["to"]] == max(rates["HFLM, batch 1"], rates["HFLM, batch 2"])

        assert rates["diffx"] == pytest.approx(numbers[work] / (sum(seconds["diffx"]) / 2))
    printed = capsys.readouterr().out
    assert "choices that share a prompt" in printed and "1.50" in printed


def test_requests_share_their_prompts():
    alone, letters, choices, *_ = bench._requests(3).values()
    assert len({request.args[0] for request in alone}) == 3
    for requests in (letters, choices):
        assert (
            len({request.args[0] for request in requests}) == 3
            and len({request.args for request in requests}) == 12
        )
    assert bench._requests(3)["choices that share a prompt"][5].args == choices[5].args


def test_input_that_cannot_be_used(hf_folder, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"out=.* cannot be used: it must be the name"):
        bench.bench_eval(tmp_path, str(hf_folder), 1, 1, "cpu")
    for options, message in (
        ({}, "must be a Llama"),
        ({"attention_bias": True}, "attention_bias=True"),
    ):
        folder = tmp_path / f"other{len(options)}"
        config = AutoConfig.for_model(
            "llama" if options else "mistral", vocab_size=tokenizer.vocab_size, hidden_size=16,
            intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, **options,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save(folder)
        with pytest.raises(UserError, match=message):
            bench.bench_eval(None, str(folder), 1, 1, "cpu")
