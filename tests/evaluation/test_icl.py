import gzip
import json
import random
import re
from collections import Counter
from itertools import chain

import datasets
import pytest
import torch
from matplotlib.image import imread

from diffx.config import UserError
from diffx.config.data import BpeTokenizer
from diffx.config.eval import EvalJob
from diffx.config.suite import IclSuite
from diffx.console import Reporter
from diffx.data.tokenizers import make_tokenizer
from diffx.evaluation import icl, icl_tasks
from diffx.evaluation.icl_prompts import Prompts, likeliest
from diffx.evaluation.icl_tasks import Task, alternate
from diffx.evaluation.suite import Context

COLOURS = ("red", "red wine", "blue", "green")


@pytest.fixture
def intents(tmp_path):
    """60 texts with four labels, one of which begins like another."""
    path = tmp_path / "intents.jsonl.gz"
    rows = [{"text": f"no {i} {{text}}", "label": COLOURS[i % 4]} for i in range(60)]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def context(tiny, tmp_path):
    def make(lm=None, limit=None, seed=0, **options):
        suite = IclSuite(name="icl", **options)
        return Context(
            EvalJob(checkpoint="x", suite=suite, limit=limit, seed=seed),
            lm or tiny(),
            tmp_path,
            Reporter(),
        )

    return make


def test_the_layout_that_the_config_shows_is_read(context, tmp_path):
    (shown,) = re.findall(r"^ +(\{.+\})$", IclSuite.__doc__, re.MULTILINE)
    (tmp_path / "mails.jsonl").write_text(f"{shown}\n" * 3 + shown.replace("its class", "other"))
    examples = icl.plan(context(tasks=[str(tmp_path / "mails.jsonl")], queries=1))
    assert {(example.data["text"], *example.data["labels"]) for example in examples} == {
        ("a mail", "its class", "other")
    }


def sums(lm, context, query, labels):
    """Every label's log-probability by a full forward pass over everything before it."""
    found = []
    for label in labels:
        ids = torch.tensor([context + query + label])
        steps = lm.model(ids)[0].float().log_softmax(-1)[-len(label) - 1 : -1]
        found.append(steps[range(len(label)), label].sum().item())
    return found


@pytest.mark.parametrize("shared", [[], list(b"some demonstrations of some length ")])
@pytest.mark.parametrize("kind", ["transformer", "diff_v1", "diff_v2"])
@torch.no_grad()
def test_the_label_is_the_one_that_full_forward_passes_find(tiny, kind, shared):
    lm = tiny(kind)
    queries = [list(f"query number {n}".encode() * (1 + n % 3)) for n in range(6)]
    for names in ((" ax", " ab", " by", " bz", "cde", "cxe"), ("a", "bc", "def", "b", "ghi")):
        labels = [list(name.encode()) for name in names]
        found = {
            index: (label, score)
            for index, label, score in likeliest(lm, shared, queries, labels, batch=7)
        }
        expected = [sums(lm, shared, query, labels) for query in queries]
        assert sorted(found) == list(range(6))
        for index, own in enumerate(expected):
            assert found[index][0] == own.index(max(own))
            assert found[index][1] == pytest.approx(max(own), abs=1e-4)
        firsts = [sums(lm, shared, query, [label[:1] for label in labels]) for query in queries]
        by_first = [own.index(max(own)) for own in firsts]
        assert len(names) == 5 or by_first != [
            found[index][0] for index in range(6)
        ]  # the first tokens alone would not do


