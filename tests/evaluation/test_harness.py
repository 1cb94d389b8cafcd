"""Tasks of lm-eval in ``diffx eval``, against lm-eval's evaluator with the same weights."""

import importlib
import json
import random
import sys
import time
import types
from functools import partial

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaForCausalLM

from diffx.config import UserError
from diffx.config.eval import EvalJob
from diffx.config.suite import HarnessSuite
from diffx.console import Reporter
from diffx.evaluation import adapter, harness, harness_tasks
from diffx.evaluation.grading import matches, rows
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.run import evaluate, read_records
from diffx.evaluation.suite import Context
from diffx.hub.convert import from_llama
from diffx.loading import Loaded
from diffx.results import plot
from diffx.results.declare import Reference

TASKS = ["local_choice", "local_rolling", "local_generate"]
WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "tree",
    "stone",
    "river",
    "walks",
    "sees",
    "finds",
    "under",
    "with",
    "seven",
    "red",
    "blue",
    "small",
)
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
  - {{metric: brier_score}}
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["a", " "], max_gen_toks: 12, do_sample: false}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - {{name: first, filter: [{{function: regex, regex_pattern: "(.)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
GROUP = """
group: local_group
task: [local_choice, local_again]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task YAMLs over local rows of random words."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def words(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    for split, number in (("train", 12), ("test", 20)):
        made = [
            {
                "query": words(4, 30) + " and",
                "choices": [words(1, 3) for _ in range(3)],
                "gold": rng.randrange(3),
                "text": words(5, 90),
                "said": "y",
            }
            for _ in range(number)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("generate", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "again.yaml").write_text("include: choice.yaml\ntask: local_again\nnum_fewshot: 0\n")
    (folder / "group.yaml").write_text(GROUP)
    return folder


def job(folder, tasks=TASKS, **options):
    limit = options.pop("limit", None)
    suite = HarnessSuite(name="harness", tasks=tasks, include_path=str(folder), **options)
    return EvalJob(checkpoint="unused", suite=suite, limit=limit)


@pytest.fixture(scope="module")
def llama(hf_folder):
    return LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()


@pytest.fixture
def context(llama, hf_folder, tokenizer, folder, tmp_path):
    """Make a context of our decoder with the Llama's weights."""

    def make(**options):
        lm = LanguageModel(
            Loaded(
                from_llama(llama),
                tokenizer,
                "tiny",
                "f" * 64,
                tmp_path,
                0,
                256,
                None,
                [],
                {tokenizer.eot_id},
            )
        )
        return Context(job(**{"folder": folder} | options), lm, tmp_path, Reporter(quiet=True))

    return make


@pytest.fixture
def run(summarize):
    def measure(context):
        records = list(harness.answer(context, harness.plan(context)))
        return records, summarize(harness, context, records)

    return measure


def theirs(llama, hf_folder, folder, tasks, shots=None, **options):
    """lm-eval by itself: its evaluator, its class, its demonstrations."""
    model = HFLM(pretrained=llama, tokenizer=AutoTokenizer.from_pretrained(hf_folder), batch_size=4)
    manager = TaskManager(include_path=folder, include_defaults=False)
    options |= {"task_manager": manager, "bootstrap_iters": 0, "log_samples": True}
    return lm_eval.simple_evaluate(model, tasks=tasks, num_fewshot=shots, **options)


LM_EVAL_OPTIONS = [
    {"chat_template": True, "system_instruction": "Be brief.", "limit": 0.3},
    {"chat_template": True, "fewshot_as_multiturn": False, "limit": 3},
    {
        "gen_kwargs": {"max_gen_toks": 5, "until": ["e"]},
        "system_instruction": "Be brief.",
        "limit": 0.11,
    },
    {"gen_kwargs": {"do_sample": True, "temperature": 0.7, "top_k": 9}, "limit": 2},
]


@pytest.mark.parametrize("options", LM_EVAL_OPTIONS)
def test_options_are_those_of_lm_eval(llama, chat_folder, folder, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    tasks = ["local_choice", "local_generate"]
    asked = job(folder, tasks=tasks, shots=[1], **options)
    asked.checkpoint, asked.wandb.mode = str(chat_folder), "disabled"
    results = evaluate(asked, [])
    by_id = {record["id"]: record for record in read_records(results)}
    chat = options.get("chat_template", False)
    torch.manual_seed(0)
    expected = theirs(
        llama,
        chat_folder,
        folder,
        tasks,
        shots=1,
        apply_chat_template=chat,
        fewshot_as_multiturn=options.get("fewshot_as_multiturn", chat),
        system_instruction=options.get("system_instruction"),
        gen_kwargs=options.get("gen_kwargs"),
        limit=options["limit"],
    )
    samples = [
        (task, sample)
        for task in tasks
        for sample in expected["samples"][task]
        if sample["filter"] in ("none", "whole")
    ]
    assert len(by_id) == len(samples)
    for task, sample in samples:
        record = by_id[f"{task}/1/{sample['doc_id']}"]
        assert record["prompts"] == list(
            dict.fromkeys(arguments[0] for arguments in sample["arguments"])
        )
        if task == "local_choice":
            assert [answer[0] for answer in record["responses"]] == pytest.approx(
                [given[0][0] for given in sample["resps"]], abs=1e-4
            )
        elif not options.get("gen_kwargs", {}).get("do_sample"):
            assert record["responses"] == sample["resps"][0]


def test_the_harness_options_change_the_settings_hash(
    llama, chat_folder, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folders = []
    for options in [{}, *LM_EVAL_OPTIONS]:
        asked = job(folder, tasks=["local_generate"], **options | {"limit": 1})
        asked.checkpoint, asked.wandb.mode = str(chat_folder), "disabled"
        folders.append(evaluate(asked, []).name)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_kwargs": {"temprature": 1}}, "suite.gen_kwargs.temprature=1 cannot be used"),
        (
            {"gen_kwargs": {"top_p": 0.5}},
            r"suite.gen_kwargs.top_p=0.5 cannot be used: .* with a run",
        ),
        (
            {"gen_kwargs": {"max_gen_toks": "many"}},
            "suite.gen_kwargs.max_gen_toks=many .* a positive whole number",
        ),
        ({"gen_kwargs": {"until": 3}}, "suite.gen_kwargs.until=3 .* a text or a list of texts"),
        ({"gen_kwargs": {"temperature": -1}}, "suite.gen_kwargs.temperature=-1 .* zero or more"),
        ({"gen_kwargs": {"do_sample": "yes"}}, "suite.gen_kwargs.do_sample=yes .* true or false"),
        (
            {"gen_kwargs": {"do_sample": True, "temperature": 1}},
            "suite.gen_kwargs.do_sample=true cannot be used with a run",
        ),
        ({"gen_kwargs": {"max_gen_toks": 300}}, "answers have up to 300 tokens"),
    ],
)
def test_gen_kwargs_that_cannot_be_used(context, options, message):
    with pytest.raises(UserError, match=message):
        harness.plan(context(tasks=["local_generate"], **options))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "process_results: !function own.score",
            r"suite.tasks=own cannot be used: its metric exact_match \(score\) "
            r"failed with KeyError",
        ),
        (
            "metric_list: [{metric: !function own.metric, aggregation: mean, "
            "higher_is_better: true}]",
            "suite.tasks=own cannot be used: its metric metric failed with TypeError: bad metric$",
        ),
        (
            "metric_list: [{metric: exact_match, aggregation: !function own.aggregate, "
            "higher_is_better: true}]",
            "suite.tasks=own cannot be used: its metric exact_match failed with ZeroDivisionError",
        ),
    ],
)
def test_a_users_metric_that_raises_is_named(run, context, folder, tmp_path, more, message):
    tasks = tmp_path / "own"
    tasks.mkdir()
    (tasks / "own.py").write_text(
        "def score(doc, results):\n    return {'exact_match': doc['absent']}\n"
        "def metric(*args, **kwargs):\n    raise TypeError('bad metric')\n"
        "def aggregate(items):\n    return 1 / 0\n"
    )
    text = GENERATE.format(folder=folder).replace("local_generate", "own")
    if more.startswith("metric_list"):
        text = text.partition("metric_list")[0]
    (tasks / "own.yaml").write_text(f"{text}\n{more}\n")
    with pytest.raises(UserError, match=message) as raised:
        run(context(tasks=["own"], folder=tasks, limit=2))
    assert "\n" not in str(raised.value)


def test_figures_are_those_of_lm_eval(run, context, llama, hf_folder, folder):
    records, metrics = run(context())
    expected = theirs(llama, hf_folder, folder, TASKS)
    for task, name, key in (
        ("local_choice", "acc", "acc,none"),
        ("local_choice", "acc_norm", "acc_norm,none"),
        ("local_generate", "exact_match,first", "exact_match,first"),
        ("local_generate", "exact_match,whole", "exact_match,whole"),
    ):
        assert metrics[f"{task} (0-shot)", name]["value"] == expected["results"][task][key], key
    assert 0 < expected["results"]["local_choice"]["acc,none"] < 1
    for task, name in (
        ("local_choice", "brier_score"),
        ("local_rolling", "word_perplexity"),
        ("local_rolling", "bits_per_byte"),
    ):
        found = metrics[f"{task} (0-shot)", name]
        assert (
            found["value"] == pytest.approx(expected["results"][task][f"{name},none"], rel=1e-5)
            and found["low"] < found["value"] < found["high"]
        )
    by_id = {record["id"]: record for record in records}
    for task in TASKS:
        for sample in expected["samples"][task]:
            ours = by_id[f"{task}/0/{sample['doc_id']}"]["responses"]
            for answer, (given,) in zip(ours, sample["resps"], strict=True):
                if task == "local_choice":
                    assert answer[0] == pytest.approx(given[0], abs=1e-4) and answer[1] == given[1]
                else:
                    assert answer == (
                        given
                        if task == "local_generate"
                        else pytest.approx(given, abs=1e-4, rel=1e-6)
                    )


def test_what_a_record_holds(run, context, tokenizer):
    records, _ = run(context())
    choice, rolling, generated = (
        next(record for record in records if record["by"]["task"] == task) for task in TASKS
    )
    assert (
        choice["id"] == "local_choice/0/0"
        and choice["by"] == {"task": "local_choice", "shots": 0, "variant": "local_choice"}
        and choice["scores"].keys() == {"acc", "acc_norm"}
    )
    assert (
        len(choice["prompts"]) == 1
        and len(choice["choices"]) == len(choice["responses"]) == 3
        and choice["values"].keys() == {"brier_score"}
    )
    assert rolling["scores"] == {"loglikelihood": rolling["responses"][0]}
    assert generated["scores"]["answer_tokens"] == len(tokenizer.encode(generated["responses"][0]))
    assert json.loads(json.dumps(records)) == records


def test_demonstrations_are_those_of_lm_eval(run, context, llama, hf_folder, folder):
    records, metrics = run(context(tasks=["local_choice", "local_again"], shots=[0, 2]))
    expected = theirs(llama, hf_folder, folder, ["local_choice"], shots=2)
    assert (
        metrics["local_choice (2-shot)", "acc"]["value"]
        == expected["results"]["local_choice"]["acc,none"]
    )
    prompts = [
        record["prompts"][0]
        for record in records
        if record["by"]["task"] == "local_choice" and record["by"]["shots"] == 2
    ]
    assert (
        prompts == [sample["arguments"][0][0] for sample in expected["samples"]["local_choice"]]
        and prompts[0].count("\n\n") == 2
    )
    assert {(record["by"]["task"], record["by"]["shots"]) for record in records} == {
        ("local_choice", 0),
        ("local_choice", 2),
        ("local_again", 0),
    }
    assert ("average (0-shot)", "acc") in metrics and (
        "average (2-shot)",
        "acc",
    ) not in metrics  # a task that shows none never does
    other = context(tasks=["local_choice"], shots=[2])
    other.job.seed = 1
    assert [record["prompts"][0] for record in run(other)[0]] != prompts


def test_groups_and_averages(run, context, llama, hf_folder, folder):
    records, metrics = run(context(tasks=["local_group", "local_choice"], limit=7))
    again = theirs(llama, hf_folder, folder, ["local_group"])
    assert len(records) == 14
    whole = run(context(tasks=["local_group"]))[1]["local_group (0-shot)", "acc"]
    assert (
        whole["value"] == pytest.approx(again["groups"]["local_group"]["acc,none"])
        and whole["n"] == 40
        and whole["stderr"] > 0
    )
    assert ("average (0-shot)", "acc_norm") not in metrics  # one of the two is part of the other


def test_the_papers_figures_stand_beside_the_average(run, context, monkeypatch):
    reference = Reference(
        label="them (paper)", metric="acc", value=0.5, by={"shots": 0}, average=True
    )
    monkeypatch.setattr(harness, "published", lambda suite: [reference])
    _, metrics = run(context(tasks=["local_choice", "local_again"], shots=[0]))
    assert [key for key, metric in metrics.items() if metric["published"]] == [
        ("average (0-shot)", "acc")
    ]


def test_a_stopped_evaluation_goes_on(run, context, monkeypatch):
    monkeypatch.setattr(adapter, "_CHUNK", 10)
    whole, _ = run(context(shots=[2]))
    context = context(shots=[2])
    (context.folder / "requests.jsonl").unlink()
    examples = harness.plan(context)
    score, calls = adapter.loglikelihoods, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(adapter, "loglikelihoods", stopping)
    with pytest.raises(KeyboardInterrupt):
        list(harness.answer(context, examples))
    assert len((context.folder / "requests.jsonl").read_text().splitlines()) == 30
    resumed = list(harness.answer(context, examples))
    assert (
        resumed == whole and len(calls) == 4 + 3 + 2
    )  # 60 requests of choices in chunks of 10, and 20 texts
    left = [example for example in examples if example.id.endswith("/3")]
    assert list(harness.answer(context, left)) == [
        record for record in whole if record["id"].endswith("/3")
    ]


def test_a_model_of_the_hub_through_the_runner(hf_folder, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = job(folder, tasks=["local_choice", "local_generate"], shots=[0, 1], limit=6)
    asked.checkpoint, asked.wandb.mode = str(hf_folder), "disabled"
    results = evaluate(asked, [])
    figures = json.loads((results / "results.json").read_text())
    assert (
        len(read_records(results)) == 24
        and (results / "harness.png").read_bytes()[:4] == b"\x89PNG"
    )
    assert {metric["label"] for metric in figures["metrics"]} >= {
        "local_choice (0-shot)",
        "local_generate (1-shot)",
    }
    assert "local_choice (1-shot)" in capsys.readouterr().out and figures["settings"][
        "sources"
    ].keys() == {
        "local_choice",
        "local_generate",
    }


def test_settings_change_with_the_task(context, folder, tmp_path):
    before = context(tasks=["local_choice"])
    harness.plan(before)
    harness.load_tasks.cache_clear()
    after = context(tasks=["local_choice"])
    harness.plan(after)
    assert before.sources == after.sources
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "choice.yaml").write_text(
        CHOICE.format(folder=folder).replace("{{query}}", "{{query}}?")
    )
    after = context(tasks=["local_choice"], folder=changed)
    harness.plan(after)
    assert before.sources != after.sources


def test_data_from_a_local_folder(context, folder, tmp_path):
    data = tmp_path / "data" / "local_choice"
    data.mkdir(parents=True)
    lines = (folder / "test.jsonl").read_text().splitlines(keepends=True)
    (data / "test.jsonl").write_text("".join(lines[:3]))
    asked = {"tasks": ["local_choice"], "data_dir": str(tmp_path / "data")}
    with pytest.raises(
        UserError,
        match=r"suite.data_dir=\S+data cannot be used: \S+local_choice "
        r"has no train.jsonl or .parquet$",
    ):
        harness.plan(context(**asked))
    (data / "train.jsonl").write_text("".join(lines[3:]))
    assert len(harness.plan(context(**asked))) == 3
    with pytest.raises(UserError, match=r"has no test\.jsonl"):
        harness.plan(context(**asked | {"tasks": ["local_rolling"]}))
    (data / "test.jsonl").write_text("{torn")
    harness.load_tasks.cache_clear()
    with pytest.raises(UserError, match=r"a file in .* cannot be read"):
        harness.plan(context(**asked))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": ["local_choise"]},
            r"suite.tasks=local_choise cannot be used: there is no such task; "
            r"did you mean local_choice",
        ),
        (
            {"include_path": "nowhere"},
            "suite.include_path=nowhere cannot be used: there is no such folder",
        ),
        ({"data_dir": "nowhere"}, "suite.data_dir=nowhere cannot be used: there is no such folder"),
        (
            {"chat_template": True},
            "suite.chat_template=true cannot be used: a run has no chat template",
        ),
        (
            {"tasks": ["local_generate"], "max_tokens": 256},
            "answers have up to 256 tokens, and the model's context is 256; set suite.max_tokens",
        ),
        (
            {"tasks": ["diffx_svamp"]},
            r"its data set https://\S+/svamp/test.jsonl cannot be read: "
            r".*DIR/diffx_svamp/test.jsonl \(or .parquet\)$",
        ),
        (
            {"tasks": ["absent"]},
            r"suite.tasks=absent cannot be used: its data set nobody/nothing/some "
            r"cannot be read: .*DIR/absent/dev.jsonl",
        ),
        ({"tasks": ["sampled"]}, "suite.tasks=sampled cannot be used: it samples its answers"),
        ({"tasks": ["broken"]}, "suite.tasks=broken cannot be used: building it failed with"),
        (
            {"tasks": ["needs_math"]},
            r"math_verify is not installed; run pip install 'diffx\[math\]'$",
        ),
        (
            {"tasks": ["needs_antlr"]},
            r"suite.tasks=needs_antlr cannot be used: .* needs antlr4-python3-runtime 4.11, "
            r"and Hydra 4.9; diffx_math",
        ),
    ],
)
def test_what_cannot_be_used(context, folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(
        harness_tasks, "TaskManager", partial(TaskManager, include_defaults=False)
    )  # lm-eval's own take seconds to find
    more = tmp_path / "more"
    more.mkdir()
    (more / "choice.yaml").write_text(CHOICE.format(folder=folder))
    (more / "generate.yaml").write_text(GENERATE.format(folder=folder))
    (more / "absent.yaml").write_text(
        "task: absent\ndataset_path: nobody/nothing\ndataset_name: some\n"
        "validation_split: dev\noutput_type: loglikelihood_rolling\n"
    )
    sampled = GENERATE.replace("do_sample: false", "do_sample: true, temperature: 0.7").replace(
        "local_generate", "sampled"
    )
    (more / "sampled.yaml").write_text(sampled.format(folder=folder))
    (more / "broken.yaml").write_text(
        CHOICE.format(folder=folder)
        .replace("local_choice", "broken")
        .replace("test_split: test", "test_split: none")
    )
    (more / "needs_math.yaml").write_text(
        "task: needs_math\ninclude: choice.yaml\nprocess_results: !function utils.score\n"
    )
    (more / "needs_antlr.yaml").write_text(
        "task: needs_antlr\ninclude: choice.yaml\nprocess_results: !function antlr.score\n"
    )
    (more / "utils.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")\n")
    (more / "antlr.py").write_text(
        "raise AssertionError('`sympy`, `math_verify` and "
        "`antlr4-python3-runtime==4.11` are required')\n"
    )
    made = context(
        **{"folder": more, "tasks": ["local_choice"]}
        | {key: value for key, value in options.items() if key != "include_path"}
    )
    made.suite.include_path = options.get("include_path", made.suite.include_path)
    with pytest.raises(UserError, match=message) as raised:
        harness.plan(made)
    assert "\n" not in str(raised.value)


def test_scripts_are_read_from_their_parquet_conversion(context, tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found old.py")
        return {"test": loaded}

    from datasets import Dataset

    loaded = Dataset.from_list([{"text": "a b"}])
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (tmp_path / "old.yaml").write_text(
        "task: old\ndataset_path: some/old\ndataset_name: part\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    )
    assert len(harness.plan(context(tasks=["old"], folder=tmp_path))) == 1
    assert asked[1:] == [
        ("some/old", None, {"data_dir": "part", "revision": "refs/convert/parquet"})
    ]


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (
            {"Body": "I have 2 pens", "Question": "How many?", "Answer": 2.0, "Equation": "2"},
            "I have 2 pens. How many?",
        ),
        ({"input": " How many? ", "target": 2.0}, "How many?"),
        ({"content": "How many?", "answer": "2", "steps": ["..."]}, "How many?"),
        ({"question": "How many?", "answer": "2"}, "How many?"),
        (
            {"problem": "How many?", "solution": "One and one make $\\boxed{2}$ of \\emph{them}."},
            "How many?",
        ),
        (
            {
                "table": "a | 1\nb | 2",
                "table_title": "Pens",
                "question": "Which is more?",
                "choices": ["a", "b"],
                "answer": "2",
            },
            'Read the following table regarding "Pens" and answer a question.\na | 1\nb | 2\n'
            "Which is more? Choose from: a, b.",
        ),
    ],
)
def test_rows_of_our_mathematics_tasks(row, question):
    from datasets import Dataset

    (found,) = rows(Dataset.from_list([row]))
    assert (
        found["question"] == question
        and float(found["answer"]) == 2
        and found.keys() == {"question", "answer"}
    )


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("18", " 14 + 9 = 23, less 5. The answer is 18.", True),
        ("18", " The answer is 18 books.\nThe answer is 19.", False),
        ("1234.0", " It is $1,234", True),
        ("-0.5", " The answer is -1/2.", True),
        ("3/4", " so \\boxed{0.75}", True),
        ("7", " first 7, then 8", False),
        ("7", " the answer is \\boxed{7}, I hope", True),
        ("yes", " The answer is Yes.", True),
        ("yes", " yes", False),
        ("5", "", False),
        ("5", " The answer is unknown.", False),
        ("\\frac{1}{2}", " The answer is $\\frac{1}{2}$.", True),
        ("7", " The answer is 3 + 4 = 7.", True),
        ("3", " The answer is 3 + 4 = 7.", False),
        ("3/4", " so \\boxed{\\frac{3}{4}}", True),
        ("-3/4", " so \\boxed{-\\dfrac{3}{4}}", True),
        ("0.75", " The answer is \\frac{3}{4}", True),
        ("25", " The answer is 25\\%.", True),
        ("25%", " The answer is 25 percent.", True),
        ("1.5", " The answer is 1 1/2.", True),
        ("1.5", " The answer is $1\\frac{1}{2}$.", True),
        ("1500", " The answer is 1.5e3.", True),
        ("1500", " The answer is $1.5 \\times 10^{3}$.", True),
        ("1500", " The answer is 1.5 \N{MULTIPLICATION SIGN} 10^3", True),
        ("-5", " The answer is \N{MINUS SIGN}5.", True),
        ("-5", " The answer is 5.", False),
        ("3", " we take 10-3", True),
        ("5", " The answer is $5 \\text{ cm}$.", True),
        ("Tuesday", " The answer is \\text{Tuesday}.", True),
        ("7", " The answer is **7**.", True),
        ("7", " **The answer is:** 7", True),
        ("7", " The answer is $\\mathbf{7}$.", True),
        ("yes", " The answer is yes, because it is.", True),
        ("yes", " The answer is yesterday.", False),
        ("4", "<think>The answer is 5? No.</think> The answer is 4.", True),
        ("4", "<think>The answer is 4.</think> The answer is 5.", False),
        ("100000", " The answer is 100009.", False),
        ("100000", " The answer is 100,000.", True),
        ("3.1416", " The answer is 3.14159.", True),
        ("5", " The answer is 5/0.", False),
        ("5", " The answer is 1e9999999999.", False),
        ("2.5", " The answer is 1e999.", False),
    ],
)
def test_final_answers(gold, response, right):
    assert matches(gold, response) is right


