"""The allocation suite: counted weights against maps made by hand and by transformers."""

import re

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM

from diffx.config import UserError
from diffx.config.data import TextData
from diffx.config.eval import EvalJob
from diffx.config.suite import AllocationSuite
from diffx.console import Reporter
from diffx.evaluation import allocation
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context
from diffx.loading import load


@pytest.fixture
def context(tiny, tmp_path, documents):
    def make(lm=None, limit=None, **options):
        given = {
            "case": [2, 1],
            "length": 250,
            "depths": [0.0, 0.5, 1.0],
            "samples": 2,
            "digits": 3,
        } | options
        job = EvalJob(
            checkpoint="x",
            suite=AllocationSuite(name="allocation", **given),
            data=TextData(path=str(documents)),
            limit=limit,
        )
        return Context(job, lm or tiny(), tmp_path, Reporter())

    return make


def measure(context):
    return list(allocation.answer(context, allocation.plan(context)))


def parts(record, prefix):
    """Masks of the bytes of the answer's sentence and of the noise, read from the prompt."""
    prompt = record["prompt"]
    city = re.search(r"the magic number of (\w+)\? ", prompt)[1]
    found = re.search(rf" ?The magic number of {city} is \d+\.", prompt)
    question = prompt.index(" What is the magic number")
    answer = np.zeros(prefix + len(prompt), bool)
    answer[prefix + found.start() : prefix + found.end()] = True
    noise = np.zeros_like(answer)
    noise[prefix : prefix + question] = True
    answer[0] = noise[0] = False
    return answer, noise & ~answer


class Rows:
    """Attention whose last row is given, in as many heads as there are rows."""

    def __init__(self, rows):
        self.rows, self.num_heads = rows, len(rows)

    def head_map(self, head, start, stop):
        assert (start, stop) == (self.rows.shape[1] - 1, self.rows.shape[1]), (
            "only the last row is needed"
        )
        return self.rows[head][None, None]


def test_a_row_is_split_as_it_says(context, tiny, monkeypatch):
    lm = tiny()

    def observe(ids, attention):
        places = torch.arange(ids.shape[1], dtype=torch.float32)
        alternating = torch.where(places % 2 == 0, 2.0, -1.0)
        for layer in (1, 0):
            attention(
                layer,
                Rows(torch.stack([torch.ones(ids.shape[1]), alternating, places]) * (layer + 1)),
            )

    monkeypatch.setattr(lm, "observe", observe)
    for record in measure(context(lm)):
        answer, noise = parts(record, prefix=1)
        places = np.arange(len(answer), dtype=np.float64)
        alternating = np.where(places % 2 == 0, 2.0, -1.0)
        rows = [np.ones(len(answer)), alternating, places]
        assert answer.sum() in (len("The magic number of Rome is 123.") + n for n in range(-2, 12))
        for name, part, rows_used in (
            ("answer", answer, rows),
            ("noise", noise, rows),
            ("|answer|", answer, map(np.abs, rows)),
            ("|noise|", noise, map(np.abs, rows)),
        ):
            expected = [row[part].sum() / row.sum() for row in rows_used]
            assert record["heads"][name] == [pytest.approx(expected, abs=1e-4)] * 2
            assert record["scores"][name] == pytest.approx(np.mean(expected), abs=1e-5)


def test_shares_of_a_llama_are_those_of_its_own_maps(context, hf_folder):
    lm = LanguageModel(load(str(hf_folder)))
    model = AutoModelForCausalLM.from_pretrained(hf_folder, attn_implementation="eager")
    for record in measure(context(lm, samples=1)):
        with torch.no_grad():
            maps = model(
                torch.tensor([lm.encode(record["prompt"])]), output_attentions=True
            ).attentions
        answer, noise = parts(record, prefix=0)
        for name, part in (
            ("answer", answer),
            ("noise", noise),
            ("|answer|", answer),
            ("|noise|", noise),
        ):
            expected = torch.stack([layer[0, :, -1, part].sum(-1) for layer in maps])
            torch.testing.assert_close(
                torch.tensor(record["heads"][name]), expected, atol=2e-5, rtol=0
            )


@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2"])
def test_signed_rows_sum_to_one_and_differ_from_absolute_ones(context, tiny, kind):
    for record in measure(context(tiny(kind), samples=1)):
        heads = {name: np.array(values) for name, values in record["heads"].items()}
        assert heads["answer"].shape == (2, 2 if kind == "diff_v1" else 4)
        assert (np.abs(heads["answer"] - heads["|answer|"]) > 1e-4).any()
        assert ((heads["|answer|"] >= 0) & (heads["|answer|"] + heads["|noise|"] < 1)).all()


def test_summary_and_picture(context, summarize, tmp_path):
    made = context()
    records = measure(made)
    metrics = summarize(allocation, made, records, tmp_path / "allocation.png")
    assert metrics["depth 0%", "answer"]["n"] == 2
    assert set(metrics["depth 0%", "answer"]["published"].values()) == {0.03, 0.27}
    assert not metrics["depth 0%", "|answer|"]["published"]
    head = metrics["layer 1 head 0", "noise"]
    expected = np.mean([record["heads"]["noise"][1][0] for record in records])
    assert (head["value"], head["n"], head["low"]) == (pytest.approx(expected), 6, None)
    assert imread(tmp_path / "allocation.png").std() > 0.05


def test_the_average_over_depths_takes_them_as_independent(context, summarize):
    """Samples of the same number at two depths are independent: their shift changes no interval."""
    made = context()
    random = np.random.default_rng(0).normal(size=20)
    heads = {name: [[0.0]] for name in ("answer", "noise", "|answer|", "|noise|")}
    records = [
        {
            "id": f"{depth}/{number}",
            "by": {"depth": depth},
            "scores": {"answer": sign * score},
            "heads": heads,
        }
        for depth, sign in ((0.0, 1), (1.0, -1))
        for number, score in enumerate(random)
    ]
    average = summarize(allocation, made, records)["average", "answer"]
    half = random.std(ddof=1) / np.sqrt(20)  # a depth's standard error
    assert average["stderr"] == pytest.approx(half / np.sqrt(2))
    assert (average["high"] - average["low"]) / average["stderr"] == pytest.approx(
        2 * 1.96, rel=0.1
    )


def test_refusals(context, wrap, tiny):
    with pytest.raises(
        UserError,
        match=r"suite\.length=60 cannot be used: 2 needles, question and answer take \d+ tokens",
    ):
        allocation.plan(context(length=60))
    with pytest.raises(
        UserError, match=r"suite\.length=600 cannot be used with tiny: it reads 512 tokens at most"
    ):
        allocation.plan(context(wrap(tiny().model, limit=512), length=600))
    assert {example.data["length"] for example in allocation.plan(context(length=None))} == {256}, (
        "the model's context"
    )
    lm = tiny()
    lm.context = 64
    with pytest.raises(
        UserError,
        match=r"suite\.length=null cannot be used with tiny: .+ is 64; .+ suite\.case, .+ "
        r"suite\.length$",
    ):
        allocation.plan(context(lm, length=None))
