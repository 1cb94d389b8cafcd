"""The retrieval suite: what is asked, how answers are scored, what is refused."""

import re
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from diffx.config import UserError
from diffx.config.data import TextData
from diffx.config.eval import EvalJob
from diffx.config.suite import RetrievalSuite
from diffx.console import Reporter
from diffx.evaluation import retrieval
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context
from diffx.loading import load
from diffx.results import plot

QUESTION = re.compile(r" What (?:is|are) the magic numbers? of ([\w, ]+)\? ")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        (" 1234567.", ["1234567"]),
        (" They are 1,234,567 and 89.", ["1234567", "89"]),
        (" 1234567,7654321", ["1234567", "7654321"]),
        (" 12,34", ["12", "34"]),
    ],
)
def test_numbers_of_an_answer(text, numbers):
    assert retrieval.numbers_in(text) == numbers


@pytest.fixture
def context(tiny, tmp_path, documents):
    def make(lm=None, limit=None, seed=0, **options):
        suite = RetrievalSuite(
            name="retrieval",
            **{
                "cases": [[2, 1], [3, 2]],
                "lengths": [400, 500],
                "depths": [0.0, 1.0],
                "samples": 3,
                "digits": 3,
            }
            | options,
        )
        job = EvalJob(
            checkpoint="x", suite=suite, data=TextData(path=str(documents)), limit=limit, seed=seed
        )
        return Context(job, lm or tiny(), tmp_path, Reporter())

    return make


def read(prompt):
    """The needles of a prompt and the cities that it asks for, as a reader finds them."""
    text, cities, _ = QUESTION.split(prompt)
    needles = dict(re.findall(r"The magic number of (\w+) is (\d+)\.", text))
    return needles, re.split(r", | and ", cities)


@pytest.fixture
def oracle(monkeypatch):
    """Answer prompts by ``say`` of the right numbers; prefer the number ``like`` chooses."""

    def use(say, like=lambda needles, city: needles[city]):
        def generations(lm, prompts, max_tokens, stop=(), batch="auto"):
            for index, prompt in reversed(list(enumerate(prompts))):
                needles, cities = read(lm.decode(prompt[1:]))
                yield index, say([needles[city] for city in cities])[:max_tokens]

        def loglikelihoods(lm, requests, batch="auto", progress=None):
            for before, behind in requests:
                needles, (city,) = read(lm.decode([*before[1:], *behind]))
                number = lm.decode(behind).rpartition(" ")[2]
                yield -1.0 if number == like(needles, city) else -2.0, False

        monkeypatch.setattr(retrieval, "generations", generations)
        monkeypatch.setattr(
            retrieval,
            "loglikelihoods",
            lambda *args, **kwargs: list(loglikelihoods(*args, **kwargs)),
        )

    return use


def scores(context):
    records = list(retrieval.answer(context, retrieval.plan(context)))
    tasks = dict.fromkeys(record["by"]["task"] for record in records)
    return {
        task: [r["scores"] for r in records if r["by"]["task"] == task] for task in tasks
    }, records


def test_prompts_are_as_planned(context):
    made = context()
    examples = retrieval.plan(made)
    assert len({example.id for example in examples}) == len(examples) == 2 * 2 * 2 * 3
    records = list(retrieval.answer(made, examples))
    assert {record["id"] for record in records} == {example.id for example in examples}
    assert [record["by"]["length"] for record in records] == [500] * 12 + [400] * 12, (
        "the longest first"
    )
    for record in records:
        needles, cities = read(record["prompt"])
        assert needles == record["needles"] and len(needles) == int(record["by"]["task"][2])
        assert [needles[city] for city in cities] == record["answers"] and len(cities) == int(
            record["by"]["task"][-1]
        )
        place = record["prompt"].index(f"The magic number of {cities[0]} is")
        assert (
            place == 0
            if record["by"]["depth"] == 0
            else record["prompt"][place:].startswith(QUESTION.split(record["prompt"])[0][place:])
        )
        rest = len(" and ".join(record["answers"])) + 2
        assert record["tokens"] == 1 + len(record["prompt"].encode())
        assert record["by"]["length"] - 12 <= record["tokens"] + rest <= record["by"]["length"]


@pytest.mark.parametrize(
    ("say", "one", "two"),
    [
        (lambda numbers: f" {' and '.join(numbers)}. More text", 1.0, 1.0),
        (lambda numbers: f": {', '.join(numbers)}", 1.0, 1.0),
        (lambda numbers: f" {' and '.join(reversed(numbers))}.", 1.0, 0.0),
        (lambda numbers: f" {numbers[0]} and 1.", 1.0, 0.5),
        (lambda numbers: f" {numbers[0]}7.", 0.0, 0.0),
        (lambda numbers: " nothing", 0.0, 0.0),
    ],
)
def test_greedy_numbers_count_in_the_order_asked(context, oracle, say, one, two):
    oracle(say)
    found, _ = scores(context())
    assert {score["greedy"] for score in found["N=2 R=1"]} == {one}
    assert {score["greedy"] for score in found["N=3 R=2"]} == {two}


