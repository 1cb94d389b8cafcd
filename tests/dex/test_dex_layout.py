"""Where a model's attention is, for every family by the same rule; what has none of the kind is refused in one line."""

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from diffx.config import UserError
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
        [Projection(stem + "q_proj", list(range(32)))], [Projection(stem + "k_proj", list(range(16)))],
        [Projection(stem + "v_proj", list(range(16)))],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("family", "queries", "keys", "values"),
    [
        ("phi3", range(32), range(32, 48), range(48, 64)),
        ("gpt2", range(32), range(32, 64), range(64, 96)),
        ("gpt_bigcode", range(32), range(32, 40), range(40, 48)),  # one key and one value for all heads
        *[("gpt_neox", *[[24 * head + 8 * part + i for head in range(4) for i in range(8)] for part in range(3)])],  # head by head
    ],
)
def test_fused_projections_are_told_apart(family, queries, keys, values, make_model):
    layer = find(make_model(family))[0]
    assert [part.rows for part in (*layer.queries, *layer.keys, *layer.values)] == [list(queries), list(keys), list(values)]
    assert len({part.name for part in (*layer.queries, *layer.keys, *layer.values)}) == 1


def test_heads_of_another_width_than_the_models_share(make_model):
    assert {(layer.num_heads, layer.width) for layer in find(make_model("qwen3"))} == {(4, 12)}
    assert {(layer.num_heads, layer.width) for layer in find(make_model("deepseek_v3"))} == {(4, 6)}  # queries are 12 wide


def test_what_enters_the_output_projection_is_head_after_head(make_model, inputs_of):
    """O_i = A_i V_i with the maps that transformers itself returns: the V found so is one for the heads of a group, and no other."""
    model = make_model("qwen2").double()
    layer, inputs = find(model)[0], []
    model.get_submodule(layer.output).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs_of(model), output_attentions=True).attentions[0].double()  # (B, H, T, T)
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
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 48}
STRANGE = {
    "BloomForCausalLM does not let another attention": lambda: t.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=48),
    "the output of model.layers.0.self_attn": lambda: t.DiffLlamaConfig(**SHAPE, num_key_value_heads=4, intermediate_size=48),
    "no attention was seen in MambaForCausalLM": lambda: t.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=48),
}


@pytest.mark.parametrize("reason", STRANGE)
def test_what_is_not_understood_is_refused_in_one_line(reason, capfd):
    model = AutoModelForCausalLM.from_config(STRANGE[reason]()).eval()
    attention = model.config._attn_implementation
    capfd.readouterr()
    with pytest.raises(UserError, match=reason) as caught:
        find(model)
    line = str(caught.value)
    assert line.startswith(f"base={type(model).__name__} cannot be used: ") and "such as Llama" in line and "\n" not in line
    assert capfd.readouterr().err == "" and model.config._attn_implementation == attention
