"""diffx as a library: the README's own lines, and what they give against what others compute."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import diffx
from diffx.cli import main

TINY = (
    "size=pico tokenizer=bytes train.seq_len=32 train.batch_tokens=64 train.sample_tokens=0 "
    "data.val_tokens=500 wandb.mode=disabled"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    (folder / "text.jsonl").write_text(
        "".join(f'{{"text": "Note {n}. The square is {n * n}."}}\n' for n in range(100))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFX_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def words(folder):
    return [*TINY.split(), "data=text", "data.path=text.jsonl", "device=cpu", "train.steps=2"]


KEYS = (
    "data=text data.path=text.jsonl train.steps=2 train.seq_len=16 train.batch_tokens=32 "
    "data.val_tokens=200"
)


@pytest.fixture(scope="module")
def adapt(folder, hf_folder):
    """Adapt a base into a run folder."""

    def adapt(run, base):
        assert (
            main(
                [
                    "adapt-dex",
                    f"base={base}",
                    f"run.dir={run}",
                    "wandb.mode=disabled",
                    "device=cpu",
                    *KEYS.split(),
                ]
            )
            == 0
        )

    return adapt


def test_the_lines_of_the_readme(words, adapt, hf_folder, monkeypatch, capsys):
    shutil.copytree(hf_folder, "models/smollm2")
    adapt("runs/y", "models/smollm2")
    shutil.copytree("runs/y", "runs/z")
    (code,) = re.findall(
        r"```python\n(import torch, diffx.*?)```",
        (Path(__file__).parents[1] / "README.md").read_text(),
        re.DOTALL,
    )
    train = diffx.train_run
    monkeypatch.setattr(diffx, "train_run", lambda *own: train(*own, *words))
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    length = found["ids"].shape[1]
    heads = found["model"].model.config.num_heads // 2
    assert {tuple(maps.shape) for maps in found["maps"]} == {(1, heads, length, length)}
    for maps, lam in zip(found["maps"], found["lambdas"], strict=True):
        torch.testing.assert_close(maps.sum(-1), (1 - lam).expand(maps.shape[:3]))
    assert capsys.readouterr().out.strip()
    assert (
        found["adapters"].names == ["default", "z"]
        and found["adapters"].active == "z"
        and not found["adapters"].folded
    )


def test_a_model_of_the_hub(hf_folder):
    model, ids = diffx.load(str(hf_folder), device="cpu"), torch.tensor([[5, 6, 7, 8]])
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder, attn_implementation="eager")
    for ours, expected in zip(
        model.attention_maps(ids), theirs(ids, output_attentions=True).attentions, strict=True
    ):
        torch.testing.assert_close(ours, expected)
    assert model.lambdas(ids) == [None, None]


def test_an_adapted_model(adapt, hf_folder):
    adapt("adapted", hf_folder)
    model = diffx.load("adapted", device="cpu")
    assert [lam.numel() for lam in model.lambdas(torch.tensor([[5, 6]]))] == [1, 1]
