"""`diffx export`: its folder loads in a process without the run, with the same results."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import diffx.export
from diffx.cli import main
from diffx.config.eval import Dtype
from diffx.config.train import Device
from diffx.evaluation.model import LanguageModel
from diffx.loading import load

COMMON = (
    "data=text data.val_tokens=1000 train.steps=4 train.seq_len=32 train.batch_tokens=64 "
    "train.lr=1e-2 train.sample_tokens=0 train.save_every=2 train.eval_every=4 "
    "wandb.mode=disabled device=cpu"
)
DEX = "dex.anneal_steps=8 dex.init=linear dex.calibration_tokens=128 dex.lora_rank=2"
OURS = (
    "tokenizer=bytes model.hidden_size=32 model.num_layers=2 model.num_heads=4 "
    "model.num_kv_heads=2 train.warmup=1"
)
RUNS = {
    "dex": "dex.variant=dex",
    "dex_plus": "dex.variant=dex_plus dex.share=head",
    "fixed_lambda": "dex.variant=fixed_lambda",
    "attn_only": "dex.variant=attn_only",
    "lora": "dex.variant=lora",
    "full": "dex.variant=full",
    "fused": "dex.variant=dex",
    "transformer": "model=transformer",
    "diff_v1": "model=diff_v1",
    "diff_v1_heads": "model=diff_v1 model.lambda_scope=head model.tie_embeddings=false",
    "diff_v2": "model=diff_v2",
}
BRANCHES = ("dex", "dex_plus", "fixed_lambda", "fused")
CLASSES = {
    "transformer": "LlamaForCausalLM",
    "diff_v1": "DiffLlamaForCausalLM",
    "fused": "GPT2LMHeadModel",
}
CLASSES |= {"diff_v1_heads": "DiffxForCausalLM", "diff_v2": "DiffxForCausalLM"}
PROMPT = "Document 7 says"


@pytest.fixture(scope="module")
def place(tmp_path_factory, hf_folder, tokenizer):
    """A folder with a text, and a GPT-2: Conv1D, fused queries, tied embeddings."""
    folder = tmp_path_factory.mktemp("export")
    rows = (
        {"text": f"Document {n} says that {n} times {n} is {n * n}, and no more. " * 2}
        for n in range(120)
    )
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "other.jsonl").write_text(
        json.dumps({"text": "What was never read before, a few hundred times over. " * 20}) + "\n"
    )
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eot_id}
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        vocab_size=tokenizer.vocab_size,
        initializer_range=0.2,
        **ends,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer.save(folder / "gpt2")
    (folder / "gpt2" / "README.md").write_text("---\nlicense: mit\n---\n\nA model.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFX_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(place, hf_folder):
    """A run of ``RUNS``; each is made once."""

    def run(name):
        folder = place / "runs" / name
        if not folder.exists():
            adapts = "dex." in RUNS[name]
            kind = (
                [
                    "adapt-dex",
                    f"base={place / 'gpt2' if name == 'fused' else hf_folder}",
                    *DEX.split(),
                ]
                if adapts
                else ["train"]
            )
            words = [
                *kind,
                *([] if adapts else OURS.split()),
                *COMMON.split(),
                f"data.path={place / 'text.jsonl'}",
                *RUNS[name].split(),
            ]
            assert main([*words, f"run.dir={folder}"]) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def export(place, run):
    """The export of a run."""

    def export(name, fold=True, dtype="auto"):
        out = place / "out" / f"{name}-{fold}-{dtype}"
        if not out.exists():
            assert (
                main(
                    [
                        "export",
                        f"checkpoint={run(name)}",
                        f"out={out}",
                        f"fold={fold}",
                        f"dtype={dtype}",
                    ]
                )
                == 0
            )
        return out

    return export


def read(model, ids):
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same(exported, run, tolerance):
    """Logits and greedy text of an exported folder in transformers equal those of the run."""
    loaded, theirs = load(str(run), Device.cpu), AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == loaded.prefix + loaded.tokenizer.encode(PROMPT)
    ours = read(loaded.model, ids)
    assert ours.std() > 0.1
    torch.testing.assert_close(read(theirs, ids), ours, rtol=tolerance, atol=tolerance)
    drawn = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert theirs.generation_config.eos_token_id == sorted(loaded.ends)
    tokens = [token for token in drawn[0, ids.shape[1] :].tolist() if token not in loaded.ends]
    assert tokens == LanguageModel(loaded).generate([ids[0].tolist()], 12)[0]
    return theirs


SELDOM = ("attn_only", "full")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SELDOM else ())
        for name, words in RUNS.items()
        if "dex." in words
    ],
)
def test_an_adapted_run_becomes_a_model_of_its_bases_class(name, run, export):
    model = assert_same(export(name), run(name), 1e-4)
    assert type(model).__name__ == CLASSES.get(name, "LlamaForCausalLM")
    saved = load_file(export(name) / "model.safetensors")
    assert not any("lora" in key or "w_d" in key or "proj.proj" in key for key in saved)


@pytest.mark.parametrize("name", BRANCHES)
def test_the_branch_is_kept_where_that_is_asked_for(name, run, export):
    model = assert_same(export(name, fold=False), run(name), 1e-6)
    saved = load_file(export(name, fold=False) / "model.safetensors")
    assert (
        type(model).__name__ == "DexForCausalLM" and sum(key.endswith("w_d") for key in saved) == 2
    )
    again = export(name, fold=False) / "again"
    model.save_pretrained(again)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(read(AutoModelForCausalLM.from_pretrained(again), ids), read(model, ids))


@pytest.mark.parametrize("name", [name for name, words in RUNS.items() if "dex." not in words])
def test_a_run_of_ours(name, run, export):
    model = assert_same(export(name), run(name), 1e-4)
    assert type(model).__name__ == CLASSES[name]


def test_an_earlier_checkpoint(run, place):
    out = place / "early"
    assert main(["export", f"checkpoint={run('dex')}@2", f"out={out}"]) == 0
    ids = torch.tensor([[5, 6, 7]])
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(out),
        load(f"{run('dex')}@2", Device.cpu).model,
    )
    torch.testing.assert_close(read(theirs, ids), read(ours, ids), rtol=1e-4, atol=1e-4)
    card = ModelCard.load(out / "README.md")
    assert (
        "| steps | 2 |" in card.text and "held-out loss" not in card.text
    )  # the summary is of step 4


# The model card.


@pytest.mark.parametrize("name", ["fused", "dex", "diff_v1", "diff_v2"])
def test_the_card_says_what_the_model_is_and_how_it_is_loaded(
    name, run, export, place, hf_folder, monkeypatch
):
    adapted, registered = name in BRANCHES, name == "diff_v2"
    card = ModelCard.load(export(name) / "README.md")
    assert card.data.library_name == ("diffx" if registered else "transformers")
    assert card.data.base_model == {"fused": "gpt2", "dex": "tiny-llama"}.get(name)
    assert card.data.license == ("mit" if name == "fused" else None)  # the base's
    assert {"diffx", "dex" if adapted else name} <= set(card.data.tags)
    rows = dict(
        line.strip("| ").split(" | ")
        for line in card.text.splitlines()
        if line.count("|") == 3 and "---" not in line and line != "| | |"
    )
    summary = json.loads((run(name) / "summary.json").read_text())
    assert (
        rows["held-out loss, nats a token"] == f"{summary['val/loss']:.4f}"
        and rows["steps"] == "4"
        and rows["tokens"] == "256"
    )
    assert (
        rows["training text"] == "text text.jsonl"
        and ("held-out loss of the base" in rows) is adapted
    )
    assert ("hidden_size 32" in rows["architecture"]) is not adapted
    assert "None" not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    loaded = {}
    monkeypatch.chdir(export(name).parent)
    exec(code, loaded)
    assert type(loaded["model"]).__name__ == CLASSES.get(name, "LlamaForCausalLM")
    assert (
        rows["parameters"] == f"{loaded['model'].num_parameters():,}"
        and loaded["tokenizer"]("x")["input_ids"]
    )
    for folder in (place, hf_folder, Path.home(), Path.cwd()):
        assert str(folder) not in card.content


def test_the_card_of_an_adapter(run, place, hf_folder):
    card = ModelCard.load(run("dex") / "adapter" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("diffx", "tiny-llama")
    summary = json.loads((run("dex") / "summary.json").read_text())
    assert (
        f"{summary['val/loss']:.4f}" in card.text
        and f"| {summary['parameters']['trained']:,} |" in card.text
    )
    assert str(place) not in card.content and str(hf_folder) not in card.content


# In another process.

LOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
logits = {}
for folder in sys.argv[2:]:
    ids = AutoTokenizer.from_pretrained(folder)("Document 7 says", return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not model.training
    with torch.no_grad():
        logits[folder] = model(ids).logits.contiguous()
save_file(logits, sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_diffx", [False, True])
def test_a_process_of_its_own_gets_the_same_logits(with_diffx, export, run, place, tmp_path):
    names = (
        {"dex": False, "diff_v2": True, "diff_v1_heads": True}
        if with_diffx
        else {"dex": True, "transformer": True, "diff_v1": True}
    )
    folders = {name: str(export(name, fold=fold)) for name, fold in names.items()}
    script = (
        "import diffx\n" + LOAD if with_diffx else LOAD + "\nassert 'diffx' not in sys.modules\n"
    )
    out = tmp_path / "logits.safetensors"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, out, *folders.values()],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(out)
    for name, folder in folders.items():
        loaded = load(str(run(name)), Device.cpu)
        ids = torch.tensor([loaded.prefix + loaded.tokenizer.encode(PROMPT)])
        torch.testing.assert_close(found[folder], read(loaded.model, ids), rtol=1e-4, atol=1e-4)


# Types.


def test_in_bf16_the_branch_stays_fp32(export, run):
    folder = export("dex", fold=False, dtype="bf16")
    saved = load_file(folder / "model.safetensors")
    kinds = {
        name.rpartition(".")[2] in ("w_d", "lambda_learn", "schedule", "chosen"): value.dtype
        for name, value in saved.items()
    }
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.bfloat16
    branch, ours = (
        model.base.model.layers[1].self_attn.o_proj,
        load(str(run("dex")), Device.cpu).adapted.branches[1],
    )
    assert branch.w_d.dtype is branch.lambda_learn.dtype is torch.float32
    assert torch.equal(branch.w_d, ours.w_d) and torch.equal(
        branch.lambda_value(), ours.lambda_value()
    )
    narrow = load(str(run("dex")), Device.cpu, Dtype.bf16)
    ids = torch.tensor([narrow.tokenizer.encode(PROMPT)])
    torch.testing.assert_close(read(model, ids), read(narrow.model, ids), rtol=0, atol=0)
    folded = AutoModelForCausalLM.from_pretrained(export("dex", dtype="bf16"))
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(
        read(folded, ids).float(),
        read(load(str(run("dex")), Device.cpu).model, ids),
        rtol=0.1,
        atol=0.1,
    )


# What comes after: evaluation takes the run, folded or not, with equal results.


SOURCE = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
TASK = (
    SOURCE
    + """