def test_a_sliding_window_gives_the_same(wrap, tokenizer):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = MistralConfig(
        vocab_size=tokenizer.vocab_size, sliding_window=8, initializer_range=0.2, **shape
    )
    lm = wrap(MistralForCausalLM(config))
    shared, labels = list(b"demonstrations "), [list(b" a"), list(b" bcd"), list(b" be")]
    queries = [list(f"{'x' * n} query".encode()) for n in range(5)]
    for index, label, score in likeliest(lm, shared, queries, labels):
        logits = [
            lm.model(torch.tensor([shared + queries[index] + own]))
            .logits[0]
            .float()
            .log_softmax(-1)
            for own in labels
        ]
        full = [
            steps[-len(own) - 1 : -1][range(len(own)), own].sum().item()
            for steps, own in zip(logits, labels, strict=True)
        ]
        assert label == full.index(max(full)) and score == pytest.approx(max(full), abs=1e-4)


def test_prompts_read_as_the_template(tiny):
    lm = tiny()
    prompts = Prompts(lm, "Say: {text}\nColour: {label}\n\n", ["red", "red wine"])
    (query,) = prompts.queries(["{label} {text}"])
    assert lm.decode(query) == "Say: {label} {text}\nColour:"
    assert [lm.decode(label) for label in prompts.labels] == [" red\n\n", " red wine\n\n"]
    (first, second) = prompts.demonstrations([("x", "red wine"), ("y", "red")])
    assert lm.decode(first + second) == "Say: x\nColour: red wine\n\nSay: y\nColour: red\n\n"
    room = len(lm.prefix) + len(first) + len(second) + len(query) + len(" red wine\n\n")
    rows, queries = [("x", "red wine"), ("y", "red"), ("z", "red")], [("{label} {text}", "red")]
    assert [
        prompts.room(rows, queries, n)
        for n in (room, room - 1, room - len(second) - len(first) - 1)
    ] == [2, 1, -1]


@pytest.mark.parametrize(
    ("template", "head"),
    [("Text: {text}\nLabel: {label}\n\n", "Text: is it\nLabel:"), ("{text} ({label}\n", "is it (")],
)
def test_pieces_make_up_the_tokens_of_the_whole_prompt(template, head):
    words = ["Play the record. ", "What is it like?\n\n", "Label: add to a list\n\nText: ", " (x\n"]
    lm = make_tokenizer(BpeTokenizer(vocab_size=290), words * 20)
    lm.suffix = []  # as that of a model without a chat template
    rows = [("Play it", "add to a list"), ("What, the record?", "play"), ("add", "what is it")]
    prompts = Prompts(lm, template, ["add to a list", "play", "what is it"])
    (query,) = prompts.queries(["is it"])
    whole = (
        "".join(template.replace("{text}", text).replace("{label}", label) for text, label in rows)
        + head
    )
    assert [*chain.from_iterable(prompts.demonstrations(rows)), *query] == lm.encode(whole)
    assert len(query) < len(head)  # not bytes


def test_demonstrations_are_nested_and_queries_stay(context, intents):
    def prompts(**options):
        examples = icl.plan(context(tasks=str(intents), shots=[1, 2, 3], **options))
        by_shots = {
            shots: [e for e in examples if e.data["by"]["shots"] == shots] for shots in (1, 2, 3)
        }
        queries = [
            [(e.data["text"], e.data["label"]) for e in by_shots[shots]] for shots in (1, 2, 3)
        ]
        assert queries[0] == queries[1] == queries[2]
        return queries[0], [by_shots[shots][0].data["demonstrations"] for shots in (1, 2, 3)]

    queries, (one, two, three) = prompts(queries=10)
    assert (
        len(queries) == 10
        and [len(one), len(two), len(three)] == [1, 2, 3]
        and one == three[:1]
        and two == three[:2]
    )
    assert not {text for text, _ in queries} & {text for text, _ in three}
    assert (
        prompts(queries=20)[0][:10] == queries and prompts(queries=20)[1][2] == three
    )  # more queries change nothing
    assert prompts(queries=10, limit=3)[0] == queries[:3]
    assert prompts(queries=10, seed=1)[0] != queries
    _, (one, two, three) = prompts(queries=10, per_class=True, template="{text}{label}")
    assert one == three[:4] and two == three[:8]
    for shots, rows in ((1, one), (2, two), (3, three)):
        assert Counter(label for _, label in rows) == dict.fromkeys(COLOURS, shots)


