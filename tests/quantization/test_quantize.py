"""``diffx quantize``: the suite on a quantized model at each width, and the report."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffx.cli import main
from diffx.config.launch import compose
from diffx.config.model import MODEL_CONFIGS
from diffx.config.quantize import StateScope
from diffx.evaluation.long_context import plan
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.run import read_records
from diffx.evaluation.suite import Context
from diffx.hub.attention import decoder_blocks, quantizing_logits
from diffx.hub.convert import to_llama
from diffx.loading import Loaded, load
from diffx.models import build_model, init_weights
from diffx.ops import QuantizedLogits
from diffx.quantization.run import quantize, quantizing_states
from diffx.report.quantized import analyse_quantization

SUITE = "suite.texts=6 suite.chunk=7 wandb.mode=disabled device=cpu"


def words(runs, *more, spec="diff_v1-0"):
    return [f"checkpoint={runs}/{spec}", *SUITE.split(), *more]


def nll(record):
    return next(row["value"] for row in record["rows"] if row["metric"] == "nll")


def whole_loss(model, ids, context):
    with context, torch.no_grad():
        logits = model(ids[None, :-1])[0]
    return F.cross_entropy(logits, ids[1:])


@pytest.mark.parametrize("method", ["attention_logits", "activations"])
def test_the_suite_gives_the_loss_of_a_forward_pass_over_the_whole_text(runs, method, monkeypatch):
    """Against a plain forward pass.

    The suite reads the first token alone: it has one key, so that no rounding changes it.
    """
    monkeypatch.chdir(runs)
    job = compose("quantize", words(runs, f"method={method}", "bits=[3]", "seed=5"))
    folder = quantize(job)[3]
    loaded = load(job.checkpoint)
    examples = plan(Context(job, LanguageModel(loaded), folder, None))
    records = {record["id"]: record for record in read_records(folder)}
    for example in examples:
        ids = torch.as_tensor(np.asarray(example.data["tokens"]).astype(np.int64))
        logits, states = (
            quantizing_logits(loaded.model, QuantizedLogits(3)),
            quantizing_states(loaded.model, 3, StateScope.tensor),
        )
        expected = whole_loss(loaded.model, ids, logits if method == "attention_logits" else states)
        assert nll(records[example.id]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("export", [lambda model: model, to_llama])
@pytest.mark.parametrize("scope", list(StateScope))
def test_states_are_quantized_as_the_oracle_says(scope, export):
    model = build_model(
        MODEL_CONFIGS["transformer"](
            vocab_size=50, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48
        )
    )
    init_weights(model, 0)
    model = export(model.eval())
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))
    seen = []
    blocks = decoder_blocks(model)
    first = blocks[1].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].numpy().astype(np.float64))
    )
    with torch.no_grad():
        model(ids)
        with quantizing_states(model, 4, scope):
            model(ids)
    first.remove()
    exact, few = seen
    for row in range(2):
        for place in range(9):
            peak = np.abs(exact[row] if scope is StateScope.tensor else exact[row, place]).max()
            expected = np.clip(np.rint(exact[row, place] / (peak / 7)), -7, 7) * (peak / 7)
            np.testing.assert_allclose(few[row, place], expected, rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        out = model(ids)
        with quantizing_states(model, 16, scope):
            near = model(ids)
    assert torch.allclose(getattr(out, "logits", out), getattr(near, "logits", near), atol=1e-3)


def test_without_a_cache_the_model_says_the_same(tokenizer, tmp_path):
    for theirs in (decoder("diff_v1", tokenizer), to_llama(decoder("transformer", tokenizer))):
        loaded = Loaded(theirs, tokenizer, "tiny", "f" * 64, tmp_path, 0, 256, None, [], set())
        prompts = [tokenizer.encode("The square of 12"), tokenizer.encode("Note 7")]
        with_cache, without = (LanguageModel(loaded, caches) for caches in (True, False))
        assert with_cache.generate(prompts, 12) == without.generate(prompts, 12)
        drawn = [
            list(lm.sample(prompts[0], 8, temperature=0.9, top_k=0, top_p=1.0, seed=3))
            for lm in (with_cache, without)
        ]
        assert drawn[0] == drawn[1]
        with quantizing_logits(
            theirs, QuantizedLogits(3, "row")
        ):  # whose scale is a row's, which a cache does not change
            assert with_cache.generate(prompts, 12) == without.generate(prompts, 12)


def decoder(kind, tokenizer):
    config = MODEL_CONFIGS[kind](
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
    )
    model = build_model(config)
    init_weights(model, 1)
    return model.eval()


@pytest.mark.slow
def test_a_sweep_ends_in_one_report(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    every = ",".join(
        f"{runs}/{kind}-{seed}" for kind in ("transformer", "diff_v1") for seed in (0, 1)
    )
    assert (
        main(
            [
                "quantize",
                "-m",
                f"checkpoint={every}",
                *SUITE.split(),
                "bits=[2]",
                f"hydra.sweep.dir={runs}/sweep",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "published: arXiv 2410.05258" in out
        and "Change for the worse at 2 bits: " in out
        and "No verdict: 6 examples are too few" in out
    )
    report = json.loads((runs / "sweep" / "long_context-attention_logits.json").read_text())
    assert (
        (runs / "sweep" / "long_context-attention_logits.png").read_bytes().startswith(b"\x89PNG")
    )
    assert [(model["label"], model["checkpoints"]) for model in report["models"]] == [
        ("transformer", 2),
        ("diff_v1", 2),
    ]
    for kind, model in zip(("transformer", "diff_v1"), report["models"], strict=True):
        losses = []
        for seed in (0, 1):
            means = []
            for folder in report["folders"]:
                if f"{kind}-{seed}/" in folder["16"]:
                    means = [
                        np.mean([nll(r) for r in read_records(runs / folder[bits])])
                        for bits in ("16", "2")
                    ]
            losses.append(means[1] - means[0])
        assert model["by_bits"]["2"]["loss"] == pytest.approx(np.mean(losses))
        assert model["by_bits"]["2"]["low"] < np.mean(losses) < model["by_bits"]["2"]["high"]
        assert model["by_bits"]["16"]["loss"] == 0


def test_16_bits_is_the_evaluation_of_the_model_as_it_is(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["eval", *words(runs, "suite=long_context", "seed=2")]) == 0
    before = {
        path: path.stat().st_mtime_ns
        for path in runs.glob("diff_v1-0/evals/*/long_context/*/results.json")
    }
    found = quantize(compose("quantize", words(runs, "bits=[8]", "seed=2")))
    assert found[16] / "results.json" in before, "it was measured again"
    assert before[found[16] / "results.json"] == (found[16] / "results.json").stat().st_mtime_ns
    again = (found[8] / "results.json").stat().st_mtime_ns
    assert quantize(compose("quantize", words(runs, "bits=[8]", "seed=2"))) == found
    assert (found[8] / "results.json").stat().st_mtime_ns == again


def test_a_score_of_which_more_is_better_turns_the_sign(runs, monkeypatch):
    monkeypatch.chdir(runs)
    icl = (
        "suite=icl suite.shots=[1] suite.queries=12 suite.labels=3 wandb.mode=disabled device=cpu "
        "bits=[2]"
    )
    found = quantize(compose("quantize", [f"checkpoint={runs}/diff_v1-0", *icl.split()]))
    report = analyse_quantization([found])
    (model,) = report["models"]
    figures = model["by_bits"]
    assert report["metric"] == "accuracy" and report["better"] == "higher"
    assert figures[2]["loss"] == pytest.approx(figures[16]["value"] - figures[2]["value"])
    assert figures[2]["low"] <= figures[2]["loss"] <= figures[2]["high"]
