"""`diffx adapt-dex` from the door to the run folder, and back through `diffx.loading.load`."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from diffx.cli import main
from diffx.config.bridge import load_config
from diffx.config.dex import Variant
from diffx.config.train import Device
from diffx.data import open_data
from diffx.loading import load
from diffx.train import adapt as module
from diffx.train import loop

RECIPE = (
    "data=text data.val_tokens=1000 train.steps=8 train.seq_len=32 train.batch_tokens=64 "
    "train.lr=1e-2 train.log_every=1 train.eval_every=4 train.save_every=4 train.keep_last=9 "
    "dex.anneal_steps=6 dex.init=linear dex.calibration_tokens=256 dex.lora_rank=2 "
    "wandb.mode=disabled device=cpu"
)
LAYERS = ("00", "01")
GOLDEN = json.loads(
    (Path(__file__).parent / "golden_adapt.json").read_text()
)  # variant: losses of the 8 steps
SPEED = ("time", "train/tokens_per_second", "train/mfu", "train/peak_memory_bytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory, hf_folder):
    """A folder with a text, where this module's runs lie."""
    folder = tmp_path_factory.mktemp("adapted")
    rows = (
        {"text": f"Document {n} says that {n} times {n} is {n * n}, and no more. " * 2}
        for n in range(200)
    )
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFX_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def words(place, hf_folder):
    def words(*changes):
        return [
            "adapt-dex",
            f"base={hf_folder}",
            f"data.path={place / 'text.jsonl'}",
            *RECIPE.split(),
            *changes,
        ]

    return words


@pytest.fixture(scope="module")
def run(place, words):
    """The finished run of a variant; each is made once."""

    def run(variant="dex"):
        folder = place / variant
        if not folder.exists():
            assert main(words(f"run.dir={folder}", f"dex.variant={variant}")) == 0
        return folder

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder):
    return [{key: value for key, value in row.items() if key not in SPEED} for row in rows(folder)]


def weights(folder, step=8):
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def error_of(capfd, command, code=2):
    assert main(command) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


every_variant = pytest.mark.parametrize("variant", [variant.value for variant in Variant])