@pytest.mark.parametrize("part", ["1", "1 ", " ", "-", "1/", "\\frac{1}", "\\text{", ". ", "**"])
def test_grading_takes_time_linear_in_the_response(part):
    start = time.process_time()
    matches("5", part * 20_000)
    matches("yes", "answer is " + part * 20_000)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ("$x^2+2x+1$", " The answer is $(x+1)^2$.", True),
        ("\\sqrt{8}", " \\boxed{2\\sqrt{2}}", True),
        ("(1,2)", " The answer is (2, 1).", False),
        ("100000", " The answer is 100009.", False),
    ],
)
def test_final_answers_that_are_expressions(gold, response, right):
    pytest.importorskip("math_verify")
    from diffx.evaluation.expressions import score

    assert score({"answer": gold}, [response]) == {"exact_match": float(right)}


def test_a_number_is_not_left_to_math_verify(monkeypatch):
    def yes(*args, **options):
        return True

    fake = types.SimpleNamespace(LatexExtractionConfig=yes, parse=yes, verify=yes)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    monkeypatch.delitem(sys.modules, "diffx.evaluation.expressions", raising=False)
    score = importlib.import_module("diffx.evaluation.expressions").score
    monkeypatch.delitem(sys.modules, "diffx.evaluation.expressions")
    for gold, response, right in (
        ("100000", "100009", 0),
        ("3/4", "0.5", 0),
        ("3/4", "0.75", 1),
        ("x+1", "1+x", 1),
    ):
        assert score({"answer": gold}, [f" The answer is {response}."]) == {"exact_match": right}