def test_null_doubles_until_the_context_is_full(context, intents, tiny):
    lm = tiny()
    tried = context(lm, tasks=str(intents), template="{text}{label}\n", queries=2)
    shots = list(dict.fromkeys(e.data["by"]["shots"] for e in icl.plan(tried)))
    assert shots == [1, 2, 4, 8]  # of about 17 bytes each, in 256
    examples = icl.plan(
        context(
            lm, tasks=str(intents), template="{text}{label}\n", queries=2, shots=[0], per_class=True
        )
    )
    assert len(examples) == 2 and examples[0].data["demonstrations"] == []
    for options, named in (
        (
            {"shots": [1, 16]},
            "suite.shots=1,16 cannot be used: intents has 13 demonstrations that fit",
        ),
        ({"shots": [4], "per_class": True}, "has 3 demonstrations a class"),
        (
            {"template": "{text}" * 20 + "{label}"},
            "suite.shots=null cannot be used: intents has 0 demonstrations",
        ),
        ({"queries": 60}, "suite.queries=60 cannot be used: intents has 60 texts"),
    ):
        with pytest.raises(UserError) as error:
            icl.plan(
                context(
                    lm,
                    **(
                        {"tasks": str(intents), "template": "{text}{label}\n", "queries": 2}
                        | options
                    ),
                )
            )
        assert named in str(error.value) and "\n" not in str(error.value)