def test_the_run_folder(run, hf_folder):
    folder = run()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "adapter", "base.json", "checkpoints", "config.yaml", "data.json", "environment.json",
        "heads.json", "metrics.jsonl",
        "overrides.yaml", "plots", "summary.json", "tokenizer", "train.log",
    }  # fmt: skip
    assert (folder / "plots" / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert "the branch is" in (folder / "train.log").read_text()
    heads = json.loads((folder / "heads.json").read_text())
    base = json.loads((folder / "base.json").read_text())
    assert (
        heads["base"] == base["fingerprint"]
        and base["name"] == "tiny-llama"
        and heads["settings"]["tokens"] == 256
    )
    assert [len(chosen) for chosen in heads["heads"]] == [2, 2]
    described = json.loads((folder / "adapter" / "adapter.json").read_text())
    assert (
        described["heads"] == heads["heads"]
        and described["base"] == base
        and described["step"] == 8
    )
    assert described["dex"]["variant"] == "dex" and described["dex"]["anneal_steps"] == 6


@every_variant
def test_the_summary_and_the_adapter(run, variant, hf_folder):
    folder = run(variant)
    found, lines = summary(folder), rows(folder)
    assert (
        found["kind"] == variant
        and found["base"] == "tiny-llama"
        and found["step"] == 8
        and found["finished"]
    )
    assert (
        found["base/val/loss"] == lines[0]["val/loss"]
        and found["val/loss"] == lines[-1]["val/loss"]
    )
    assert found["base/val/loss"] != found["val/loss"]
    saved = weights(folder)
    assert found["parameters"]["trained"] == sum(value.numel() for value in saved.values())
    assert ("branch" in str(found["branch"])) is Variant(variant).branches
    parts = {path.name: load_file(path) for path in (folder / "adapter").glob("*.safetensors")}
    own = {"w_d", "lambda_learn"} if Variant(variant).anneals else {"w_d"}
    if Variant(variant).branches:
        assert {name.rpartition(".")[2] for name in parts["branch.safetensors"]} == own
    assert ("branch.safetensors" in parts) is Variant(variant).branches and (
        "tuned.safetensors" in parts
    ) is (variant != "adapter_only")
    together = {f"model.{name}": value for part in parts.values() for name, value in part.items()}
    assert together.keys() == saved.keys() and all(
        torch.equal(together[name], saved[name]) for name in saved
    )


@every_variant
def test_every_variant_starts_as_the_base_and_learns(run, variant, hf_folder):
    lines = rows(run(variant))
    assert lines[0]["val/loss"] == rows(run("attn_only"))[0]["val/loss"]
    assert lines[-1]["val/loss"] < lines[0]["val/loss"]


@pytest.mark.parametrize("variant", GOLDEN)
def test_the_golden_curve_has_not_moved(run, variant):
    assert [line["train/loss"] for line in rows(run(variant))[1:]] == pytest.approx(
        GOLDEN[variant], rel=1e-4
    )


@every_variant
def test_the_metrics(run, variant):
    lines = rows(run(variant))
    assert [line["step"] for line in lines] == list(range(9))
    logged = {
        f"dex/{name}/{layer}"
        for name in ("lambda", "ratio", "cos", "grad_norm/w_d")
        for layer in LAYERS
    }
    logged |= (
        set()
        if variant == "fixed_lambda"
        else {f"dex/grad_norm/lambda/{layer}" for layer in LAYERS}
    )
    for line in lines[1:]:
        assert {"train/loss", "train/lr", "train/grad_norm", *SPEED} <= line.keys()
        assert {key for key in line if key.startswith("dex/")} == (
            logged if Variant(variant).branches else set()
        )
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_lambda_is_the_learned_one_after_annealing_and_fixed_lambda_stays(run):
    last, saved = rows(run())[-1], weights(run())
    for layer in LAYERS:
        learned = saved[f"model.model.layers.{int(layer)}.self_attn.o_proj.lambda_learn"]
        assert (
            last[f"dex/lambda/{layer}"] == pytest.approx(float(learned), rel=1e-6)
            and float(learned) != 0
        )
    for line in rows(run("fixed_lambda"))[1:]:
        assert line["dex/lambda/00"] == pytest.approx(0.2) and line[
            "dex/lambda/01"
        ] == pytest.approx(0.8 - 0.6 * math.exp(-0.3))


def test_lambda_is_logged_as_of_its_step(run):
    a, learned = 4 / 6, weights(run(), 4)["model.model.layers.0.self_attn.o_proj.lambda_learn"]
    assert rows(run())[4]["dex/lambda/00"] == pytest.approx(
        (1 - a) * a * 0.2 + a * float(learned), rel=1e-6
    )


def test_fixed_lambda_starts_with_zeros_and_says_so(run):
    assert (
        yaml.safe_load((run("fixed_lambda") / "config.yaml").read_text())["dex"]["init"] == "zeros"
    )
    assert yaml.safe_load((run() / "config.yaml").read_text())["dex"]["init"] == "linear"


@every_variant
def test_it_loads_back_as_it_was_measured(run, variant):
    folder = run(variant)
    loaded = load(str(folder), Device.cpu)
    assert (loaded.step, loaded.name, loaded.limit, loaded.folder) == (8, variant, 256, folder)
    corpus = open_data(load_config(folder / "config.yaml").data, loaded.tokenizer)
    nats = tokens = 0
    with torch.no_grad():
        for batch in corpus.val_batches(32, 4, 0, 1):
            logits = loaded.model(batch.inputs).logits
            nats += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1),
                    batch.targets.flatten(),
                    ignore_index=-100,
                    reduction="sum",
                )
            )
            tokens += int((batch.targets >= 0).sum())
    assert nats / tokens == pytest.approx(summary(folder)["val/loss"], rel=1e-6)


def test_an_earlier_checkpoint_has_its_own_lambda(run):
    early, late = load(f"{run()}@4", Device.cpu), load(str(run()), Device.cpu)
    assert early.step == 4
    (first, _), (final, _) = early.adapted.branches, late.adapted.branches
    a, learned = 4 / 6, weights(run(), 4)["model.model.layers.0.self_attn.o_proj.lambda_learn"]
    assert float(first.lambda_value()) == pytest.approx(
        (1 - a) * a * 0.2 + a * float(learned), rel=1e-6
    )
    assert float(final.lambda_value()) == float(final.lambda_learn)


# Resuming.


@pytest.fixture
def killed(words, tmp_path, monkeypatch):
    """A run that dies right after the checkpoint of step 4, in the middle of annealing."""
    folder, save = tmp_path / "killed", loop.save_checkpoint

    def dying(run_dir, step, *args, **kwargs):
        save(run_dir, step, *args, **kwargs)
        if step == 4:
            raise SystemExit(9)

    monkeypatch.setattr(loop, "save_checkpoint", dying)
    with pytest.raises(SystemExit):
        main(words(f"run.dir={folder}"))
    monkeypatch.undo()
    return folder


def test_a_run_killed_in_the_middle_of_annealing_goes_on_as_if_it_had_not_been(run, killed, words):
    assert rows(killed)[-1]["step"] == 4 and not (killed / "summary.json").exists()
    assert main(words(f"train.resume={killed}")) == 0
    assert figures(killed) == figures(run())
    resumed, whole = weights(killed), weights(run())
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert {
        key: value
        for key, value in summary(killed).items()
        if "second" not in key and key not in ("checkpoint", "adapter")
    } == {
        key: value
        for key, value in summary(run()).items()
        if "second" not in key and key not in ("checkpoint", "adapter")
    }


