"""Motif-2.6B's published layout, written here, against a forward pass in NumPy and float64."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from diffx.cli import main
from diffx.config import UserError
from diffx.hub.attention import observing
from diffx.loading import load

CONFIG = {
    "architectures": ["MotifForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_motif.MotifConfig"},
    "model_type": "motif",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 257,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-6,
    "attn_rms_norm_eps": 1e-3,
    "hidden_act": "poly_norm",
    "max_position_embeddings": 256,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
    "bos_token_id": 256,
}


def weights(config, seed=0):
    width, ffn, d = config["hidden_size"], config["intermediate_size"], 8
    kv = config["num_key_value_heads"] * d
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, std=0.3, mean=0.0):
        return mean + std * torch.randn(shape, generator=generator)

    tensors = {"model.embed_tokens.weight": draw(config["vocab_size"], width)}
    tensors["model.norm.weight"] = draw(width, mean=1.0)
    for layer in range(config["num_hidden_layers"]):
        block, attn = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = draw(width, mean=1.0)
        for name, rows in (("q", width), ("k", kv), ("v", kv), ("o", width)):
            tensors[f"{attn}{name}_proj.weight"] = draw(rows, width)
        for name in ("q1", "k1", "q2", "k2"):
            tensors[f"{attn}lambda_{name}"] = draw(d)
        tensors[f"{attn}subln.weight"] = draw(2 * d, mean=1.0)
        tensors[f"{block}mlp.gate_proj.weight"] = draw(ffn, width)
        tensors[f"{block}mlp.up_proj.weight"] = draw(ffn, width)
        tensors[f"{block}mlp.down_proj.weight"] = draw(width, ffn)
        tensors[f"{block}mlp.act_fn.weight"] = draw(3)
        tensors[f"{block}mlp.act_fn.bias"] = draw(1)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw(config["vocab_size"], width)
    return tensors


def write(folder, tokenizer, tensors=None, **changes):
    config = CONFIG | changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config) if tensors is None else tensors, folder / "model.safetensors")
    tokenizer.save(folder)
    return config


def rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def rope(x, theta):
    """Rotate features i and i + d/2 of x (T, d) together, as Llama does."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], 1)


def softmax_map(q, k, theta):
    logits = rope(q, theta) @ rope(k, theta).T / math.sqrt(q.shape[1])
    exponentials = np.tril(np.exp(logits))
    return exponentials / exponentials.sum(1, keepdims=True)


