"""What ``checkpoint=`` means."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffx.config import UserError
from diffx.config.eval import Dtype
from diffx.config.train import Device
from diffx.dex import pretrained
from diffx.loading import load


def test_a_folder_as_the_hubs(hf_folder):
    loaded = load(str(hf_folder), Device.cpu)
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(hf_folder)("Hello there")["input_ids"]])
    assert loaded.tokenizer.encode("Hello there") == ids[0].tolist()
    torch.testing.assert_close(loaded.model(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    assert (loaded.name, loaded.step, loaded.context, loaded.limit, loaded.job) == (
        "tiny-llama",
        0,
        256,
        256,
        None,
    )
    assert loaded.prefix == [] and loaded.ends == {loaded.tokenizer.eot_id}
    assert loaded.folder.as_posix() == f"runs/hub/tiny-llama@{loaded.fingerprint[:12]}"
    assert load(str(hf_folder), Device.cpu, Dtype.bf16).model.dtype is torch.bfloat16


def test_the_fingerprint_is_of_the_weights(hf_folder, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(hf_folder)
    copy = tmp_path / "tiny-llama"
    for path in hf_folder.iterdir():
        copy.mkdir(exist_ok=True)
        (copy / path.name).write_bytes(path.read_bytes())
    assert load(str(copy), Device.cpu).fingerprint == load(str(hf_folder), Device.cpu).fingerprint
    with torch.no_grad():
        theirs.lm_head.weight[0, 0] += 1
    theirs.save_pretrained(copy)
    assert load(str(copy), Device.cpu).fingerprint != load(str(hf_folder), Device.cpu).fingerprint


def test_weights_in_a_pickle_are_refused(hf_folder, tmp_path):
    for path in hf_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = AutoModelForCausalLM.from_pretrained(hf_folder).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load(str(tmp_path), Device.cpu)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("runs/no-such-run", "there is no folder runs/no-such-run"),
        ("runs/no-such-run@best", "there is no folder runs/no-such-run"),
        ("no-such-model", "accepted: a run"),
        ("nobody/no-such-model", "accepted: a run"),
    ],
)
def test_what_is_not_there(spec, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load(spec, Device.cpu)
    assert "\n" not in str(caught.value)


def test_what_is_in_the_hubs_cache_needs_no_network(hf_folder, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    own = tmp_path / "models--someone--tiny"
    shutil.copytree(hf_folder, own / "snapshots" / commit)
    (own / "refs").mkdir()
    (own / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for revision in (None, commit):
        assert load("someone/tiny", Device.cpu, revision=revision).name == "someone/tiny"
    with pytest.raises(UserError, match="there is no folder someone/other here"):
        load("someone/other", Device.cpu)


@pytest.mark.parametrize("proxies", [{}, {"https": "http://localhost:1"}])
def test_a_name_that_may_be_reached_is_asked_for(monkeypatch, proxies):
    def asked(*args, **options):
        raise OSError("asked " + "word " * 100)

    def resolve(host, port):
        assert host == "huggingface.co" and not proxies

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr("diffx.data.hub.getproxies", lambda: proxies)
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr(pretrained.AutoConfig, "from_pretrained", asked)
    with pytest.raises(UserError, match=r"loaded: asked (word )+…; accepted"):
        load("someone/model", Device.cpu)


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder"):
        load(str(tmp_path), Device.cpu)


@pytest.mark.slow
def test_a_model_of_the_hub_is_known_by_its_commit(hf_folder, tmp_path):
    """From the hub's cache, in its layout, in a new process that reads the variable."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(hf_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    script = (
        "from diffx.loading import load; found = load('org/tiny'); "
        "print(found.fingerprint, found.folder)"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [commit, f"runs/hub/org--tiny@{commit[:12]}"], done.stderr