task: squares
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [" yes", " no, it is not"]
doc_to_target: 0
"""
)


ROLLING = (
    SOURCE
    + """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
"""
)
ANSWERS = (
    SOURCE
    + """
task: answers
output_type: generate_until
doc_to_text: "{{{{text[:20]}}}}"
doc_to_target: " no"
generation_kwargs: {{max_gen_toks: 4, until: ["."]}}
"""
)


@pytest.mark.parametrize(
    "suite",
    [
        "harness suite.tasks=[squares]",
        pytest.param(
            "icl suite.shots=[1,2] suite.queries=6 suite.labels=3", marks=pytest.mark.slow
        ),
        pytest.param("outliers suite.tokens=256", marks=pytest.mark.slow),
    ],
)
def test_evaluations_are_equal(suite, run, export, place):
    found = {}
    tasks = place / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "squares.yaml").write_text(TASK.format(path=place / "other.jsonl"))
    for name, spec in (
        ("run", run("dex")),
        ("folded", export("dex")),
        ("unfolded", export("dex", fold=False)),
    ):
        name_of, *options = suite.split()
        words = [
            "eval",
            f"checkpoint={spec}",
            f"suite={name_of}",
            *options,
            "limit=4",
            "wandb.mode=disabled",
            "device=cpu",
        ]
        words += (
            ["data=text", f"data.path={place / 'other.jsonl'}"] if name_of == "outliers" else []
        )
        words += [f"suite.include_path={tasks}"] if name_of == "harness" else []
        before = set(place.rglob("results.json"))
        assert main(words) == 0
        (path,) = set(place.rglob("results.json")) - before
        found[name] = [
            (metric["label"], metric["metric"], metric["value"])
            for metric in json.loads(path.read_text())["metrics"]
        ]
    assert len(found["run"]) > 0
    for name in ("folded", "unfolded"):
        assert [row[:2] for row in found[name]] == [row[:2] for row in found["run"]]
        assert [row[2] for row in found[name]] == pytest.approx(
            [row[2] for row in found["run"]], rel=1e-4
        )


@pytest.mark.parametrize("name", ["transformer", pytest.param("diff_v2", marks=pytest.mark.slow)])
def test_lm_evals_own_figures_of_an_export_are_the_runs(name, run, export, place):
    """Likelihoods of choices and long texts, and answers, by lm-eval's class for transformers."""
    (place / "more").mkdir(exist_ok=True)
    rows = (
        {"text": f"Of the number {n} little is known, but that it comes before {n + 1}. " * (n + 1)}
        for n in range(3)
    )
    (place / "more" / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"choices": TASK.replace("squares", "choices"), "rolling": ROLLING, "answers": ANSWERS}
    for task, text in tasks.items():
        (place / "more" / f"{task}.yaml").write_text(
            text.format(path=place / "more" / "numbers.jsonl")
        )
    words = [
        "suite=harness",
        "suite.tasks=[choices,rolling,answers]",
        "limit=3",
        "wandb.mode=disabled",
        "device=cpu",
        "force=true",
    ]
    found = {}
    for label, spec in (("run", run(name)), ("export", export(name))):
        before = {path: path.stat().st_mtime_ns for path in place.rglob("results.json")}
        assert (
            main(["eval", f"checkpoint={spec}", *words, f"suite.include_path={place / 'more'}"])
            == 0
        )
        (path,) = (
            path
            for path in place.rglob("results.json")
            if before.get(path) != path.stat().st_mtime_ns
        )
        found[label] = {
            (row["label"].split()[0], row["metric"]): row["value"]
            for row in json.loads(path.read_text())["metrics"]
        }
    assert found["export"] == pytest.approx(found["run"], rel=1e-4)
    manager = TaskManager(include_path=str(place / "more"))
    model = HFLM(pretrained=str(export(name)), device="cpu", batch_size=2)
    theirs = simple_evaluate(
        model, tasks=list(tasks), limit=3, task_manager=manager, bootstrap_iters=0
    )
    for task, figures in theirs["results"].items():
        own = {
            key.partition(",")[0]: value
            for key, value in figures.items()
            if key.endswith(",none") and "stderr" not in key
        }
        assert own and own == pytest.approx(
            {metric: found["run"][task, metric] for metric in own}, rel=1e-4
        )
    assert (
        model.max_length
        == json.loads((export(name) / "config.json").read_text())["max_position_embeddings"]
        == 32
    )