def test_a_class_that_runs_out_ends_the_shots(context, tmp_path):
    path = tmp_path / "few.jsonl"
    rows = [{"text": f"t{i}", "label": "rare" if i < 5 else "often"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = icl.plan(
        context(tasks=str(path), template="{text}{label}\n", queries=2, per_class=True)
    )
    assert max(e.data["by"]["shots"] for e in examples) in (2, 4)
    for example in examples:
        counts = Counter(label for _, label in example.data["demonstrations"])
        assert counts["rare"] == counts["often"] == example.data["by"]["shots"]


def test_alternating_classes_take_turns():
    rows = [(str(i), "ab"[i % 3 == 0]) for i in range(9)]
    mixed = alternate(rows, random.Random(0))
    assert sorted(mixed) == sorted(rows)
    assert all({mixed[i][1], mixed[i + 1][1]} == {"a", "b"} for i in (0, 2, 4))
    assert [label for _, label in mixed[6:]] == ["a", "a", "a"]


def test_synthetic_tells_labels_by_demonstrations_alone(context):
    examples = icl.plan(context(shots=[8], queries=50, labels=3))
    rows = examples[0].data["demonstrations"]
    again = icl.plan(context(shots=[8], queries=50, labels=3))
    assert (
        rows
        == again[0].data["demonstrations"]
        != icl.plan(context(shots=[8], queries=50, labels=3, seed=1))[0].data["demonstrations"]
    )
    mapping = dict(rows)
    assert all(mapping.get(e.data["text"], e.data["label"]) == e.data["label"] for e in examples)
    assert (
        len({e.data["label"] for e in examples}) == 3
        and len({e.data["text"] for e in examples}) == 12
    )


def test_hub_tasks_through_datasets(context, monkeypatch):
    asked = []

    def load(name, subset, revision, split):
        asked.append((name, subset, revision, split))
        labels = datasets.ClassLabel(names=["oos", "get_weather", "play"])
        features = datasets.Features({"text": datasets.Value("string"), "intent": labels})
        texts = [f"{split} {i}" for i in range(30)]
        return datasets.Dataset.from_dict(
            {"text": texts, "intent": [i % 3 for i in range(30)]}, features=features
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    made = context(tasks="clinc150", shots=[2], queries=100)
    examples = icl.plan(made)
    assert asked == [
        ("clinc/clinc_oos", "plus", None, "train"),
        ("clinc/clinc_oos", "plus", None, "test"),
    ]
    assert len(examples) == 20 and examples[0].data["labels"] == ["get weather", "play"]
    assert all(e.data["text"].startswith("test") for e in examples) and all(
        t.startswith("train") for t, _ in examples[0].data["demonstrations"]
    )
    assert len(made.sources["clinc150"]) == 64


def test_what_cannot_be_used_is_one_line(context, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    good, lines = '{"text": "a", "label": "b"}\n', tmp_path / "x.jsonl"
    other = tmp_path / "other" / "x.jsonl"
    other.parent.mkdir()
    for content, tasks, named in (
        (good, ["trec"], "suite.tasks=trec cannot be used: CogComp/trec cannot be fetched"),
        (
            good,
            ["nothing.jsonl"],
            "suite.tasks=nothing.jsonl cannot be used: there is no such file; it must be trec,",
        ),
        (good + '{"text": "a"}', [str(lines)], 'line 2 is not {"text": "...", "label": "..."}'),
        ("nonsense", [str(lines)], f"suite.tasks={lines} cannot be used"),
        (good, [str(lines)], "suite.tasks=x cannot be used: its texts have 1 labels"),
        (good, [str(lines), str(other)], "two tasks would be called x"),
    ):
        for path in (lines, other):
            path.write_text(content)
        with pytest.raises(UserError) as error:
            icl.plan(context(tasks=tasks))
        assert named in str(error.value) and "\n" not in str(error.value)
    lines.with_suffix(".jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="JSON lines"):
        icl.plan(context(tasks=str(lines.with_suffix(".jsonl.gz"))))


def test_records_metrics_and_picture(context, summarize, tmp_path, intents):
    made = context(
        tasks=["synthetic", str(intents)],
        shots=[1, 4],
        queries=12,
        template="{text}:{label}\n",
        labels=3,
    )
    examples = icl.plan(made)
    assert len({e.id for e in examples}) == len(examples) == 48
    records = sorted(
        icl.answer(made, examples), key=lambda record: [e.id for e in examples].index(record["id"])
    )
    json.dumps(records)
    part = list(icl.answer(made, examples[20:30]))  # taken up in the middle
    assert {r["id"]: r["predicted"] for r in part} == {
        r["id"]: r["predicted"] for r in records[20:30]
    }
    assert [r["id"] for r in records if "demonstrations" in r] == [
        "synthetic/1/0",
        "synthetic/4/0",
        "intents/1/0",
        "intents/4/0",
    ]
    for record in records:
        assert record["scores"] == {"accuracy": float(record["label"] == record["predicted"])}
    path = tmp_path / "icl.png"
    metrics = summarize(icl, made, records, path)
    accuracy = sum(r["scores"]["accuracy"] for r in records[:12]) / 12
    assert metrics["synthetic 1 shots", "accuracy"]["value"] == pytest.approx(accuracy)
    both = metrics["synthetic", "accuracy"]
    assert both["n"] == 12 and both["value"] == pytest.approx(
        sum(r["scores"]["accuracy"] for r in records[:24]) / 24
    )
    assert both["published"] == {"guessing among 3 labels": pytest.approx(1 / 3)}
    assert (
        metrics["average", "accuracy"]["n"] == 24
        and metrics["average", "accuracy"]["aggregate"] == "mean of means"
    )
    assert imread(path).std() > 0.05


def test_a_task_with_a_test_split_keeps_its_demonstrations():
    task = Task(
        "t",
        ["a", "b"],
        [(str(i), "ab"[i % 2]) for i in range(10)],
        [(f"q{i}", "ab"[i % 2]) for i in range(5)],
    )
    few, many = task.draw(0, 2, by_class=False), task.draw(0, 9, by_class=False)
    assert few[0] == many[0][:2] and len(many[0]) == 5 and few[1] == many[1] and len(many[1]) == 10
    assert set(icl_tasks.HUB_TASKS) == {"trec", "trec_fine", "banking77", "clinc150"}
