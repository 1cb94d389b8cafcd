"""The README: short, and every command in it is one that diffx takes."""

import re
import shlex
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
def test_a_command_can_be_used(command, capsys):
    _, name, *words = shlex.split(command)
    if name == "experiment":
        words = [f"name={words[1]}", *words[2:]] if words[1:] else ["name=recall"]
        name = "claim"
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