# What is refused.


def error_of(capfd, words, code=2):
    assert main(words) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_refusals(run, export, place, hf_folder, capfd):
    out = place / "refused"
    assert "fold=false cannot be used" in error_of(
        capfd, ["export", f"checkpoint={run('transformer')}", f"out={out}", "fold=false"]
    )
    assert "is not a run folder" in error_of(
        capfd, ["export", f"checkpoint={hf_folder}", f"out={out}"]
    )
    assert "it exists" in error_of(
        capfd, ["export", f"checkpoint={run('dex')}", f"out={export('dex')}"]
    )
    assert "has no checkpoint '9'" in error_of(
        capfd, ["export", f"checkpoint={run('dex')}@9", f"out={out}"]
    )
    assert "format=gguf" in error_of(
        capfd, ["export", f"checkpoint={run('dex')}", f"out={out}", "format=gguf"]
    )
    adapted = error_of(
        capfd, ["adapt-dex", f"base={export('dex', fold=False)}", "wandb.mode=disabled"]
    )
    assert "it is adapted already and keeps its branch" in adapted
    assert not out.exists()


def test_an_export_that_does_not_say_the_same_is_not_written(run, place, monkeypatch, capfd):
    checkpoint, right = run("transformer"), diffx.export.to_llama

    def wrong(model):
        llama = right(model)
        with torch.no_grad():
            llama.model.layers[1].self_attn.q_proj.weight *= 1.1
        return llama

    monkeypatch.setattr(diffx.export, "to_llama", wrong)
    capfd.readouterr()
    line = error_of(capfd, ["export", f"checkpoint={checkpoint}", f"out={place / 'wrong'}"], code=1)
    assert "this is a defect, and nothing was written" in line and not (place / "wrong").exists()