def test_constrained_numbers(context, oracle):
    oracle(lambda numbers: "", like=lambda needles, city: needles[city])
    found, _ = scores(context())
    assert {score["constrained"] for group in found.values() for score in group} == {1.0}
    oracle(
        lambda numbers: "", like=lambda needles, city: min(needles.values())
    )  # the same number for every city
    found, records = scores(context())
    right = [
        record["answers"].count(min(record["needles"].values())) / len(record["answers"])
        for record in records
    ]
    assert [record["scores"]["constrained"] for record in records] == right


@pytest.mark.parametrize("kind", ["transformer", "diff_v1"])
@torch.no_grad()
def test_constrained_choice_is_that_of_full_forward_passes(context, tiny, kind):
    lm = tiny(kind)
    made = context(lm, cases=[[3, 2]], lengths=[300], samples=1)
    for record in retrieval.answer(made, retrieval.plan(made)):
        text, cities, _ = QUESTION.split(record["prompt"])
        for chosen, city in zip(record["chosen"], re.split(r", | and ", cities), strict=True):
            likelihoods = {}
            for number in record["needles"].values():
                whole = (
                    f"{text} What is the magic number of {city}? "
                    f"The magic number of {city} is {number}"
                )
                ids = torch.tensor([[lm.tokenizer.eot_id, *lm.encode(whole)]])
                steps = lm.model(ids)[0, :-1].double().log_softmax(-1)
                likelihoods[number] = steps.gather(1, ids[0, 1:, None])[-len(number) :].sum().item()
            assert chosen == max(likelihoods, key=likelihoods.get)


def test_examples_do_not_depend_on_the_model_but_on_the_seed(context, hf_folder):
    ours = context(cases=[[1, 1]], lengths=[150])
    theirs = context(LanguageModel(load(str(hf_folder))), cases=[[1, 1]], lengths=[150])
    other = context(cases=[[1, 1]], lengths=[150], seed=1)
    plans = [retrieval.plan(made) for made in (ours, theirs, other)]
    assert (
        [example.id for example in plans[0]]
        == [example.id for example in plans[1]]
        == [example.id for example in plans[2]]
    )
    needles = [
        [retrieval.needles_of(made, example) for example in plan]
        for made, plan in zip((ours, theirs, other), plans, strict=True)
    ]
    assert needles[0] == needles[1] != needles[2]
    assert len(set(map(str, needles[0]))) == len(needles[0])


def test_a_limit_is_that_of_each_cell(context):
    examples = retrieval.plan(context(limit=2))
    cells = Counter(
        (example.data["task"], example.data["length"], example.data["depth"])
        for example in examples
    )
    assert cells == dict.fromkeys(product(("N=2 R=1", "N=3 R=2"), (400, 500), (0.0, 1.0)), 2)
    assert {example.data["number"] for example in examples} == {0, 1}


def test_default_lengths_are_the_context_and_its_parts(context, tiny):
    lm = tiny()
    lm.context = 1000
    assert sorted(
        {
            example.data["length"]
            for example in retrieval.plan(context(lm, lengths=None, cases=[[1, 1]]))
        }
    ) == [250, 500, 1000]
    lm.context = 65536
    assert (
        max(example.data["length"] for example in retrieval.plan(context(lm, lengths=None))) == 4096
    )


def test_default_lengths_that_are_too_short_are_left_out(context, tiny, monkeypatch):
    lm, warnings = tiny(), []
    monkeypatch.setattr(Reporter, "warn", lambda self, text: warnings.append(text))
    lm.context = 400
    assert {example.data["length"] for example in retrieval.plan(context(lm, lengths=None))} == {
        400
    }
    (warning,) = warnings
    assert re.fullmatch(
        r"suite\.lengths=null leaves out 100 and 200: 3 needles, "
        r"question and answer take 2\d\d tokens",
        warning,
    )
    lm.context = 64
    with pytest.raises(
        UserError,
        match=r"suite\.lengths=null cannot be used with tiny: .+ is 64; .+ suite\.cases, .+ "
        r"suite\.lengths$",
    ):
        retrieval.plan(context(lm, lengths=None))


