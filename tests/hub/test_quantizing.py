"""Quantized logits in whole models: our model and the same model in transformers agree."""

import copy
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from diffx.config import UserError
from diffx.config.model import MODEL_CONFIGS
from diffx.hub.attention import quantizing_logits
from diffx.hub.convert import to_diffllama, to_llama
from diffx.hub.registered import to_diffx
from diffx.models import build_model, init_weights
from diffx.models.attention import attention_modules
from diffx.ops import QuantizedLogits, reference
from diffx.ops.quantized import SCOPES

IDS = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(3))
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 48,
    "init_std": 0.2,
}


def ours(kind):
    model = build_model(MODEL_CONFIGS[kind](num_layers=2, **SHAPE))
    init_weights(model, 0)
    return model.eval().double()


@torch.no_grad()
def logits(model, quantized=None):
    if quantized is None:
        out = model(IDS)
    else:
        with quantizing_logits(model, quantized):
            out = model(IDS)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("kind", "export"),
    [("transformer", to_llama), ("diff_v1", to_diffllama), ("diff_v2", to_diffx)],
)
def test_an_exported_model_is_quantized_as_the_original_is(kind, export, scope):
    model = ours(kind)
    theirs = export(model).eval().double()
    few = logits(model, QuantizedLogits(4, scope))
    torch.testing.assert_close(few, logits(theirs, QuantizedLogits(4, scope)), rtol=1e-4, atol=1e-4)
    assert (few - logits(model)).abs().max() > 0.01


THEIRS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(
            vocab_size=50,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            sliding_window=8,
        )
    ),
}


@pytest.mark.parametrize("model", [*MODEL_CONFIGS, *THEIRS])
def test_many_bits_change_nothing_and_few_bits_do(model):
    torch.manual_seed(0)
    model = THEIRS[model]().eval().double() if model in THEIRS else ours(model)
    exact = logits(model)
    torch.testing.assert_close(logits(model, QuantizedLogits(40)), exact, rtol=1e-6, atol=1e-6)
    assert (logits(model, QuantizedLogits(2)) - exact).abs().max() > 1e-4
    assert torch.equal(logits(model), exact)  # all is as before


@pytest.mark.parametrize("kind", ["diff_v1", "registered", "llama", "llamas of one config"])
def test_two_models_in_one_process_attend_each_in_its_way(kind):
    """Contexts of two models overlap: each model computes what it computes alone."""
    first, second = ours("diff_v1" if kind in ("diff_v1", "registered") else "transformer"), None
    if kind == "diff_v1":
        second = copy.deepcopy(first)
    elif kind == "registered":
        first, second = to_diffx(first), to_diffx(copy.deepcopy(first))
    else:
        first = to_llama(first).double().eval()
        second = (
            LlamaForCausalLM(first.config).double().eval()
            if kind.endswith("config")
            else copy.deepcopy(first)
        )
        second.load_state_dict(first.state_dict())
    exact, coarse, fine = (
        logits(first, quantized) for quantized in (None, QuantizedLogits(3), QuantizedLogits(6))
    )
    assert len({float(out.sum()) for out in (exact, coarse, fine)}) == 3
    with ExitStack() as coarsely, ExitStack() as finely:
        coarsely.enter_context(quantizing_logits(first, QuantizedLogits(3)))
        torch.testing.assert_close(logits(second), exact, rtol=0, atol=0)
        finely.enter_context(quantizing_logits(second, QuantizedLogits(6)))
        for _ in range(2):
            torch.testing.assert_close(logits(first), coarse, rtol=0, atol=0)
            torch.testing.assert_close(logits(second), fine, rtol=0, atol=0)
        if not kind.endswith("config"):
            coarsely.close()
            torch.testing.assert_close(logits(first), exact, rtol=0, atol=0)
            torch.testing.assert_close(logits(second), fine, rtol=0, atol=0)
    torch.testing.assert_close(logits(first), exact, rtol=0, atol=0)


def test_an_implementation_is_a_property_of_the_module():
    model, other = ours("diff_v1"), ours("diff_v1")
    calls = []

    def differential_attention(*args, **options):
        calls.append(args)
        return reference.differential_attention(*args, **options)

    attention_modules(model)[1].implementation = SimpleNamespace(
        differential_attention=differential_attention
    )
    for each in (model, other, model):
        torch.testing.assert_close(logits(each), logits(other))
    assert len(calls) == 2  # of one layer, in the two passes of the first model


def test_an_attention_that_cannot_be_quantized_is_named():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )
    with (
        pytest.raises(UserError, match="T5ForConditionalGeneration"),
        quantizing_logits(t5, QuantizedLogits(4)),
    ):
        t5(IDS, decoder_input_ids=IDS)
