"""A folder that somebody else made runs no code, reads no secret and leads to no other place."""

import json
import os
import shutil

import pytest
import yaml

from diffx.cli import main
from diffx.config import UserError
from diffx.data.shards import Shards
from diffx.data.tokenizers import load_tokenizer
from diffx.files import json_checksum
from diffx.loading import load

TINY = [
    "train.steps=2",
    "train.seq_len=16",
    "train.batch_tokens=32",
    "wandb.mode=disabled",
    "device=cpu",
    "data.val_tokens=500",
]
SECRET = "sk-of-a-test-0123456789"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).write_text("run")

class Config(LlamaConfig):
    model_type = "of_its_own"

class Model(LlamaForCausalLM):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, hf_folder):
    """A folder with text, a trained run, an adapted run and its base."""
    folder, before = tmp_path_factory.mktemp("place"), os.getcwd()
    rows = [
        {"text": f"Document {n} says that {n} times {n} is {n * n}, no more. " * 3}
        for n in range(120)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(hf_folder, folder / "base")
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFX_CACHE", str(folder / "cache"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    os.chdir(folder)
    try:
        text = ["data=text", "data.path=text.jsonl", *TINY]
        assert main(["adapt-dex", "base=base", "run.dir=adapted", *text]) == 0
        shape = [
            "model.hidden_size=32",
            "model.num_layers=1",
            "model.num_heads=4",
            "model.num_kv_heads=2",
            "train.sample_tokens=0",
        ]
        assert main(["train", "tokenizer=bytes", "run.dir=trained", *shape, *text]) == 0
        yield folder
    finally:
        os.chdir(before)
        patch.undo()


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of the place, and the file that the code of the base would write."""
    folder = tmp_path / "here"
    shutil.copytree(place, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail("it asks"))
    return folder, tmp_path / "marker"


def change(path, **values):
    """Set keys of a JSON or YAML file."""
    content = (
        json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    )
    content |= values
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))


def with_code(base, marker):
    (base / "code.py").write_text(CODE.format(marker=str(marker)))
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change(base / "config.json", model_type="of_its_own", architectures=["Model"], auto_map=names)


COMMANDS = {
    "generate": ["generate", "checkpoint=adapted", "prompt=Document", "max_tokens=3", "device=cpu"],
    "eval": [
        "eval",
        "checkpoint=adapted",
        "suite=long_context",
        "suite.texts=1",
        "suite.length=16",
        "device=cpu",
        "wandb.mode=disabled",
    ],
    "quantize": [
        "quantize",
        "checkpoint=adapted",
        "suite=long_context",
        "suite.texts=1",
        "suite.length=16",
        "device=cpu",
        "bits=[8]",
    ],
    "export": ["export", "checkpoint=adapted", "out=out"],
    "resume": ["adapt-dex", "base=base", "train.resume=adapted", "train.steps=3", "device=cpu"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_code_of_a_base_is_not_run_because_a_folder_says_so(here, capfd, command):
    folder, marker = here
    with_code(folder / "base", marker)
    change(folder / "adapted" / "config.yaml", trust_remote_code=True)
    capfd.readouterr()
    code = main(COMMANDS[command])
    (line,) = capfd.readouterr().err.splitlines()
    assert code == 2 and "base=base cannot be used" in line and "add trust_remote_code=true" in line
    assert not marker.exists() and not (folder / "out").exists()


@pytest.mark.parametrize("command", ["generate", "resume"])
def test_the_code_of_a_base_is_run_where_the_command_line_says_so(here, command):
    folder, marker = here
    with_code(folder / "base", marker)
    assert main([*COMMANDS[command], "trust_remote_code=true"]) == 0
    assert marker.exists()


def test_the_base_must_be_the_one_that_was_adapted(here, capfd):
    folder, _ = here
    change(folder / "adapted" / "base.json", fingerprint="0" * 64)
    assert main(COMMANDS["generate"]) == 2
    assert "adapted from other weights" in capfd.readouterr().err


def test_an_exported_folder_and_a_tokenizer_run_no_code(here):
    folder, marker = here
    tokenizer = folder / "base" / "tokenizer_config.json"
    for name in ("Tokenizer", "PreTrainedTokenizerFast"):
        (folder / "base" / "code.py").write_text(CODE.format(marker=str(marker)))
        change(
            tokenizer,
            tokenizer_class=name,
            auto_map={"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
        )
        for read in (load_tokenizer, lambda path: load(str(path))):
            try:
                read(folder / "base")
            except UserError as error:
                assert "\n" not in str(error)
    with_code(folder / "base", marker)
    with pytest.raises(UserError, match="add trust_remote_code=true"):
        load(str(folder / "base"))
    assert not marker.exists()


@pytest.mark.parametrize("run", ["trained", "adapted"])
@pytest.mark.parametrize(
    ("group", "key"),
    [("wandb", "project"), ("train", "sample_prompt"), ("run", "name"), ("data", "text_key")],
)
def test_a_saved_interpolation_is_not_resolved(here, capfd, monkeypatch, run, group, key):
    folder, _ = here
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    path = folder / run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[group][key] = "${oc.env:WANDB_API_KEY}"
    path.write_text(yaml.safe_dump(config))
    before = path.read_text()
    capfd.readouterr()
    words = ["adapt-dex", "base=base"] if run == "adapted" else ["train"]
    for command in (
        [*words, f"train.resume={run}", "train.steps=3"],
        ["generate", f"checkpoint={run}"],
    ):
        assert main(command) == 2
        out = capfd.readouterr()
        assert (
            f"{group}.{key}=${{oc.env:WANDB_API_KEY}} has an interpolation" in out.err
            and len(out.err.splitlines()) == 1
        )
    assert path.read_text() == before
    assert not any(
        SECRET.encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file()
    )


@pytest.mark.slow
def test_a_prompt_that_looks_like_an_interpolation_is_text_in_every_file(here, monkeypatch):
    folder, _ = here
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    prompt = "key ${oc.env:WANDB_API_KEY} \\${x} ${"
    shape = [
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "train.sample_tokens=2",
    ]
    words = [
        "data=text",
        "data.path=text.jsonl",
        "tokenizer=bytes",
        *shape,
        *TINY,
        f"train.sample_prompt={prompt}",
        "wandb.mode=offline",
    ]
    assert main(["train", "run.dir=new", *words]) == 0
    assert main(["train", "train.resume=new", "train.steps=3"]) == 0
    assert load("new").job.train.sample_prompt == prompt
    assert main(["export", "checkpoint=new", "out=out"]) == 0
    assert not any(
        SECRET.encode() in file.read_bytes() for file in folder.rglob("*") if file.is_file()
    )


def test_an_interpolation_of_an_exported_folder_is_not_resolved(here, monkeypatch):
    folder, _ = here
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert main(["export", "checkpoint=trained", "out=out"]) == 0
    origin = json.loads((folder / "out" / "diffx.json").read_text())
    assert load("out").data.path == ["text.jsonl"]
    origin["data"]["path"] = ["${oc.env:WANDB_API_KEY}"]
    (folder / "out" / "diffx.json").write_text(json.dumps(origin))
    with pytest.raises(UserError, match=r"diffx\.json cannot be used"):
        load("out")


def test_shards_map_numbers_of_their_own_folder_alone(here):
    folder, _ = here
    assert (
        main(
            [
                "data",
                "prepare",
                "data=text",
                "data.path=text.jsonl",
                "tokenizer=bytes",
                "out=shards",
                "workers=1",
            ]
        )
        == 0
    )
    (folder / "secret.bin").write_bytes(b"abcd")
    path = folder / "shards" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["checksum"]  # whoever alters the file can do that, or compute it anew
    there = {"bytes": 4, "sha256": ""}
    for changed, message in (
        ({"dtype": "O"}, "dtype"),
        ({"dtype": "V8"}, "dtype"),
        ({"files": meta["files"] | {"../secret.bin": there}}, "no name of a file"),
        ({"files": meta["files"] | {str(folder / "secret.bin"): there}}, "no name of a file"),
    ):
        changed = meta | changed
        path.write_text(
            json.dumps(changed | {"checksum": json_checksum(changed)})
        )  # which anyone can compute
        with pytest.raises(UserError, match=message):
            Shards(folder / "shards")
    path.write_text(json.dumps(meta))
    assert Shards(folder / "shards").meta == meta


@pytest.mark.parametrize("word", ["suite.name=../../x", "suite.name=/tmp/x"])
def test_results_stay_in_the_folder_of_the_run(here, capfd, word):
    folder, _ = here
    before = sorted(folder.rglob("*"))
    assert main([*COMMANDS["eval"], word]) == 2
    assert word in capfd.readouterr().err and sorted(folder.rglob("*")) == before


def test_a_revision_is_one_part_of_a_path(here):
    folder, _ = here
    assert load(str(folder / "base"), revision="/../../../x").folder.parent.as_posix() == "runs/hub"
