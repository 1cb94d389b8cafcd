"""What the door says of itself, and how fast; usage errors are one line."""

import json
import os
import resource
import shlex
import subprocess
import sys

import pytest

from diffx import __version__
from diffx.cli import main

COMMANDS = [
    "train",
    "generate",
    "params",
    "compare",
    "data prepare",
    "bench train",
    "bench adapt",
    "bench quantize",
    "bench attention",
    "bench profile",
]


def run(*words, code="from diffx.cli import main; sys.exit(main())"):
    """Run diffx in a new process; return it with its imported modules and processor time."""
    report = (
        "import atexit, sys, json; "
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr)); "
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", report + code, *words], capture_output=True, text=True, timeout=120
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    done.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    done.modules = {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}
    return done


def fastest(*words):
    # The second run finds compiled modules and a warm file cache; processor time, unlike wall time,
    # does not count what other processes do.
    return min((run(*words) for _ in range(2)), key=lambda done: done.seconds)


def test_help_is_instant():
    done = fastest("--help")
    assert done.returncode == 0 and "Examples:" in done.stdout
    assert not {"torch", "hydra", "omegaconf", "rich"} & done.modules
    assert done.seconds < 0.4


def test_printing_a_config_needs_no_torch():
    done = fastest("train", "--cfg", "job", "experiment=diff/architectures")
    assert done.returncode == 0 and done.stdout.startswith("kind: train\nmodel:\n")
    assert not {"torch", "transformers", "numpy", "wandb"} & done.modules
    assert done.seconds < 2


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_shows_three_real_examples(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    lines = [
        line.strip() for line in capsys.readouterr().out.partition("Examples:")[2].splitlines()
    ]
    examples = [
        shlex.split(line.rpartition("| ")[2]) for line in lines if f"diffx {command}" in line
    ]
    assert len(examples) >= 3
    if command not in (
        "compare",
        "bench train",
        "bench adapt",
        "bench quantize",
        "bench attention",
        "bench profile",
    ):  # the others' words compose
        for _, *words in examples:
            sweep = ("-m", "sweep.resume=runs/SWEEP")
            one_job = [word.partition(",")[0] for word in words if word not in sweep]
            assert main([*one_job, "--cfg", "job"]) == 0


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffx {__version__}\n"


@pytest.mark.parametrize("words", [[], ["data"], ["bench"]])
def test_a_group_alone_shows_its_help(words, capsys):
    assert main(words) == 0
    assert "Commands:" in capsys.readouterr().out


def test_the_module_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "diffx", "--version"],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, f"diffx {__version__}\n")
