"""Adapters of runs: loaded on their base, switched, folded, saved and pushed."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import diffx.dex.adapters
from diffx.cli import main
from diffx.config import UserError
from diffx.config.eval import Dtype
from diffx.config.train import Device
from diffx.dex import load_adapter
from diffx.export import to_transformers
from diffx.loading import load, load_run

KEYS = (
    "data=text data.val_tokens=1000 train.steps=4 train.seq_len=32 train.batch_tokens=64 "
    "train.lr=1e-2 wandb.mode=disabled device=cpu dex.anneal_steps=8 dex.init=linear "
    "dex.calibration_tokens=128 dex.lora_rank=2"
)
SELDOM = ("dex_plus", "adapter_only", "attn_only", "full")
VARIANTS = [
    "dex",
    "lora",
    "fused",
    *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 70, 71]])


@pytest.fixture(scope="module")
def place(tmp_path_factory, hf_folder, tokenizer):
    folder = tmp_path_factory.mktemp("adapters")
    rows = ({"text": f"Document {n} says that {n} times {n} is {n * n}. " * 2} for n in range(120))
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eot_id}
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    config = GPT2Config(**shape, **ends, vocab_size=tokenizer.vocab_size)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save(folder / "gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFX_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def base_of(place, hf_folder):
    return lambda variant: place / "gpt2" if variant == "fused" else hf_folder


@pytest.fixture(scope="module")
def run(place, base_of):
    """The run of a variant; each is made once."""

    def run(variant="dex"):
        folder = place / "runs" / variant
        if not folder.exists():
            name = "dex" if variant == "fused" else variant
            words = [f"base={base_of(variant)}", f"dex.variant={name}", f"run.dir={folder}"]
            assert main(["adapt-dex", *words, *KEYS.split(), "data.path=text.jsonl"]) == 0
        return folder

    return run


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal_states(model, expected):
    got = model.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype is value.dtype and torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_is_its_run_and_is_undone_exactly(variant, dtype, run, base_of):
    run(variant)
    base = base_model(base_of(variant), dtype)
    before, trains = state(base), [parameter.requires_grad for parameter in base.parameters()]
    random = torch.get_rng_state()
    adapters = load_adapter(base, run(variant) / "adapter")
    assert torch.equal(torch.get_rng_state(), random)
    known = Dtype.fp32 if dtype is torch.float32 else Dtype.bf16
    expected = logits(load(str(run(variant)), Device.cpu, known).model)
    close = {"rtol": 1e-5, "atol": 1e-5} if variant == "lora" else {"rtol": 0, "atol": 0}
    if variant != "lora" or dtype is torch.float32:  # LoRA is merged, which bf16 rounds
        torch.testing.assert_close(logits(adapters.model), expected, **close)
    assert not torch.equal(logits(adapters.model), logits(base_model(base_of(variant), dtype)))
    active = state(adapters.model)
    adapters.fold()
    assert adapters.folded and not any(name.endswith("w_d") for name in adapters.model.state_dict())
    if dtype is torch.float32:
        torch.testing.assert_close(logits(adapters.model), expected, rtol=1e-4, atol=1e-4)
        exported, _ = to_transformers(load_run(str(run(variant)), Device.cpu))
        torch.testing.assert_close(logits(adapters.model), logits(exported), rtol=1e-6, atol=1e-6)
    with adapters.disabled() as plain:
        assert_equal_states(plain, before)
    assert adapters.folded
    adapters.unfold()
    assert_equal_states(adapters.model, active)
    adapters.activate(None)
    assert_equal_states(adapters.model, before)
    assert [parameter.requires_grad for parameter in base.parameters()] == trains
    assert (adapters.active, adapters.folded) == (None, False)


def base_model(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_several_adapters_on_one_base(run, hf_folder):
    adapters = load_adapter(str(hf_folder), run("dex") / "adapter", "a")
    first = state(adapters.model)
    load_adapter(adapters, run("lora") / "adapter", "b")
    adapters.load(run("dex") / "adapter", "c")
    assert adapters.names == ["a", "b", "c"] and adapters.active == "c"
    for name, variant in (("b", "lora"), ("c", "dex"), ("b", "lora"), ("a", "dex")):
        adapters.activate(name)
        expected = logits(load(str(run(variant)), Device.cpu).model)
        torch.testing.assert_close(logits(adapters.model), expected, rtol=1e-5, atol=1e-5)
    assert_equal_states(adapters.model, first)
    adapters.fold()
    adapters.activate("b")  # from a folded one to another
    adapters.activate(None)
    assert_equal_states(adapters.model, base_model(hf_folder).state_dict())


def test_a_model_that_was_cast_after_loading(run, hf_folder):
    adapters = load_adapter(base_model(hf_folder), run("dex") / "adapter")
    adapters.model.to(torch.bfloat16)
    adapters.activate(None)
    assert_equal_states(adapters.model, base_model(hf_folder, torch.bfloat16).state_dict())


# The hub and the card.


class Hub:
    """Stands for HfApi: keeps what is pushed."""

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        return type("Repository", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns):
        paths = [path for path in folder_path.iterdir() if path.name in allow_patterns]
        Hub.pushed = {path.name: path.read_bytes() for path in paths}
        Hub.call = (repo_id, self.token, commit_message)
        return type("Commit", (), {"commit_url": f"https://hub/{repo_id}"})


def test_push_to_hub(run, hf_folder, place, tmp_path, monkeypatch):
    monkeypatch.setattr(diffx.dex.adapters, "HfApi", Hub)
    source = tmp_path / "adapter"
    shutil.copytree(run("dex") / "adapter", source)
    (source / "notes.txt").write_text("not of the adapter")
    adapters = load_adapter(base_model(hf_folder), source)
    url = adapters.push_to_hub("x", token="hf_secret", commit_message="one")
    assert url == "https://hub/me/x" and Hub.call == ("me/x", "hf_secret", "one")
    assert Hub.pushed.keys() == {
        "adapter.json",
        "branch.safetensors",
        "tuned.safetensors",
        "README.md",
    }
    for name in ("adapter.json", "README.md"):
        text = Hub.pushed[name].decode()
        assert str(place) not in text and str(hf_folder) not in text and "hf_secret" not in text
    card = ModelCard(Hub.pushed["README.md"].decode())
    assert card.data.base_model == "tiny-llama" and card.data.library_name == "diffx"
    adapters.save(tmp_path / "again")
    again = load_adapter(base_model(hf_folder), tmp_path / "again")
    assert torch.equal(logits(again.model), logits(adapters.model))
    assert {path.name for path in (tmp_path / "again").iterdir()} == Hub.pushed.keys()
    with pytest.raises(UserError, match="folder="):
        adapters.save(tmp_path / "again")
    with pytest.raises(UserError, match="name=b"):
        adapters.save(tmp_path / "bare", "b")


# What is refused.


def damaged(source, target, change):
    shutil.copytree(source, target)
    path = target / "adapter.json"
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return target


def test_refusals(run, hf_folder, place, tmp_path):
    source, base = run("dex") / "adapter", base_model(hf_folder)
    before = state(base)
    with pytest.raises(UserError, match="other weights"):
        load_adapter(base_model(place / "gpt2"), source)
    with pytest.raises(UserError, match="dtype= cannot be used with a model that is loaded"):
        load_adapter(base, source, dtype="bfloat16")
    with pytest.raises(UserError, match=r"adapter\.json"):
        load_adapter(base, run("dex"))
    with pytest.raises(UserError, match="folder=me/adapter"):
        load_adapter(base, "me/adapter")
    heads = damaged(source, tmp_path / "heads", lambda found: found["heads"][0].append(9))
    with pytest.raises(UserError, match="heads"):
        load_adapter(base, heads)
    other = damaged(source, tmp_path / "variant", lambda found: found["dex"].update(variant="dexx"))
    with pytest.raises(UserError, match="variant"):
        load_adapter(base, other)
    lacking = damaged(source, tmp_path / "lacking", lambda found: None)
    tensors = load_file(lacking / "tuned.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, lacking / "tuned.safetensors")
    with pytest.raises(UserError, match="it lacks"):
        load_adapter(base, lacking)
    assert_equal_states(base, before)
    adapters = load_adapter(base, source)
    for call in (
        lambda: adapters.load(source),
        lambda: adapters.load(lacking, "b"),
        lambda: adapters.activate("b"),
        lambda: load_adapter(base, source),
    ):
        with pytest.raises(UserError):
            call()
        assert adapters.active == "default" and adapters.names == ["default"]
    adapters.activate(None)
    with pytest.raises(UserError, match="no adapter is active"):
        adapters.fold()