def test_our_mathematics_tasks_by_generation(run, context, tmp_path):
    for task, row in (
        ("svamp", {"Body": "I have 2 pens.", "Question": "How many?", "Answer": 2.0}),
        ("mawps", {"input": "1 + 1?", "target": 2.0}),
    ):
        data = tmp_path / f"diffx_{task}"
        data.mkdir()
        (data / "test.jsonl").write_text(json.dumps(row) + "\n")
    made = context(
        tasks=["diffx_svamp", "diffx_mawps"], data_dir=str(tmp_path), shots=None, max_tokens=8
    )
    records, metrics = run(made)
    assert records[0]["prompts"][0].count("The answer is") == 4 and records[0]["prompts"][
        0
    ].endswith("Question: I have 2 pens. How many?\nAnswer:")
    assert (records[0]["by"]["task"], records[0]["by"]["shots"]) == (
        "diffx_svamp",
        4,
    ) and 0 < records[0]["scores"]["answer_tokens"] <= 24
    assert {name for group, name in metrics if group == "average"} == {"accuracy", "answer_tokens"}


def test_the_picture_shows_every_panel(context, summarize, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.append(figure))
    made = context(tasks=TASKS)
    summarize(
        harness, made, list(harness.answer(made, harness.plan(made))), tmp_path / "picture.png"
    )
    panels = {
        axes.get_title("left").split(" (")[0]: axes
        for axes in drawn[0].axes
        if axes.get_title("left")
    }
    assert panels.keys() >= {
        "share",
        "tokens",
        "brier_score",
        "word_perplexity",
        "bits_per_byte",
        "nats",
    }
    assert {"acc", "acc_norm"} <= {
        text.get_text() for text in panels["share"].get_legend().get_texts()
    }
