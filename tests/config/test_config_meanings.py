"""``--doc`` and the comments of ``--cfg job``: each key of each command has its meaning."""

from dataclasses import fields, is_dataclass

import pytest
import yaml

from diffx.cli import main
from diffx.config.bridge import GROUPS, JOBS, to_plain
from diffx.config.launch import compose
from diffx.config.meanings import meanings


@pytest.mark.parametrize(
    "kind", [*JOBS.values(), *(kind for kinds in GROUPS.values() for kind in kinds.values())]
)
def test_every_key_has_a_meaning(kind):
    keys = {field.name for field in fields(kind) if not is_dataclass(field.type)}
    assert keys - {"kind"} <= meanings(kind).keys()


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("train.lr", ["train.lr=0.005", "peak learning rate of AdamW."]),
        (
            "train.schedule",
            ["train.schedule=linear", "`wsd` (constant", "one of: linear, cosine, wsd, constant"],
        ),
        ("model.halve", ["model.halve=head_count", "one of: head_count, head_dim"]),
        ("seed", ["seed=0", "of the initial weights"]),
        ("train.compile", ["train.compile=false", "`torch.compile` each block."]),
        ("wandb", ["wandb.mode=", "wandb.project=diffx", "one of: "]),
    ],
)
def test_a_key_or_a_group(key, said, capsys):
    assert main(["train", "--doc", key]) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in said) and all(
        line.startswith((key, "    ")) for line in printed.splitlines()
    )


def test_all_keys_of_the_words(capsys):
    assert main(["train", "model=transformer", "--doc", "all"]) == 0
    printed = capsys.readouterr().out
    assert (
        "model.hidden_size=96" in printed
        and "model.halve" not in printed
        and "train.lr=" in printed
        and "device=auto" in printed
    )


@pytest.mark.parametrize(
    "words",
    ["train", "train data=text data.path=a", "adapt-dex base=x", "eval checkpoint=x suite=icl"],
)
def test_a_printed_config_is_the_composed_one_with_comments(words, capsys):
    words = words.split()
    assert main([*words, "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    job = compose({"adapt-dex": "adapt"}.get(words[0], words[0]), words[1:])
    raw = yaml.safe_load(printed)
    assert (
        raw["kind"] == job.kind and raw["seed"] == job.seed and raw.keys() == to_plain(job).keys()
    )
    assert "template" not in raw.get("suite", {}) or raw["suite"]["template"] == job.suite.template
    shown = [
        line
        for line in printed.splitlines()
        if ": " in line and "kind:" not in line and "{" not in line
    ]
    assert all(" # " in line for line in shown) and len(shown) > 5
    assert raw["wandb"] == to_plain(job.wandb)


def test_an_experiment_shows_its_sweep(capsys):
    assert main(["train", "experiment=diff/default_run", "--cfg", "job"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "# a sweep over model=transformer,diff_v1 seed=0,1,2"
    )


def test_short_help(capsys):
    for words in ([], ["train"], ["bench"], ["bench", "train"]):
        assert main([*words, "-h"]) == 0
        short = capsys.readouterr().out
        assert main([*words, "--help"]) == 0
        assert capsys.readouterr().out == short and short.startswith("Usage: ")
