"""The README: short, and every command in it is one that diffx takes."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from diffx.cli import main
from diffx.config.launch import compose, launch

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "experiments").rglob("*.md"))]
NAMES = {"adapt-dex": "adapt", "data prepare": "prepare"}


def commands(text):
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("diffx "):
                yield line.partition("  #")[0].strip()


COMMANDS = sorted(
    {command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))}
)


def test_it_is_short():
    assert len(README.splitlines()) <= 150 and len(COMMANDS) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_used(command, capsys, monkeypatch):
    _, name, *words = shlex.split(command)
    if name == "experiment":
        monkeypatch.chdir(REPOSITORY)
        harmless = words == ["list"] or "--dry-run" in words or words[0] == "report"
        assert harmless and (words == ["list"] or main([name, *words]) == 0)
        return
    if name == "data":
        name, words = f"{name} {words[0]}", words[1:]
    if {"--cfg", "--doc"} & set(words) or name in ("params", "compare"):
        assert name == "compare" or main([name, *words]) == 0
        return
    several = "-m" in words
    words = [word for word in words if word != "-m"]
    for word in words:
        assert several or "," not in word or "[" in word, "a sweep needs -m"
    name = NAMES.get(name, name)
    if not several and any(word.startswith("suite=[") for word in words):
        assert launch(name, lambda jobs, _: len({job.suite.name for job in jobs}), words) > 1
        return
    job = compose(
        name, [word if "[" in word or not several else word.partition(",")[0] for word in words]
    )
    assert job.kind == name


TINY = [
    "tokenizer=bytes",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "train.steps=2",
    "train.seq_len=512",
    "train.batch_tokens=512",
    "train.sample_tokens=8",
    "wandb.mode=disabled",
    "data.val_tokens=2000",
]
SMALL = {  # words that make a command small enough for a test
    "train": TINY,
    "adapt-dex": [
        *("data=text", "data.path=books/", "train.steps=2", "train.seq_len=64"),
        *("train.batch_tokens=128", "wandb.mode=disabled", "data.val_tokens=2000"),
    ],
    "generate": ["max_tokens=4"],
    "eval": ["limit=1", "wandb.mode=disabled"],
    "quantize": ["suite.texts=2", "suite.length=64", "wandb.mode=disabled"],
}
BIG = ("size=", "device=", "train.tokens=", "train.seq_len=", "train.batch_tokens=", "max_tokens=")
NETWORK = ("data=hub", "suite=paper_lm")


def small(words):
    """The same command on tiny models."""
    name, *rest = words
    if name not in SMALL or {"--cfg", "--doc"} & set(rest):
        return words
    if any(word.startswith("train.resume=runs") for word in rest):
        return [name, *(word.replace("9000", "3") for word in rest)]
    extra = [word for word in SMALL[name] if word not in rest]
    rest = [word.replace("Qwen/Qwen2.5-0.5B", "models/smollm2") for word in rest]
    return [name, *(word for word in rest if not word.startswith(BIG)), *extra]


@pytest.mark.slow
def test_every_command_runs_at_small_size(tmp_path, monkeypatch, hf_folder, capsys):
    """In the README's order, in one folder; what needs the network is left out."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hf_folder, "models/smollm2")
    Path("books").mkdir()
    for number in range(40):
        text = f"Chapter {number}. " + "The sea was calm and the ship was slow. " * (number + 30)
        Path(f"books/{number}.txt").write_text(text)
    for name in "xyab":
        assert main(["train", f"run.dir=runs/{name}", f"seed={ord(name)}", *TINY]) == 0
    for name in "ab":
        assert main(["eval", f"checkpoint=runs/{name}", "suite=outliers", "limit=1"]) == 0
    done = 0
    for command in commands(README):
        _, *words = shlex.split(command)
        if any(word in NETWORK for word in words) or words[0] == "experiment":
            continue
        if words == ["train", "run.dir=runs/x", "train.resume=auto"]:
            words = [*words, f"seed={ord('x')}"]
        assert main(small(words)) == 0, (command, capsys.readouterr().err)
        done += 1
    assert done >= 18
    assert Path("compare.png").exists() and Path("models/x/model.safetensors").exists()