def test_refusals(context, wrap, tiny):
    with pytest.raises(
        UserError,
        match=r"suite\.lengths=200 cannot be used: 3 needles, "
        r"question and answer take (\d+) tokens",
    ) as error:
        retrieval.plan(context(lengths=[200, 500], samples=1))
    least = int(re.search(r"take (\d+)", str(error.value))[1])
    assert retrieval.plan(context(lengths=[least], samples=1))
    with pytest.raises(UserError, match=rf"suite\.lengths={least - 1} "):
        retrieval.plan(context(lengths=[least - 1], samples=1))
    with pytest.raises(
        UserError, match=r"suite\.lengths=600 cannot be used with tiny: it reads 512 tokens at most"
    ):
        retrieval.plan(context(wrap(tiny().model, limit=512), lengths=[512, 600]))
    with pytest.raises(
        UserError,
        match=r"suite\.lengths=100000 cannot be used: the text has only \d+ tokens; "
        r"choose more text by data=",
    ):
        retrieval.plan(context(lengths=[100000]))
    with pytest.raises(UserError, match=r"suite\.digits=1 cannot be used with 10 needles"):
        retrieval.plan(context(cases=[[10, 1]], digits=1, lengths=[4000]))


def test_summary_and_picture(context, oracle, summarize, tmp_path):
    oracle(lambda numbers: f" {numbers[0]} and 1.")
    made = context(lengths=[1024, 4096], cases=[[2, 2], [3, 1]])
    records = list(retrieval.answer(made, retrieval.plan(made)))
    metrics = summarize(retrieval, made, records, tmp_path / "retrieval.png")
    whole = metrics["N=2 R=2", "greedy"]
    assert (whole["value"], whole["n"], metrics["N=3 R=1", "greedy"]["value"]) == (0.5, 6, 1.0), (
        "the same needles at both lengths are one"
    )
    assert set(whole["published"].values()) == {0.85, 0.92} and all(
        "(paper)" in name for name in whole["published"]
    )
    assert metrics["N=2 R=2", "constrained"]["published"] == {"guessing": 1 / 2}
    assert metrics["N=2 R=2 T=4096", "greedy"]["n"] == 6
    assert metrics["N=2 R=2 T=4096 depth 100%", "greedy"]["n"] == 3
    assert metrics["average", "greedy"]["value"] == 0.75
    assert imread(tmp_path / "retrieval.png").std() > 0.05


def test_the_same_needles_at_another_length_are_no_more_evidence(context, summarize):
    def metrics(lengths):
        made = context(lengths=lengths, samples=20)
        right = {}  # by needles, whatever the length
        records = []
        for example in retrieval.plan(made):
            key = example.data["task"], example.data["depth"], example.data["number"]
            score = right.setdefault(key, float(np.random.default_rng(len(right)).random() < 0.4))
            by = {name: example.data[name] for name in ("task", "length", "depth")}
            records.append(
                {
                    "id": example.id,
                    "example": example.data["example"],
                    "by": by,
                    "scores": {"greedy": score},
                }
            )
        return {label: row for (label, _), row in summarize(retrieval, made, records).items()}

    one, two = metrics([400]), metrics([400, 500])
    for group in ("N=2 R=1", "N=3 R=2", "average"):
        assert two[group] == one[group]
        assert (one[group]["high"] - one[group]["low"]) / one[group]["stderr"] == pytest.approx(
            2 * 1.96, rel=0.1
        )


def test_titles_of_a_single_length_stand_apart(context, oracle, summarize, tmp_path, monkeypatch):
    oracle(lambda numbers: f" {numbers[0]}.")
    made = context(lengths=[400], cases=[[1, 1], [2, 2], [4, 2]], samples=1)
    records = list(retrieval.answer(made, retrieval.plan(made)))
    drawn = []
    monkeypatch.setattr(
        plot, "Figure", lambda **settings: drawn.append(Figure(**settings)) or drawn[-1]
    )
    summarize(retrieval, made, records, tmp_path / "retrieval.png")
    drawn[0].draw_without_rendering()
    panels = [axes for axes in drawn[0].axes if axes.get_title("left")]
    titles = [
        next(text for text in axes.findobj(Text) if text.get_text() == axes.get_title("left"))
        for axes in panels
    ]
    boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) == 6 and not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_eight_needles_have_the_published_figures_of_their_length(context, oracle, summarize):
    oracle(lambda numbers: f" {numbers[0]}.")
    made = context(cases=[[8, 1]], lengths=[1024, 8192], samples=1, depths=[0.5])
    metrics = summarize(retrieval, made, list(retrieval.answer(made, retrieval.plan(made))))
    found = {
        label: set(row["published"].values())
        for (label, name), row in metrics.items()
        if name == "greedy"
    }
    assert found["N=8 R=1 T=8192"] == {0.95, 1.0} and not found["N=8 R=1 T=1024"]
