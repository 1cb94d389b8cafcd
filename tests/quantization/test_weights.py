"""``method=weights``: what torchao stores, how it loads, and its evaluation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from diffx.cli import main
from diffx.config import UserError
from diffx.config.launch import compose
from diffx.export import to_transformers
from diffx.loading import load, load_run
from diffx.quantization import weights
from diffx.quantization.run import quantize

SUITE = "method=weights suite.texts=6 wandb.mode=disabled device=cpu"
GROUP = "method.group_size=16"
PROMPT = [[72, 101, 108, 108]]
GENERATES = f"""
import sys, torch, diffx
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(model.generate(torch.tensor({PROMPT}), max_new_tokens=12, do_sample=False).tolist())
"""


def words(checkpoint, *more):
    return [f"checkpoint={checkpoint}", *SUITE.split(), *more]


def copy(run, where):
    """A run without what other tests made of it."""
    shutil.copytree(run, where, ignore=shutil.ignore_patterns("evals", "quantized"))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def stored(found, bits):
    """The folder of the quantized model behind an evaluation."""
    return Path(results(found[bits])["change"]["folder"])


def loss(folder):
    return next(
        metric["value"] for metric in results(folder)["metrics"] if metric["metric"] == "nll"
    )


@pytest.mark.parametrize(
    ("kind", "bits", "group"),
    [
        ("transformer", 8, None),
        ("diff_v1", 4, 16),
        *(
            pytest.param(kind, bits, group, marks=pytest.mark.slow)
            for kind, few in (
                ("transformer", [(4, None), (2, 16)]),
                ("diff_v1", [(8, 16), (4, None), (2, 16)]),
            )
            for bits, group in few
        ),
    ],
)
def test_stored_weights_are_the_nearest_of_their_grid(runs, kind, bits, group, monkeypatch):
    """Against NumPy in fp64: w = q·s with integer q, off by half a step at most.

    The scale of a group is s = max|w| / (2^(bits-1) - 1/2).
    """
    monkeypatch.chdir(runs)
    skip = "method.skip=[layers.0.self_attn.o_proj,up_proj]"
    found = quantize(
        compose("quantize", words(f"{kind}-0", f"bits=[{bits}]", skip, *([GROUP] if group else [])))
    )
    few = AutoModelForCausalLM.from_pretrained(stored(found, bits), dtype=torch.float32)
    exact = dict(to_transformers(load_run(f"{kind}-0"))[0].named_parameters(remove_duplicate=False))
    linear = {
        f"{name}.weight" for name, module in few.named_modules() if isinstance(module, nn.Linear)
    }
    left = {
        name
        for name in linear
        if "lm_head" in name or "layers.0.self_attn.o_proj" in name or "up_proj" in name
    }
    assert len(left) == 1 + 1 + 2 and len(linear - left) == 6 + 5
    for name, parameter in few.named_parameters(remove_duplicate=False):
        if name not in linear - left:
            assert torch.equal(parameter, exact[name]), name
            continue
        before = exact[name].detach().double().numpy()
        before = before.reshape(
            before.shape[0], -1, group or (before.shape[1] if bits == 8 else 32)
        )
        step = np.abs(before).max(-1, keepdims=True) / (2 ** (bits - 1) - 0.5)
        after = parameter.dequantize().detach().double().numpy().reshape(before.shape)
        whole = np.rint(after / step)
        np.testing.assert_allclose(after / step, whole, atol=1e-4)
        assert -(2 ** (bits - 1)) <= whole.min() and whole.max() <= 2 ** (bits - 1) - 1
        assert np.all(np.abs(after - before) <= step * (0.5 + 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2"])
def test_it_loads_and_is_measured_like_any_model(runs, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(runs / f"{kind}-0", "run")
    found = quantize(compose("quantize", words("run", "bits=[8,2]", GROUP)))
    assert 0 < abs(loss(found[8]) - loss(found[16])) < abs(loss(found[2]) - loss(found[16]))
    few = stored(found, 8)
    facts = results(found[8])["change"]
    assert facts["bytes"] < 0.6 * facts["bytes_before"]
    assert facts["bytes"] == (few / "model.safetensors").stat().st_size
    model = load(str(few)).model
    here = model.generate(torch.tensor(PROMPT), max_new_tokens=12, do_sample=False).tolist()
    there = subprocess.run(
        [sys.executable, "-c", GENERATES, few], capture_output=True, text=True, check=True
    )
    assert there.stdout.split("\n")[-2] == str(here)
    assert (
        main(
            [
                "eval",
                f"checkpoint={few}",
                "suite=long_context",
                "suite.texts=6",
                "wandb.mode=disabled",
                "device=cpu",
            ]
        )
        == 0
    )
    (own,) = Path("runs/hub").glob("*/evals/0/long_context/*")
    assert loss(own) == pytest.approx(loss(found[8]), abs=1e-6)


@pytest.mark.slow
def test_an_adapted_run_is_folded_first(runs, tmp_path, hf_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = (
        f"data=text data.path={runs}/text.jsonl train.steps=2 train.seq_len=32 "
        "train.batch_tokens=64 data.val_tokens=500"
    )
    assert (
        main(
            [
                "adapt-dex",
                f"base={hf_folder}",
                "run.dir=run",
                "wandb.mode=disabled",
                "device=cpu",
                *keys.split(),
            ]
        )
        == 0
    )
    found = quantize(compose("quantize", words("run", "bits=[8]", "suite.texts=3")))
    few = AutoModelForCausalLM.from_pretrained(stored(found, 8), dtype=torch.float32)
    assert type(few).__name__ == "LlamaForCausalLM"
    assert loss(found[8]) == pytest.approx(loss(found[16]), abs=0.05)


@pytest.mark.slow
def test_what_is_there_is_not_made_again(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(runs / "transformer-0", "run")
    job = compose("quantize", words("run", "bits=[8]"))
    found = quantize(job)
    file = stored(found, 8) / "model.safetensors"
    made = file.stat().st_mtime_ns
    assert quantize(job) == found
    assert file.stat().st_mtime_ns == made
    shutil.rmtree(found[8])
    assert quantize(job) == found and file.stat().st_mtime_ns == made
    quantize(compose("quantize", words("run", "bits=[8]", "force=true")))
    assert file.stat().st_mtime_ns != made
    assert [path.name for path in file.parents[1].iterdir()] == [
        file.parent.name
    ]  # nothing of the making is left


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8_dynamic", "float8"])
def test_the_other_8_bit_forms(runs, scheme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(runs / "transformer-0", "run")
    found = quantize(compose("quantize", words("run", "bits=[8]", f"method.scheme={scheme}")))
    assert 0 < abs(loss(found[8]) - loss(found[16])) < 0.05


@pytest.mark.slow
def test_a_sweep_tells_sizes(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind in ("transformer", "diff_v1"):
        copy(runs / f"{kind}-0", kind)
    assert (
        main(
            [
                "quantize",
                "-m",
                *words("transformer,diff_v1", "bits=[8,4]", GROUP),
                "hydra.sweep.dir=sweep",
            ]
        )
        == 0
    )
    assert " MB" in capsys.readouterr().out
    report = json.loads(Path("sweep/long_context-weights.json").read_text())
    for model in report["models"]:
        sizes = [figures["bytes"] for figures in model["by_bits"].values()]
        assert sizes[0] > sizes[1] > 0


@pytest.mark.slow
def test_speed_can_be_measured(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    copy(runs / "transformer-0", "run")
    speed = (
        "suite=speed suite.lengths=[16] suite.batches=[1] suite.rounds=2 suite.decode_tokens=4 "
        "suite.train=false"
    )
    assert (
        main(
            [
                "quantize",
                "checkpoint=run",
                "method=weights",
                "bits=[8]",
                "wandb.mode=disabled",
                "device=cpu",
                *speed.split(),
            ]
        )
        == 0
    )
    assert "Change for the worse at 8 bits" in capsys.readouterr().out


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=tokenizer.vocab_size, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("bits=[8] method.skip=[k_proj,nothing]", ["method.skip=nothing", "q_proj", "down_proj"]),
        (
            "bits=[8] method.skip=[proj]",
            ["method.skip=proj", "q_proj"],
        ),  # a part of a name is a whole one
        ("bits=[8] method.skip=[self_attn,mlp]", ["no linear layer to quantize"]),
        ("bits=[8,4] method.group_size=64", ["method.group_size=64", "divisor of 32"]),
        ("bits=[8] method.group_size=24", ["method.group_size=24", "divisor of 32"]),
        ("bits=[8] method.scheme=float8_dynamic", ["float8_dynamic", "cpu", "8.9"]),
        ("bits=[12]", ["bits=12", "2, 3, 4, 5, 6, 7, 8, 16"]),
        ("bits=[8,4] method.scheme=int8_dynamic", ["bits=4", "8, 16"]),
        (
            "bits=[8] method.scheme=int8_dynamic method.group_size=16",
            ["method.group_size", "weight_only"],
        ),
        ("bits=[8] method.group_size=0", ["method.group_size=0", "1 or more"]),
        ("bits=[8] method.scheme=int5", ["method.scheme", "int5", "weight_only"]),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    runs, more, parts, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    copy(runs / "transformer-0", "run")
    assert main(["quantize", *words("run", *more.split())]) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and all(part in said.err for part in parts), (
        said.err
    )
    assert not Path("run/evals").exists() and not Path("run/quantized").exists()


@pytest.mark.slow
def test_models_that_cannot_be_quantized_are_refused(runs, gpt2, hf_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layer"):
        quantize(compose("quantize", words(gpt2, "bits=[8]")))
    few = stored(quantize(compose("quantize", words(hf_folder, "bits=[8]"))), 8)
    with pytest.raises(UserError, match="its weights are quantized"):
        quantize(compose("quantize", words(few, "bits=[8]")))
    monkeypatch.setattr(weights, "is_torchao_available", lambda: False)
    with pytest.raises(UserError, match=r"needs torchao .*diffx\[torchao\]"):
        quantize(compose("quantize", words(hf_folder, "bits=[8]")))


@pytest.mark.slow
def test_a_quantized_model_without_torchao_is_one_line(hf_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = stored(quantize(compose("quantize", words(hf_folder, "bits=[8]"))), 8)
    script = (
        "import sys; sys.modules['torchao'] = None; from diffx.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        script,
        "eval",
        f"checkpoint={few}",
        "suite=long_context",
        "wandb.mode=disabled",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 2
        and len(done.stderr.strip().splitlines()) == 1
        and "torchao" in done.stderr
    ), done.stderr
