"""Summaries and answers: tasks, their samples, prompts, records, and the picture."""

import gzip
import json
import re
import sys
import zipfile
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

from diffx.config import UserError
from diffx.config.eval import EvalJob
from diffx.config.suite import HallucinationSuite
from diffx.console import Reporter
from diffx.evaluation import hallucination
from diffx.evaluation.hallucination import answer, fit, plan
from diffx.evaluation.suite import Context

QUESTIONS = [
    {
        "context": f"The box number {n} is red.",
        "question": f"Which colour is box {n}?",
        "answers": ["red", "it is red"],
    }
    for n in range(9)
]
SUMMARIES = [
    {"document": f"It rained on day {n}, and nobody came. " * 3, "reference": f"Rain on day {n}."}
    for n in range(9)
]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)
    return str(path)


@pytest.fixture
def ask(tiny, tmp_path):
    """Make a context of a tiny bytes model: ``ask([tasks], limit=2, samples=...)``."""

    def make(tasks, kind="transformer", limit=None, seed=0, **settings):
        suite = HallucinationSuite(name="hallucination", tasks=tasks, **settings)
        return Context(
            EvalJob(suite=suite, limit=limit, seed=seed, batch=4),
            tiny(kind),
            tmp_path,
            Reporter(quiet=True),
        )

    return make


@pytest.fixture
def both(tmp_path):
    return [
        write(tmp_path / "boxes.jsonl", QUESTIONS),
        write(tmp_path / "weather.jsonl.gz", SUMMARIES),
    ]


def test_the_plan(ask, both):
    examples = plan(ask(both, samples=6))
    assert [example.data["task"] for example in examples] == ["boxes"] * 6 + ["weather"] * 6
    assert len({example.id for example in examples}) == 12
    ids = [example.id for example in examples]
    assert [example.id for example in plan(ask(both, kind="diff_v1", samples=6))] == ids, (
        "the same for every model"
    )
    assert [example.id for example in plan(ask(both, limit=2))] == ids[:2] + ids[6:8], (
        "a limit takes the first"
    )
    assert [example.id for example in plan(ask(both, samples=6, seed=1))] != ids
    assert set(ids) < {example.id for example in plan(ask(both))}


def test_the_layouts_that_the_docstring_shows_are_read(ask, tmp_path):
    shown = re.findall(r"^ +(\{.+\})$", HallucinationSuite.__doc__, re.MULTILINE)
    tasks = [
        write(tmp_path / f"{number}.jsonl", [json.loads(line)]) for number, line in enumerate(shown)
    ]
    assert [example.data["kind"] for example in plan(ask(tasks))] == ["summary", "question"]
    assert [example.data["references"] for example in plan(ask(tasks))] == [
        ["its summary"],
        ["right", "right too"],
    ]


def test_sources_are_of_the_rows(ask, both, tmp_path):
    first = ask(both)
    plan(first)
    write(tmp_path / "boxes.jsonl", QUESTIONS[1:])
    second = ask(both)
    plan(second)
    assert set(first.sources) == {"boxes", "weather"}
    assert (
        first.sources["weather"] == second.sources["weather"]
        and first.sources["boxes"] != second.sources["boxes"]
    )


def test_answers_are_recorded(ask, both):
    context = ask(both, limit=3, max_tokens=8)
    records = {record["id"]: record for record in answer(context, plan(context))}
    assert len(records) == 6 and json.loads(json.dumps(records)) == records
    for record in records.values():
        question = record["by"]["task"] == "boxes"
        assert set(record["scores"]) == {"answer_tokens", "empty", "text_seen"} | (
            {"exact_match", "f1"} if question else {"rouge1", "rouge2", "rougeL"}
        )
        assert (
            record["scores"]["text_seen"] == 1 and record["scores"]["answer_tokens"] <= 8 * 3
        )  # a byte that is no character is three
        assert record["prompt"].startswith(
            "Text: The box number" if question else "It rained on day"
        )
        assert not question or record["question"] in record["prompt"]
        assert record["references"] == (
            ["red", "it is red"] if question else [record["references"][0]]
        )


def said(monkeypatch, texts):
    monkeypatch.setattr(
        hallucination,
        "generations",
        lambda lm, prompts, max_tokens, batch: zip(range(len(prompts)), texts, strict=False),
    )


