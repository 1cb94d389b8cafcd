"""Conversions against the models of transformers themselves."""

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, LlamaConfig, LlamaForCausalLM

from diffx.config.model import (
    DiffGDAConfig,
    DiffV1Config,
    DiffV2Config,
    Ffn,
    Halve,
    LambdaScope,
    Sign,
    TransformerConfig,
)
from diffx.hub.convert import from_diffllama, from_llama, to_diffllama, to_llama
from diffx.models import build_model, init_weights

SHAPE = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 8,
    "intermediate_size": 96,
    "vocab_size": 50,
    "rope_theta": 500.0,
    "init_std": 0.15,
}
WAYS = {
    "llama": (TransformerConfig, to_llama, from_llama, LlamaConfig, LlamaForCausalLM),
    "diffllama": (
        DiffV1Config,
        to_diffllama,
        from_diffllama,
        DiffLlamaConfig,
        DiffLlamaForCausalLM,
    ),
}
IDS = torch.randint(50, (2, 33), generator=torch.Generator().manual_seed(3))
each_shape = pytest.mark.parametrize(("kv_heads", "tied"), [(8, True), (4, True), (2, False)])


def make(config):
    model = build_model(config)
    init_weights(model, 0)
    with torch.no_grad():  # gains other than one
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def assert_same_logits(ours, theirs):
    with torch.no_grad():
        a, b = ours(IDS), theirs(IDS).logits
    assert b.std() > 0.1
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@each_shape
def test_ours_to_theirs(way, kv_heads, tied):
    config_class, to_theirs, from_theirs, _, model_class = WAYS[way]
    ours = make(config_class(**SHAPE, num_kv_heads=kv_heads, tie_embeddings=tied))
    theirs = to_theirs(ours)
    assert type(theirs) is model_class
    assert_same_logits(ours, theirs)
    back = from_theirs(theirs)
    assert_same_logits(back, theirs)
    state, returned = ours.state_dict(), back.state_dict()
    folded = ("o_proj.weight", "sublayer_norm.weight") if way == "diffllama" else ()
    assert all(
        torch.equal(state[name], returned[name]) for name in state if not name.endswith(folded)
    )


@pytest.mark.parametrize("way", WAYS)
@each_shape
def test_theirs_to_ours(way, kv_heads, tied):
    _, to_theirs, from_theirs, their_config, their_model = WAYS[way]
    torch.manual_seed(0)
    config = their_config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=kv_heads,
        intermediate_size=96, vocab_size=50, rope_theta=500.0, tie_word_embeddings=tied,
        initializer_range=0.15, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = their_model(config).eval()
    ours = from_theirs(theirs)
    assert_same_logits(ours, theirs)
    state, returned = theirs.state_dict(), to_theirs(ours).state_dict()
    assert state.keys() == returned.keys()
    assert all(torch.equal(state[name], returned[name]) for name in state)


def test_types_are_kept():
    ours = make(DiffV1Config(**SHAPE, num_kv_heads=4)).bfloat16()
    theirs = to_diffllama(ours)
    assert theirs.dtype == torch.bfloat16
    back = from_diffllama(theirs)
    assert (
        back.embed_tokens.weight.dtype == torch.bfloat16
        and back.layers[0].self_attn.lambda_q1.dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_init": 0.8}, "model.lambda_init=0.8"),
        ({"lambda_scope": LambdaScope.head}, "model.lambda_scope="),
        ({"sublayer_norm": False}, "model.sublayer_norm=False"),
        ({"halve": Halve.head_dim}, "model.halve="),
        ({"sign": Sign.plus}, "model.sign="),
        ({"lambda_init": "depth-1"}, "model.lambda_init=depth-1"),
        ({"sublayer_norm_eps": 1e-6}, "model.sublayer_norm_eps="),
        ({"ffn": Ffn.polynorm}, "model.ffn=polynorm"),
    ],
)
def test_what_diffllama_is_not(options, message):
    with pytest.raises(ValueError, match=message):
        to_diffllama(build_model(DiffV1Config(**SHAPE, num_kv_heads=4, **options)))


def test_other_architectures_are_refused():
    with pytest.raises(ValueError, match="model=diff_gda cannot be written as a DiffLlama"):
        to_diffllama(build_model(DiffGDAConfig(**SHAPE, num_kv_heads=4)))
    with pytest.raises(ValueError, match=r"model\.ffn=polynorm cannot be written"):
        to_llama(build_model(TransformerConfig(**SHAPE, num_kv_heads=4, ffn=Ffn.polynorm)))
    model = build_model(DiffV2Config(**SHAPE, num_kv_heads=4))
    with pytest.raises(ValueError, match="model=diff_v2 cannot be written as a Llama"):
        to_llama(model)
    with pytest.raises(ValueError, match="model=diff_v2 cannot be written as a DiffLlama"):
        to_diffllama(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type=linear"),
    ],
)
def test_llamas_that_we_are_not(options, message):
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        intermediate_size=96,
        vocab_size=50,
        **options,
    )
    with pytest.raises(ValueError, match=message):
        from_llama(LlamaForCausalLM(config))
