import json
import math

import numpy as np
import pytest
import torch
import transformers
from matplotlib.image import imread
from torch.utils._python_dispatch import TorchDispatchMode

from diffx.config import RunError, UserError
from diffx.config.data import TextData
from diffx.config.eval import EvalJob
from diffx.config.suite import OutliersSuite
from diffx.console import Reporter
from diffx.evaluation import outliers
from diffx.evaluation.outliers import Tally
from diffx.evaluation.suite import Context
from diffx.models.attention import Attention

RANKS = [1, 2, 3, 10, 100]


TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8


@pytest.fixture
def context(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    def make(lm, limit=None, **options):
        suite = OutliersSuite(
            name="outliers", **{"tokens": 90, "length": 32, "top": RANKS} | options
        )
        job = EvalJob(
            checkpoint="tiny",
            suite=suite,
            data=TextData(path=str(tmp_path / "text.txt")),
            limit=limit,
        )
        return Context(job, lm, tmp_path, Reporter())

    return make


@pytest.fixture
def measure(summarize):
    def run(context):
        records = list(outliers.answer(context, outliers.plan(context)))
        return records, {
            name: row["value"] for name, row in summarize(outliers, context, records).items()
        }

    return run


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3000.0])
def test_tally_ranks_exactly_and_finds_the_median(scale):
    values = np.random.default_rng(0).standard_t(2, size=(7, 5001)).astype(np.float32) * scale
    tally = Tally(100)
    for row in values:
        tally.add(torch.cat([torch.from_numpy(row), torch.tensor([-torch.inf, torch.inf])]))
    whole = np.sort(np.abs(values).flatten())[::-1]
    assert tally.top == whole[:100].tolist()
    assert tally.counts.sum() == whole.size
    assert tally.figures(RANKS)["median"] == pytest.approx(np.median(whole), rel=1 / 64)
    assert tally.figures(RANKS)["median"] == pytest.approx(
        np.median(whole), rel=2e-3
    )  # as close as that within the bin


def test_tallies_merge_to_the_tally_of_all():
    values = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
    whole, merged = Tally(10), Tally(10)
    whole.add(values)
    for row in values:
        part = Tally(10)
        part.add(row)
        merged.merge(json.loads(json.dumps(part.record())))
    assert merged.figures([1, 10]) == pytest.approx(whole.figures([1, 10]), rel=1e-6)
    assert "top-100" not in whole.figures([100])


def test_tiny_magnitudes_count_as_the_smallest_that_is_told_apart():
    tally, merged = Tally(1), Tally(1)
    tally.add(torch.tensor([0.0, 0.0, 1e-30, 5.0]))
    merged.merge(tally.record())
    assert merged.top == [5.0] and merged.figures([1])["median"] == pytest.approx(
        2**-20, rel=1 / 64
    )


