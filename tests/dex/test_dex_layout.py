"""Finding the attention of a model, by one rule for all families; other models are refused."""

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from diffx.config import UserError
from diffx.dex.attach import fold
from diffx.dex.layout import Layer, Projection, find_layers

IDS = torch.tensor([[1, 2]])


def find(model):
    return find_layers(model, {"input_ids": IDS})


def test_llama(make_model):
    layers = find(make_model("llama"))
    stem = "model.layers.1.self_attn."
    assert len(layers) == 2
    assert layers[1] == Layer(
        stem + "o_proj", 4, 8,
        [Projection(stem + "q_proj", list(range(32)))],
        [Projection(stem + "k_proj", list(range(16)))],
        [Projection(stem + "v_proj", list(range(16)))],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "queries", "keys", "values"),
    [
        ("phi3", range(32), range(32, 48), range(48, 64)),
        ("gpt2", range(32), range(32, 64), range(64, 96)),
        (
            "gpt_bigcode",
            range(32),
            range(32, 40),
            range(40, 48),
        ),  # one key and one value for all heads
        *[
            (
                "gpt_neox",
                *[
                    [24 * head + 8 * part + i for head in range(4) for i in range(8)]
                    for part in range(3)
                ],
            )
        ],  # head by head
    ],
)
def test_fused_projections_are_told_apart(family, queries, keys, values, make_model):
    layer = find(make_model(family))[0]
    assert [part.rows for part in (*layer.queries, *layer.keys, *layer.values)] == [
        list(queries),
        list(keys),
        list(values),
    ]
    assert len({part.name for part in (*layer.queries, *layer.keys, *layer.values)}) == 1


def test_heads_of_another_width_than_the_models_share(make_model):
    assert {(layer.num_heads, layer.width) for layer in find(make_model("qwen3"))} == {(4, 12)}
    assert {(layer.num_heads, layer.width) for layer in find(make_model("deepseek_v3"))} == {
        (4, 6)
    }  # queries are 12 wide


def test_what_enters_the_output_projection_is_head_after_head(make_model, inputs_of):
    """V, solved from O_i = A_i V_i with transformers' maps, is shared only by a group's heads."""
    model = make_model("qwen2").double()
    layer, inputs = find(model)[0], []
    model.get_submodule(layer.output).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = (
            model(**inputs_of(model), output_attentions=True).attentions[0].double()
        )  # (B, H, T, T)
    o = inputs[0].unflatten(-1, (layer.num_heads, layer.width)).transpose(1, 2)  # (B, H, T, d_v)
    values = torch.linalg.solve_triangular(maps, o, upper=False)
    for i in range(4):
        for j in range(4):
            distance = float((values[:, i] - values[:, j]).abs().max())
            assert (distance < 1e-3) is (i // 2 == j // 2), (i, j, distance)


def test_looking_changes_nothing(family, make_model, read):
    model = make_model(family)
    before, attention = read(model), model.config._attn_implementation
    model.train()
    find(model)
    assert model.training and model.config._attn_implementation == attention
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(read(model.eval()), before)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )


GROUPED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 48,
}
GROUPED |= {
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
# Routers that are linear maps and return two tensors, masks and states passed by keyword,
# outputs that are changed in place.
UNUSUAL = {
    "llama4": lambda: t.Llama4TextConfig(
        **GROUPED, head_dim=8, num_local_experts=2, intermediate_size_mlp=48
    ),
    "phimoe": lambda: t.PhimoeConfig(**GROUPED, **EXPERTS),
    "doge": lambda: t.DogeConfig(**GROUPED),
    "gemma3n": lambda: t.Gemma3nTextConfig(
        **GROUPED,
        head_dim=8,
        vocab_size_per_layer_input=48,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
    ),
    "olmoe, clipped": lambda: t.OlmoeConfig(
        **GROUPED, clip_qkv=0.5, num_experts=4, num_experts_per_tok=2
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_families_are_adapted_and_folded(name, put):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNUSUAL[name]()).eval()
    ids = torch.randint(1, 48, (2, 12))
    before = model(input_ids=ids).logits.detach()
    adapted = put(model)
    adapted.set_step(8)
    for branch in adapted.branches:
        branch.lambda_learn.data.fill_(0.3)
        branch.w_d.data.normal_()
    changed = model(input_ids=ids).logits
    changed.sum().backward()
    assert len(adapted.branches) == 2 and all(
        branch.w_d.grad.abs().sum() > 0 for branch in adapted.branches
    )
    assert (changed - before).norm() > 0.05 * before.norm()
    assert (fold(adapted)(input_ids=ids).logits - changed).norm() < 2e-6 * changed.norm()


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
STRANGE = {
    "BloomForCausalLM does not let another attention": lambda: t.BloomConfig(
        hidden_size=32, n_layer=1, n_head=4, vocab_size=48
    ),
    "the output of model.layers.0.self_attn": lambda: t.DiffLlamaConfig(
        **SHAPE, num_key_value_heads=4, intermediate_size=48
    ),
    "model.layers.1.shared_transformer.self_attn.k_proj is shared by several layers": lambda: (
        t.Zamba2Config(
            **GROUPED | {"num_hidden_layers": 4},
            n_mamba_heads=2,
            mamba_d_state=4,
            mamba_headdim=32,
            layers_block_type=["mamba", "hybrid"] * 2,
            num_mem_blocks=1,
        )
    ),
    "the output of model.layers.0.self_attn as it is": lambda: t.AfmoeConfig(
        **GROUPED,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_dense_layers=1,
    ),
    "no attention was seen in MambaForCausalLM": lambda: t.MambaConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=48
    ),
}


@pytest.mark.parametrize("reason", STRANGE)
def test_what_is_not_understood_is_refused_in_one_line(reason, capfd):
    model = AutoModelForCausalLM.from_config(STRANGE[reason]()).eval()
    attention = model.config._attn_implementation
    capfd.readouterr()
    with pytest.raises(UserError, match=reason) as caught:
        find(model)
    line = str(caught.value)
    assert (
        line.startswith(f"base={type(model).__name__} cannot be used: ")
        and "such as Llama" in line
        and "\n" not in line
    )
    assert capfd.readouterr().err == "" and model.config._attn_implementation == attention


def test_weights_that_layers_share_are_refused(make_model):
    model = make_model("llama")
    one, other = (model.get_submodule(f"model.layers.{layer}.self_attn.o_proj") for layer in (0, 1))
    other.weight = one.weight
    with pytest.raises(
        UserError, match=r"model\.layers\.0\.self_attn\.o_proj is shared by several layers"
    ):
        find(model)


def test_a_model_that_fails_is_one_line(make_model, monkeypatch):
    model = make_model("llama")
    monkeypatch.setattr(type(model.model.layers[1].mlp), "forward", lambda self, x: [][0])
    with pytest.raises(
        UserError, match="LlamaForCausalLM fails while it is watched: list index out of range"
    ):
        find(model)