def test_a_resumed_run_keeps_the_annealing_and_the_heads_of_its_start(killed, words, tmp_path):
    command = [
        word
        for word in words(f"train.resume={killed}")
        if not word.startswith(("dex.anneal", "train.steps"))
    ]
    heads = (killed / "heads.json").read_text()
    assert main([*command, "train.steps=20"]) == 0
    assert yaml.safe_load((killed / "config.yaml").read_text())["dex"]["anneal_steps"] == 6
    assert rows(killed)[-1]["step"] == 20 and (killed / "heads.json").read_text() == heads


def test_annealing_takes_half_of_the_run_if_nothing_is_said(words, place, tmp_path):
    command = [
        word
        for word in words("train.steps=5", f"run.dir={tmp_path / 'run'}")
        if not word.startswith("dex.anneal")
    ]
    assert main(command) == 0
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["dex"]["anneal_steps"] == 2
    )


def test_a_finished_run_resumed_says_the_same(run, words, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(run(), folder)
    before = summary(folder)
    assert main(words(f"train.resume={folder}")) == 0
    assert (
        summary(folder)["branch"] == before["branch"]
        and summary(folder)["val/loss"] == before["val/loss"]
    )


def test_a_run_killed_before_it_wrote_all_its_files_starts_again(run, words, tmp_path):
    folder = tmp_path / "early"
    folder.mkdir()
    for name in ("config.yaml", "environment.json"):
        shutil.copy(run() / name, folder)
    assert main(words(f"train.resume={folder}")) == 0
    assert {"heads.json", "base.json", "tokenizer", "plots", "adapter"} <= {
        path.name for path in folder.iterdir()
    }
    assert figures(folder) == figures(run())


@pytest.mark.parametrize(
    "word", ["dex.anneal_steps=7", "dex.variant=dex_plus", "dex.k=1", "base=elsewhere"]
)
def test_a_resumed_run_keeps_its_settings(run, words, word, capfd):
    assert f"{word} conflicts with the run" in error_of(capfd, words(f"train.resume={run()}", word))


def test_another_base_is_noticed(run, words, hf_folder, tmp_path, capfd):
    base = tmp_path / "tiny-llama"
    shutil.copytree(hf_folder, base)
    folder = tmp_path / "run"
    assert main(words(f"base={base}", f"run.dir={folder}")) == 0
    state = load_file(base / "model.safetensors")
    save_file(
        state | {"lm_head.weight": state["lm_head.weight"] + 1},
        base / "model.safetensors",
        {"format": "pt"},
    )
    for command in (
        words(f"base={base}", f"train.resume={folder}", "train.steps=9"),
        ["eval", f"checkpoint={folder}", "suite=icl"],
    ):
        assert "was adapted from other weights" in error_of(capfd, command)
    shutil.rmtree(base)
    assert f"base={base} cannot be used" in error_of(
        capfd, ["eval", f"checkpoint={folder}", "suite=icl"]
    )


# Heads of another run.


def test_heads_of_another_run_are_used_verbatim(run, words, tmp_path):
    folder = tmp_path / "again"
    assert (
        main(
            words(
                f"dex.heads={run()}/heads.json",
                f"run.dir={folder}",
                "dex.calibration_tokens=32",
                "train.steps=1",
            )
        )
        == 0
    )
    assert (folder / "heads.json").read_text() == (run() / "heads.json").read_text()


def test_choosing_heads_has_a_bar_and_an_interrupt_there_leaves_nothing(
    words, tmp_path, monkeypatch
):
    shown = []

    def at(bar, done, *args, **kwargs):
        if bar._name == "choosing heads by entropy_high":
            shown.append((done, bar._total))
            if done == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr("diffx.console.Bar.at", at)
    assert main(words(f"run.dir={tmp_path}/x", "dex.heads=entropy_high")) == 130
    assert shown == [(1, 8), (2, 8), (3, 8)]
    assert list(tmp_path.iterdir()) == []


def test_heads_that_cannot_be_used(run, words, tmp_path, capfd):
    plan = json.loads((run() / "heads.json").read_text())
    other = tmp_path / "heads.json"
    other.write_text(json.dumps(plan | {"base": "f" * 64}))
    assert "it is of another model (ffffffffffff" in error_of(
        capfd, words(f"dex.heads={other}", f"run.dir={tmp_path / 'x'}")
    )
    none = run("attn_only") / "heads.json"
    assert "it chooses no heads" in error_of(
        capfd, words(f"dex.heads={none}", f"run.dir={tmp_path / 'x'}")
    )
    assert not (tmp_path / "x").exists()


# Options of the training.


def test_activation_checkpointing_and_micro_batches_change_nothing(run, words, tmp_path):
    folder = tmp_path / "checkpointed"
    assert main(words("train.activation_checkpointing=true", f"run.dir={folder}")) == 0
    assert figures(folder) == figures(run()) and weights(folder).keys() == weights(run()).keys()
    folder = tmp_path / "micro"
    assert main(words("train.micro_batch_size=1", f"run.dir={folder}")) == 0
    for a, b in zip(figures(folder), figures(run()), strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("variant", ["dex", "full"])
def test_a_bf16_base_under_autocast_with_tied_embeddings(variant, words, hf_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hf_folder, dtype=torch.bfloat16)
    base = tmp_path / "base"
    shutil.copytree(hf_folder, base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    folder = tmp_path / "run"
    short = [
        "train.steps=4",
        "dex.anneal_steps=3",
        "dex.calibration_tokens=64",
        "data.val_tokens=250",
    ]  # many a CPU multiplies bf16 slowly
    assert (
        main(
            words(
                f"base={base}",
                "train.precision=bf16",
                f"dex.variant={variant}",
                f"run.dir={folder}",
                *short,
            )
        )
        == 0
    )
    saved = weights(folder, 4)
    assert {value.dtype for value in saved.values()} == {
        torch.float32
    } and "model.lm_head.weight" not in saved
    assert ("model.model.embed_tokens.weight" in saved) is (variant == "full")
    assert rows(folder)[-1]["val/loss"] < rows(folder)[0]["val/loss"]
    loaded = load(str(folder), Device.cpu)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    trained = dict(loaded.model.named_parameters())
    assert all(
        torch.equal(trained[name.removeprefix("model.")].float(), value)
        for name, value in saved.items()
    )


def test_a_sweep_over_variants(words, tmp_path):
    sweep = [
        "-m",
        "dex.variant=dex,attn_only",
        "train.steps=1",
        f"hydra.sweep.dir={tmp_path / 's'}",
    ]
    command, *rest = words()
    assert (
        main([command, *sweep, *[word for word in rest if not word.startswith("train.steps")]]) == 0
    )
    assert [summary(tmp_path / "s" / number)["kind"] for number in "01"] == ["dex", "attn_only"]


def test_not_enough_memory_is_said_before_anything_is_made(words, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "run"
    monkeypatch.setattr(module, "free_memory", lambda device: 2**10)
    line = error_of(capfd, words(f"run.dir={folder}", "dex.variant=full"))
    assert line.startswith(
        "error: dex.variant=full cannot be used: besides the weights it needs 0.0 GiB and more"
    )
    assert "train.micro_batch_size" in line
    monkeypatch.setattr("diffx.dex.pretrained.free_memory", lambda device: 2**10)
    line = error_of(capfd, words(f"run.dir={folder}"))
    assert (
        "its weights need 0.0 GiB and 0.0 GiB are free; take train.precision=bf16 (half of it) "
        "or a smaller model" in line
    )
    assert not folder.exists()


def test_what_is_needed_is_counted_right(words, monkeypatch, tmp_path, capfd):
    """The bytes needed by two sequences of 32 tokens over 257 entries, exactly.

    The logits are held three times in fp32, and each trained parameter takes three numbers more.
    """
    trained = 2 * (2 * 16 * 32 + 32 * 32) + 2 * (64 + 1)
    needed = 12 * 64 * 257 + 12 * trained
    monkeypatch.setattr(module, "free_memory", lambda device: needed - 1)
    assert "besides the weights it needs" in error_of(capfd, words(f"run.dir={tmp_path / 'x'}"))
    monkeypatch.setattr(module, "free_memory", lambda device: needed)
    assert main(words(f"run.dir={tmp_path / 'x'}", "train.steps=1")) == 0


def test_memory_that_runs_out_is_one_line(words, tmp_path, monkeypatch, capfd):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB\nmany more lines")

    monkeypatch.setattr("diffx.train.run.fit", full)
    line = error_of(capfd, words(f"run.dir={tmp_path / 'run'}"), code=1)
    assert (
        "the memory of cpu is full (tried to allocate 3 GiB)" in line
        and "train.activation_checkpointing=true" in line
    )


DISTRIBUTED = """
import sys
from pathlib import Path
from diffx.config.bridge import load_config
from diffx.train.run import run_job
run_job(load_config(Path(sys.argv[1])), [])
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(run, tmp_path):
    text = (run() / "config.yaml").read_text()
    (tmp_path / "job.yaml").write_text(text.replace(str(run()), str(tmp_path / "two")))
    (tmp_path / "main.py").write_text(DISTRIBUTED)
    launch = partial(subprocess.run, capture_output=True, text=True, timeout=240)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = launch([*command, str(tmp_path / "main.py"), str(tmp_path / "job.yaml")])
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(figures(run()), figures(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5)
    assert weights(tmp_path / "two").keys() == weights(run()).keys()
