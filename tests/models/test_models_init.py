"""Initial weights: the documented table, and what depends on the seed."""

import math

import pytest
import torch

from diffx.config.model import MODEL_CONFIGS, DiffV1Config, Ffn
from diffx.models import build_model, init_weights

SHAPE = {
    "hidden_size": 128,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 300,
}


def make(kind, seed=0, **options):
    model = build_model(MODEL_CONFIGS[kind](**SHAPE, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)  # what init_weights forgets stays
    init_weights(model, seed)
    return model


@pytest.mark.parametrize("kind", MODEL_CONFIGS)
@pytest.mark.parametrize("scaled", [False, True])
def test_standard_deviations(kind, scaled):
    model = make(kind, init_std=0.03, scale_residual_init=scaled, tie_embeddings=False)
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight").split(".")[-1]
        if "norm" in layer:
            assert (parameter == 1).all(), name
            continue
        if layer == "sinks":
            assert (parameter == 0).all(), name
            continue
        if layer.startswith("lambda_") and layer != "lambda_proj":
            std = 0.1
        else:
            std = (
                0.03 / 2 if scaled and layer in ("o_proj", "down_proj") else 0.03
            )  # sqrt(2 · 2 layers) = 2
        bound = 4 / parameter.numel() ** 0.5  # four standard errors
        assert abs(parameter.mean()) < bound * std, name
        assert abs(parameter.std() / std - 1) < bound, name


def test_polynorm_begins_as_the_mean_of_the_powers():
    act_fn = make("diff_v1", ffn=Ffn.polynorm).layers[1].mlp.act_fn
    assert act_fn.weight.tolist() == pytest.approx([1 / 3] * 3) and act_fn.bias.item() == 0


def test_the_default_deviation_follows_the_width():
    weight = make("diff_v1").layers[0].mlp.gate_proj.weight
    assert abs(weight.std() * 128**0.5 - 1) < 4 / weight.numel() ** 0.5


def test_lambda_deviation_over_many():
    model = build_model(DiffV1Config(**SHAPE | {"num_layers": 40}), device="cpu")
    init_weights(model, 0)
    vectors = torch.cat([p.flatten() for name, p in model.named_parameters() if ".lambda_" in name])
    assert vectors.numel() == 40 * 4 * 16 and abs(vectors.std() / 0.1 - 1) < 0.04


def test_seed_decides():
    first, again, other = make("diff_v1"), make("diff_v1"), make("diff_v1", seed=1)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        assert "norm" in name or not torch.equal(weight, other.state_dict()[name]), name


def test_global_generator_and_type_do_not_matter():
    before = torch.random.get_rng_state()
    model = make("diff_v2")
    assert torch.equal(before, torch.random.get_rng_state())
    double = build_model(model.config).double()
    init_weights(double, 0)
    assert torch.equal(double.embed_tokens.weight, model.embed_tokens.weight.double())


@pytest.mark.parametrize("kind", MODEL_CONFIGS)
def test_common_tensors_are_equal_across_architectures(kind):
    baseline, state = make("transformer").state_dict(), make(kind).state_dict()
    common = [name for name in baseline if state[name].shape == baseline[name].shape]
    assert {
        "embed_tokens.weight",
        "layers.1.mlp.up_proj.weight",
        "layers.0.self_attn.k_proj.weight",
    } <= set(common)
    assert all(torch.equal(state[name], baseline[name]) for name in common)
