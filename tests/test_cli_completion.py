"""Completion through the shell script's variable; Bash passes ``a=b`` as three words."""

import os
import subprocess
import sys

import pytest

from diffx.config.completion import complete


def bash(*words):
    """The completions of the last word."""
    env = os.environ | {
        "COMP_WORDS": " ".join(["diffx", *words]),
        "COMP_CWORD": str(len(words)),
        "_DIFFX_COMPLETE": "complete_bash",
    }
    done = subprocess.run(
        [sys.executable, "-m", "diffx"], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands():
    assert bash("tr") == ["train"]
    assert bash("bench", "t") == ["train"]


def test_bash_completes_groups():
    assert bash("train", "-m", "model", "=", "diff_v") == ["diff_v1", "diff_v2"]
    assert "scaling_nano" in " ".join(bash("train", "experiment="))


@pytest.mark.parametrize(
    ("before", "incomplete", "expected"),
    [
        ([], "model=diff", ["model=diff_gda", "model=diff_v1", "model=diff_v2"]),
        (["model"], "diff_v", ["diff_v1", "diff_v2"]),  # bash, after "model="
        (["model", "=", "transformer", "data", "="], "te", ["text"]),
        ([], "model=diff_v1,diff_v", ["model=diff_v1,diff_v1", "model=diff_v1,diff_v2"]),
        ([], "tokeniz", ["tokenizer=", "tokenizer.vocab_size="]),
        (
            [],
            "train.sched",
            [f"train.schedule={name}" for name in ("linear", "cosine", "wsd", "constant")],
        ),
        ([], "train.compile=", ["train.compile=true", "train.compile=false"]),
        ([], "train.lr", ["train.lr=", "train.lr=0.005"]),
        ([], "model.lambda_i", ["model.lambda_init=", "model.lambda_init=depth"]),
        (["model=transformer"], "model.lambda_i", []),
        (["data=text"], "data.pa", ["data.path="]),
        (["model=nonsense"], "train.lr=", ["train.lr=", "train.lr=0.005"]),
        ([], "nonsense", []),
        ([], "nonsense.a=", []),
    ],
)
def test_words(before, incomplete, expected):
    assert complete("train", before, incomplete) == expected


def test_each_command_has_its_own_keys():
    assert complete("generate", [], "check") == ["checkpoint="]
    assert complete("generate", [], "mod") == []
    assert complete("prepare", [], "o") == ["out="]


def test_a_users_own_configs_are_offered(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults:\n  - diff_v2\n")
    assert complete("train", [], "model=mi", tmp_path) == ["model=mine"]
    assert complete("train", [], "model=mi", tmp_path / "nowhere") == []