@pytest.mark.parametrize("kind", ["transformer", "diff_v1", "diff_v2"])
def test_figures_are_those_of_the_whole_maps(kind, context, tiny, measure):
    lm = tiny(kind)
    model = lm.model
    seen = {outliers.LOGITS: [[], []], outliers.STATES: [[], []]}

    def logits(module, args):
        q, k, _ = module.project(*args[:3])
        if kind == "diff_v1":  # head j reads the first or second key of its group
            k = (
                k.unflatten(2, (-1, 2))
                .repeat_interleave(q.shape[2] // k.shape[2], dim=2)
                .flatten(2, 3)
            )
        else:
            k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        maps = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
        causal = torch.ones(maps.shape[2:], dtype=torch.bool).tril()
        seen[outliers.LOGITS][module.layer].append(maps[:, :, causal].abs().flatten())

    suite = context(lm)
    windows = [
        example.data["tokens"]
        for example in outliers.plan(suite)
        if example.data["task"] == outliers.LOGITS
    ]
    assert [len(window) for window in windows] == [32, 32, 26] and all(
        window[:1] == lm.prefix for window in windows
    )
    assert "".join(lm.decode(window[1:]) for window in windows) == TEXT[: 90 - 3]
    records, figures = measure(suite)
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(logits)
    for layer, block in enumerate(model.layers):
        block.register_forward_hook(
            lambda _, __, out, layer=layer: seen[outliers.STATES][layer].append(out.abs().flatten())
        )
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    for group, layers in seen.items():
        whole = torch.cat([part for layer in layers for part in layer]).sort(descending=True).values
        for rank in RANKS:
            assert figures[group, f"top-{rank}"] == pytest.approx(float(whole[rank - 1]), rel=1e-5)
        assert figures[group, "median"] == pytest.approx(float(whole.median()), rel=1 / 64)
        own = [record for record in records if record["by"]["task"] == group]
        for number, record in enumerate(own):
            assert record["id"] == f"{group}/{number:05d}"
            assert record["scores"]["top-1, mean over windows"] == pytest.approx(
                max(float(layer[number].max()) for layer in layers), rel=1e-5
            )
            for layer in (0, 1):
                assert sum(record["layers"][layer]["counts"]) == len(layers[layer][number])


def test_states_of_transformers_are_counted_too(context, wrap, tokenizer, measure):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    suite = context(wrap(model), limit=1)
    records, _ = measure(suite)
    assert [record["id"] for record in records] == [
        f"{outliers.LOGITS}/00000",
        f"{outliers.STATES}/00000",
    ]
    window = torch.tensor([outliers.plan(suite)[0].data["tokens"]])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(window, output_hidden_states=True).hidden_states[1]
    assert records[1]["layers"][0]["top"][0] == pytest.approx(float(expected.abs().max()), rel=1e-4)


def test_an_interrupted_evaluation_gives_the_same_figures(context, tiny, measure, summarize):
    suite = context(tiny("diff_v1"))
    examples = outliers.plan(suite)
    records, figures = measure(suite)
    resumed = [
        record
        for part in ([4], [1, 0], [5, 2, 3])
        for record in outliers.answer(suite, [examples[i] for i in part])
    ]
    assert {record["id"]: record for record in resumed} == {
        record["id"]: record for record in records
    }
    assert {
        name: row["value"] for name, row in summarize(outliers, suite, resumed).items()
    } == pytest.approx(figures)


class Largest(TorchDispatchMode):
    """The most elements that a result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(
                    self.elements, tensor.untyped_storage().nbytes() // tensor.element_size()
                )
        return out


@pytest.mark.parametrize("kind", ["transformer", "diff_v1"])
def test_memory_grows_with_the_tokens_and_not_with_their_square(kind, context, tiny, monkeypatch):
    monkeypatch.setattr(outliers, "_ELEMENTS", 2**14)
    lm, largest = tiny(kind), {}
    for length in (512, 1024):
        suite = context(lm, tokens=length, length=length)
        examples = outliers.plan(suite)
        with Largest() as mode:
            list(outliers.answer(suite, examples))
        largest[length] = mode.elements
    assert largest[1024] <= 2 * largest[512] and largest[1024] < 1024 * 1024 / 4


def test_windows_that_do_not_fit_are_refused(context, tiny):
    suite = context(tiny("transformer"))
    suite.lm.limit = 16
    with pytest.raises(UserError, match=r"suite.length=32 .* 16 tokens at most"):
        outliers.plan(suite)
    with pytest.raises(UserError, match=r"suite.length=1 .* more than 1"):
        outliers.plan(context(tiny("transformer"), length=1))


def test_little_text_is_measured_whole_and_said(context, tiny, capsys):
    examples = outliers.plan(context(tiny("transformer"), tokens="400K"))
    assert sum(len(example.data["tokens"]) for example in examples) // 2 in range(592, 640)
    assert "the text has only" in "".join(capsys.readouterr())


def test_values_that_are_not_finite_stop_the_run(context, tiny, measure):
    lm = tiny("diff_v1")
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(RunError, match="layer 1"):
        measure(context(lm))


def test_the_picture_and_the_figures_by_layer(context, tiny, summarize, tmp_path):
    suite = context(tiny("diff_v1"))
    records = list(outliers.answer(suite, outliers.plan(suite)))
    rows = summarize(outliers, suite, records, tmp_path / "outliers.png")
    for task in (outliers.LOGITS, outliers.STATES):
        whole, windows = rows[task, "top-1"], rows[task, "top-1, mean over windows"]
        assert whole["published"] and whole["low"] is None and windows["low"] < windows["high"]
        layers = [rows[f"{task}, layer {layer}", "top-1"] for layer in (0, 1)]
        assert max(row["value"] for row in layers) == whole["value"] and not layers[0]["published"]
        windows = [
            record["scores"]["top-1, mean over windows"]
            for record in records
            if record["by"]["task"] == task
        ]
        assert whole["value"] == max(windows)
    assert rows[outliers.LOGITS, "top-1"]["published"] == {
        "Transformer-3B (paper)": 318.0,
        "DIFF-3B (paper)": 38.8,
    }
    assert imread(tmp_path / "outliers.png").std() > 0.05