def test_an_export_is_measured_as_its_run_is(tmp_path, monkeypatch):
    """The first token, context and held-out text are the run's, with ``data=`` and without."""
    monkeypatch.chdir(tmp_path)
    rows = ({"text": f"Note {n}. The square of {n} is {n * n}. " * 4} for n in range(100))
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = (
        "tokenizer=bytes size=pico train.steps=2 train.seq_len=48 train.batch_tokens=96 "
        "train.sample_tokens=0 data.val_fraction=0.2"
    )
    off = ["wandb.mode=disabled", "device=cpu"]
    assert (
        main(
            [
                "train",
                *keys.split(),
                "data.val_tokens=2000",
                "data=text",
                "data.path=text.jsonl",
                "run.dir=run",
                *off,
            ]
        )
        == 0
    )
    assert main(["export", "checkpoint=run", "out=model"]) == 0
    for more in ([], ["data=text", "data.path=text.jsonl"]):
        losses = []
        for spec, where in (("run", "run/evals"), ("model", "runs/hub/model@*/evals")):
            assert (
                main(
                    [
                        "eval",
                        f"checkpoint={spec}",
                        "suite=long_context",
                        "suite.texts=4",
                        *more,
                        *off,
                    ]
                )
                == 0
            )
            (newest,) = Path().glob(f"{where}/*/long_context/*/results.json")
            losses.append([metric["value"] for metric in json.loads(newest.read_text())["metrics"]])
            shutil.rmtree(newest.parent)
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    (Path("model") / "diffx.json").write_text("{}")
    assert main(["eval", "checkpoint=model", "suite=long_context", *off]) == 2