def test_an_answer_ends_with_its_line_once_it_has_begun(ask, both, monkeypatch):
    context = ask(both[:1])
    said(monkeypatch, ["\n red\nQuestion: and the next?", "blue", " \n\n", "It is red."])
    records = list(answer(context, plan(context)[:4]))
    assert [record["answer"] for record in records] == ["red", "blue", "", "It is red."]
    assert [record["scores"]["exact_match"] for record in records] == [1, 0, 0, 1]
    assert [record["scores"]["empty"] for record in records] == [0, 0, 1, 0]


def test_a_summary_ends_with_its_paragraph(ask, both, monkeypatch):
    context = ask(both[1:])
    examples = plan(context)[:1]
    said(monkeypatch, ["\n\n" + examples[0].data["references"][0] + "\nIndeed.\n\nAnother text"])
    (record,) = answer(context, examples)
    assert record["answer"].endswith("Indeed.") and 0.8 < record["scores"]["rougeL"] < 1


@pytest.mark.parametrize("length", [100, 180, 213, 400, 5000])
@pytest.mark.parametrize("letter", ["a", "é", "€"])
def test_a_long_text_loses_its_middle(tiny, length, letter):
    lm = tiny("transformer")
    text = "START" + letter * length + "END"
    prompt, seen = fit(
        lm, {"kind": "question", "text": text, "question": "Who came?"}, max_tokens=32
    )
    used = len(lm.prefix) + len(lm.encode(prompt)) + 32
    assert used <= lm.context == 256
    assert prompt.startswith("Text: START") and prompt.endswith(
        "END\n\nQuestion: Who came?\n\nAnswer in a few words:"
    )
    assert "\N{REPLACEMENT CHARACTER}" not in prompt
    if "[...]" in prompt:
        assert used > 256 - 8, "no more is left out than must be"
        before, after = prompt.split("\n[...]\n")
        assert (
            abs(before.count(letter) - after.count(letter)) < 25
        )  # halves, but for START, END and the question
        assert seen == pytest.approx((before + after).count(letter) / length, abs=0.1) and seen < 1
    else:
        assert seen == 1 and text in prompt


def test_figures(ask, both, summarize, monkeypatch):
    context = ask(both)
    said(monkeypatch, ["red", "red", "a red box"] + [""] * 6)
    boxes = [example for example in plan(context) if example.data["task"] == "boxes"]
    rows = summarize(hallucination, context, list(answer(context, boxes)))
    metrics = {name: row for (label, name), row in rows.items() if label == "boxes"}
    assert metrics["exact_match"]["value"] == pytest.approx(2 / 9) and metrics["empty"][
        "value"
    ] == pytest.approx(6 / 9)
    assert (
        metrics["distinct_1"]["value"] == pytest.approx(3 / 5) and metrics["distinct_1"]["n"] == 3
    ), "of the answers that say something"
    assert "unusable_verdicts" not in metrics and "faithful" not in metrics


def judged(group, kind, verdicts):
    scores = {"f1": 0.4} if kind == "question" else {"rougeL": 0.2}
    return [
        {
            "id": f"{group}/{n}",
            "by": {"task": group},
            "answer": f"a b {n}",
            "scores": {"faithful": v, **scores},
            "verdict": {"judge": "j", "faithful": bool(v)},
        }
        for n, v in enumerate(verdicts)
    ]


def test_the_picture(ask, summarize, tmp_path):
    context = ask(["boxes"])
    records = judged("xsum", "summary", [1, 0, 1, 1]) + judged("qasper", "question", [0, 0, 1, 0])
    metrics = summarize(hallucination, context, records, tmp_path / "picture.png")
    assert list(dict.fromkeys(label for label, _ in metrics)) == ["xsum", "qasper", "average"]
    faithful, average = metrics["xsum", "faithful"], metrics["average", "faithful"]
    assert sorted(faithful["published"].values()) == [0.44, 0.53]
    assert (average["value"], average["n"]) == (0.5, 8) and ("average", "f1") not in metrics
    wide = imread(tmp_path / "picture.png")
    records = [{**record, "scores": {"f1": 0.5}} for record in records]
    summarize(hallucination, context, records, tmp_path / "unjudged.png")
    narrow = imread(tmp_path / "unjudged.png")
    assert narrow.shape[1] < wide.shape[1], "one panel less"
    assert min(wide.std(), narrow.std()) > 0.05