def forward(config, tensors, ids):
    """Logits (T, V), by the description of the layout."""
    p = {name: x.double().numpy() for name, x in tensors.items()}
    d, eps, theta = 8, config["rms_norm_eps"], config["rope_theta"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    x = p["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        block, attn = f"model.layers.{layer}.", f"model.layers.{layer}.self_attn."
        y = rms(x, eps) * p[f"{block}input_layernorm.weight"]
        q, k, v = (
            (y @ p[f"{attn}{name}_proj.weight"].T).reshape(len(ids), -1, d) for name in "qkv"
        )
        initial = 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))
        dot = [p[f"{attn}lambda_q{i}"] @ p[f"{attn}lambda_k{i}"] for i in (1, 2)]
        lam = math.exp(dot[0]) - math.exp(dot[1]) + initial
        outputs = []
        for j in range(heads // 2):  # even heads the first map, odd heads the second
            g = j // (heads // kv_heads)
            first = softmax_map(q[:, 0::2][:, j], k[:, 0::2][:, g], theta)
            second = softmax_map(q[:, 1::2][:, j], k[:, 1::2][:, g], theta)
            value = np.concatenate([v[:, 0::2][:, g], v[:, 1::2][:, g]], 1)
            out = rms((first - lam * second) @ value, config["attn_rms_norm_eps"])
            outputs.append((1 - initial) * out * p[f"{attn}subln.weight"])
        x = x + np.concatenate(outputs, 1) @ p[f"{attn}o_proj.weight"].T
        y = rms(x, eps) * p[f"{block}post_attention_layernorm.weight"]
        gate = y @ p[f"{block}mlp.gate_proj.weight"].T
        powers = [rms(gate**power, 1e-6) for power in (3, 2, 1)]
        act = sum(
            w * power for w, power in zip(p[f"{block}mlp.act_fn.weight"], powers, strict=True)
        )
        act = act + p[f"{block}mlp.act_fn.bias"]
        x = (
            x
            + (act * (y @ p[f"{block}mlp.up_proj.weight"].T)) @ p[f"{block}mlp.down_proj.weight"].T
        )
    x = rms(x, eps) * p["model.norm.weight"]
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ p[head].T


@pytest.fixture(scope="module")
def motif(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("motif") / "tiny-motif"
    write(folder, tokenizer)
    return folder


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False)])
def test_logits_are_those_of_an_independent_forward(tmp_path, tokenizer, kv_heads, tied):
    changes = {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    config = write(tmp_path / "motif", tokenizer, **changes)
    loaded = load(str(tmp_path / "motif"))
    ids = torch.randint(257, (1, 19), generator=torch.Generator().manual_seed(0))
    model = loaded.model.double()
    for attn in (layer.self_attn for layer in model.decoder.layers):
        attn.implementation = "reference"
    with torch.no_grad():
        logits = model(ids).logits[0]
    expected = torch.from_numpy(forward(config, weights(config), ids[0].numpy()))
    # The tables of RoPE are fp32.
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    assert loaded.architecture == "diff_v1" and loaded.limit == 256 and 256 in loaded.ends
    lam = model.decoder.layers[0].self_attn
    assert lam.lambda_init == pytest.approx(0.8 - 0.6 * math.exp(0.3))


def test_lambda_stays_in_fp32(motif):
    model = AutoModelForCausalLM.from_pretrained(motif, dtype=torch.bfloat16)
    attn = model.decoder.layers[1].self_attn
    assert attn.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(attn.lambda_q1, weights(CONFIG)["model.layers.1.self_attn.lambda_q1"])


def test_it_is_observed_and_saved_as_any_model_is(motif, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(motif)
    ids, views, states = torch.arange(9)[None], {}, {}
    with torch.no_grad(), observing(model, views.__setitem__, states.__setitem__):
        logits = model(ids).logits
    assert sorted(views) == sorted(states) == [0, 1, 2] and views[1].num_heads == 2
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "diffx"
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


@pytest.mark.slow
def test_commands_run_on_it(motif, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = f"checkpoint={motif}"
    assert main(["generate", checkpoint, "prompt=ab", "max_tokens=3"]) == 0
    (tmp_path / "text.txt").write_text("The tower was closed for the winter. " * 200)
    text = ["data=text", "data.path=text.txt", "data.val_tokens=1000"]
    common = [checkpoint, "wandb.mode=disabled", "device=cpu"]
    allocation = ["suite=attention_allocation", "suite.length=200", "suite.samples=1"]
    assert main(["eval", *common, *allocation, "suite.case=[1,1]"]) == 0
    assert main(["quantize", *common, *text, "bits=[8]", "suite.texts=1"]) == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "silu"}, "hidden_act=silu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type=linear"),
        ({"num_key_value_heads": 1}, "num_kv_heads=1"),
    ],
)
def test_another_motif_is_refused_in_one_line(motif, tmp_path, changes, named, capsys):
    folder = tmp_path / "other"
    shutil.copytree(motif, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    assert main(["generate", f"checkpoint={folder}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and error.startswith("error:") and named in error


def test_weights_of_another_layout_are_refused(tmp_path, tokenizer):
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    write(tmp_path / "biased", tokenizer, weights(CONFIG) | extra)
    with pytest.raises(UserError, match=r"q_proj\.bias"):
        load(str(tmp_path / "biased"))
    tensors = weights(CONFIG)
    del tensors["model.layers.2.self_attn.lambda_k2"]
    write(tmp_path / "partial", tokenizer, tensors)
    with pytest.raises(UserError, match="lambda_k2"):
        load(str(tmp_path / "partial"))