def test_rows_as_on_the_hub(ask, tmp_path):
    write(tmp_path / "cnn_dm.jsonl", [{"article": "Long.", "highlights": "Short.", "id": "1"}])
    write(
        tmp_path / "hotpotqa.jsonl.gz",
        [{"context": "Text.", "input": "Who?", "answers": ["She"], "_id": "2"}],
    )
    examples = plan(ask(["cnn_dm", "hotpotqa"], data_dir=str(tmp_path)))
    assert [example.data for example in examples] == [
        {"task": "cnn_dm", "kind": "summary", "text": "Long.", "references": ["Short."]},
        {
            "task": "hotpotqa",
            "kind": "question",
            "text": "Text.",
            "question": "Who?",
            "references": ["She"],
        },
    ]


def test_the_hub_is_asked_for_what_it_has(ask, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(
            "data/qasper.jsonl",
            json.dumps({"context": "Text.", "input": "Who?", "answers": ["She"]}) + "\n",
        )
    asked = []

    def download(*words, **options):
        asked.append((*words, options))
        return str(tmp_path / "data.zip")

    def load_dataset(*words, **options):
        asked.append((*words, options))
        return [{"document": "Long.", "summary": "Short."}]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [example.data["text"] for example in plan(ask(["xsum", "qasper"]))] == ["Long.", "Text."]
    assert asked == [
        ("EdinburghNLP/xsum", None, {"split": "test", "revision": "refs/convert/parquet"}),
        ("zai-org/LongBench", "data.zip", {"repo_type": "dataset"}),
    ]


@pytest.mark.parametrize("task", ["xsum", "qasper"])
def test_the_hub_out_of_reach(ask, task):
    with pytest.raises(
        UserError,
        match=rf"suite\.tasks={task} .*cannot be fetched: .+ suite\.data_dir .*{task}\.jsonl",
    ) as error:
        plan(ask([task]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"text": "x", "label": "y"}],
            ["row 1", "'text', 'label'", '"context", "question", "answers"'],
        ),
        ([QUESTIONS[0], {"context": "x", "question": "y"}], ["row 2"]),
        ([{"document": 3, "reference": "y"}], ["row 1", "'document'"]),
        ([{"context": "x", "question": "y", "answers": [1]}], ["row 1"]),
        ([["x", "y"]], ["row 1", "no JSON object"]),
        (
            [{"document": " ", "reference": "y"}, {"document": "x", "reference": ""}],
            ["no row with a text and a reference"],
        ),
        ([{"document": "a \ud800", "reference": "y"}], ["row 1", "surrogate"]),
        ([], ["no row"]),
    ],
)
def test_rows_of_another_form(ask, tmp_path, rows, words):
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError) as error:
        plan(ask([path]))
    assert all(
        word in str(error.value) for word in [f"suite.tasks={path}", *words]
    ) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(ask, both, tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes((tmp_path / "weather.jsonl.gz").read_bytes()[:-20])
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    (tmp_path / "text.jsonl").write_text("no json")
    write(tmp_path / "table.csv", [])
    for name in ("cut.jsonl.gz", "latin.jsonl", "text.jsonl", "table.csv", "none.jsonl"):
        with pytest.raises(UserError, match=name) as error:
            plan(ask([str(tmp_path / name)]))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"suite\.data_dir=.* has no xsum\.jsonl"):
        plan(ask(["xsum"], data_dir=str(tmp_path)))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="two tasks would be called boxes"):
        plan(ask([both[0], write(tmp_path / "other" / "boxes.jsonl.gz", QUESTIONS)]))


def test_a_model_with_no_room(ask, both, tmp_path):
    with pytest.raises(UserError, match=r"suite\.max_tokens=240 .* trained on 256"):
        plan(ask(both, max_tokens=240))
    long = write(tmp_path / "long.jsonl", [QUESTIONS[0] | {"question": "Why? " * 60}])
    with pytest.raises(UserError, match=r"long/\w+ and its answer take \d+ tokens"):
        plan(ask([long]))
