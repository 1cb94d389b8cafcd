"""The retrieval task as training data: samples, scored tokens, exact resumption, a whole run."""

import json
import re

import numpy as np
import pytest
import torch

from diffx.cli import main
from diffx.config import UserError
from diffx.config.data import BpeTokenizer, BytesTokenizer, RetrievalData
from diffx.data import open_data
from diffx.data.corpus import read_texts
from diffx.data.needles import CITIES
from diffx.data.ngram import baselines

QUESTION = re.compile(
    r"( What (?:is|are) the magic numbers? of [\w, ]+\? The magic numbers? of [\w, ]+? (?:is|are))"
)
NEEDLE = re.compile(r"The magic number of (\w+) is (\d+)\.")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = (
        {"text": f"Note {n}. The square of {n} is {n * n}. Nothing else is known of it. " * 3}
        for n in range(100)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def corpus(text):
    data = RetrievalData(
        path=text, length=400, needles=3, asked=2, digits=3, val_tokens=4000, val_fraction=0.2
    )
    return open_data(data, BytesTokenizer())


def take(batches, steps=1):
    return [next(batches) for _ in range(steps)]


def rows_of(batches, steps=1):
    return [
        (x, y)
        for batch in take(batches, steps)
        for x, y in zip(batch.inputs, batch.targets, strict=True)
    ]


def check_sample(corpus, inputs, targets):
    """A window holds one sample, and its loss is on what the text has told."""
    eot = corpus.tokenizer.eot_id
    assert inputs[0] == eot
    whole = corpus.tokenizer.decode([token for token in inputs.tolist() if token != eot])
    context, question, answers = re.split(
        r"( What (?:is|are) the magic numbers? of [\w, ]+\? "
        r"The magic numbers? of [\w, ]+? (?:is|are))",
        whole,
    )
    told = dict(NEEDLE.findall(context))
    assert len(told) == len(NEEDLE.findall(context)) <= 3 and set(told) <= set(CITIES)
    asked = re.findall(r"\w+", question.split(" of ")[1].split("?")[0].replace(" and ", ", "))
    head, _, retold = answers.partition(" The magic")
    assert re.findall(r"\d+", head) == [told[city] for city in asked]
    rest = dict(NEEDLE.findall(f"The magic{retold}")) if retold else {}
    assert rest == {city: number for city, number in told.items() if city not in asked}
    scored = corpus.tokenizer.decode(targets[targets >= 0].tolist())
    assert scored == head + "".join(f" {number}." for number in re.findall(r"\d+", retold))
    place = (targets >= 0).nonzero()[0, 0]
    assert corpus.tokenizer.decode(inputs[: place + 1].tolist()).endswith(question), (
        "the first loss is behind the question"
    )
    return context, asked


def test_samples(corpus):
    seen = [check_sample(corpus, *row) for row in rows_of(corpus.batches(400, 4, seed=0), 5)]
    assert len({context for context, _ in seen}) == 20
    assert {len(asked) for _, asked in seen} == {1, 2} and {
        len(NEEDLE.findall(context)) for context, _ in seen
    } == {1, 2, 3}


def test_a_city_does_not_tell_where_its_needle_stands(corpus):
    rows = []
    for inputs, targets in rows_of(corpus.batches(400, 100, seed=0), 4):
        context, asked = check_sample(corpus, inputs, targets)
        told = NEEDLE.findall(context)
        number = dict(told)[asked[0]]
        rows.append(
            (
                len(told),
                len(asked),
                context.index(f" {number}."),
                CITIES.index(asked[0]),
                int(number),
            )
        )
    correlations = np.corrcoef(np.array(rows).T)[:3, 3:]
    assert np.abs(correlations).max() < 4 / len(rows) ** 0.5


def test_the_curriculum_goes_from_bare_pairs_to_text(text):
    data = RetrievalData(
        path=text, length=400, needles=3, digits=3, val_tokens=4000, val_fraction=0.2, curriculum=12
    )
    corpus = open_data(data, BytesTokenizer())
    rows = rows_of(corpus.batches(400, 3, seed=0), 5)
    forms = (
        [("", "", "")] * 6
        + [("", " is", "")] * 2
        + [(" is", " is", "")] * 2
        + [(" is", " is", ".")] * 2
    )
    for (inputs, targets), (told, asked, end) in zip(rows[:12], forms, strict=True):
        whole = corpus.tokenizer.decode(
            [token for token in inputs.tolist() if token != corpus.tokenizer.eot_id]
        )
        pairs = re.findall(r" ([A-Z]\w+)(?: is)? (\d{3})", whole)
        assert (
            len(pairs) == 9
            and len(dict(pairs[:3])) == 3
            and all(dict(pairs[:3])[city] == number for city, number in pairs[3:])
        )
        middles = [told] * 3 + [asked] * 6
        assert whole == "".join(
            f" {city}{middle} {number}{end}"
            for (city, number), middle in zip(pairs, middles, strict=True)
        )
        assert corpus.tokenizer.decode(targets[targets >= 0].tolist()) == "".join(
            f" {number}{end}" for _, number in pairs[3:]
        )
    assert len({tuple(inputs.tolist()) for inputs, _ in rows}) == 15
    for row in rows[12:]:
        check_sample(corpus, *row)
    for batch in corpus.val_batches(400, 3):
        assert "What" in corpus.tokenizer.decode(batch.inputs[0].tolist())


def test_held_out_samples_stand_in_held_out_text(corpus, text):
    held_out = " ".join(read_texts(corpus.data, held_out=True)[0])
    batches = list(corpus.val_batches(400, 3))
    rows = [row for batch in batches for row in zip(batch.inputs, batch.targets, strict=True)]
    assert len(rows) == 4000 // 400 == len(corpus.val.keys)
    for row in rows:
        context, _ = check_sample(corpus, *row)
        for square in re.findall(r"The square of \d+ is \d+\.", context):
            assert square in held_out
    for row in rows_of(corpus.batches(400, 2, seed=0), 5):
        context, _ = check_sample(corpus, *row)
        assert not any(
            square in held_out for square in re.findall(r"The square of \d+ is \d+\.", context)
        )
    scored = [target for batch in batches for target in batch.targets[batch.targets >= 0].tolist()]
    assert corpus.val.n_tokens == len(scored) == corpus.info["val"]["measured"]["tokens"]
    assert corpus.val.n_bytes == len(scored), "a byte a token"


def test_batches_depend_on_the_seed_and_divide_among_processes(corpus):
    whole = take(corpus.batches(400, 4, seed=3), 3)
    again = take(corpus.batches(400, 4, seed=3), 3)
    parts = [take(corpus.batches(400, 4, seed=3, rank=rank, world_size=2), 3) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.inputs, again[step].inputs) and torch.equal(
            batch.targets, again[step].targets
        )
        for rank in range(2):
            assert torch.equal(batch.inputs[rank::2], parts[rank][step].inputs)
    assert not torch.equal(whole[0].inputs, next(corpus.batches(400, 4, seed=4)).inputs)


def test_batches_go_on_where_they_stopped(corpus):
    batches = corpus.batches(400, 2, seed=0)
    take(batches, 2)
    state = json.loads(json.dumps(batches.state_dict()))
    other = corpus.batches(400, 2, seed=0)
    other.load_state_dict(state)
    assert torch.equal(next(other).inputs, next(batches).inputs)
    with pytest.raises(UserError, match="data cannot be used: its text or its tokens"):
        other.load_state_dict(state | {"corpus": "another"})


def test_a_trained_tokenizer_has_cities_and_numbers(text):
    corpus = open_data(
        RetrievalData(path=text, length=100, val_tokens=1000), BpeTokenizer(vocab_size=1024)
    )
    tokenizer = corpus.tokenizer
    assert all(
        len(tokenizer.encode(f" {word}")) == 1
        for word in [*CITIES, *map(str, range(10, 100)), "magic"]
    )
    for row in rows_of(corpus.batches(100, 4, seed=0), 5):
        assert len(row[0]) == 100
    assert np.all(corpus.val.read(0, len(corpus.val))[0][::100] == tokenizer.eot_id)


def test_there_are_no_ngram_baselines(corpus):
    assert baselines(corpus) == {}


def test_refusals(corpus, text):
    with pytest.raises(
        UserError,
        match=r"train\.seq_len=200 cannot be used: with data=retrieval it must be data\.length=400",
    ):
        corpus.batches(200, 4, seed=0)
    with pytest.raises(
        UserError,
        match=r"data\.length=100 cannot be used: a sample may take \d+ tokens without text; "
        r"give more",
    ):
        open_data(RetrievalData(path=text, length=100, needles=3), BytesTokenizer())
    with pytest.raises(
        UserError, match=r"data\.asked=3 cannot be used: it must be from 1 to data\.needles=2"
    ):
        RetrievalData(needles=2, asked=3)
    with pytest.raises(UserError, match=r"data\.needles=20 cannot be used"):
        RetrievalData(needles=20, digits=1)
    with pytest.raises(
        UserError, match=r"data\.curriculum=-1 cannot be used: it must be zero or more"
    ):
        RetrievalData(curriculum=-1)


def test_a_run_resumes_exactly(text, tmp_path):
    model = (
        "model=diff_v1 model.hidden_size=16 model.num_layers=1 model.num_heads=4 "
        "model.num_kv_heads=2 model.intermediate_size=16"
    )
    data = (
        "data=retrieval data.length=300 data.needles=2 data.val_tokens=600 tokenizer=bytes "
        f"data.path={text}"
    )
    recipe = (
        "train.seq_len=300 train.batch_tokens=600 train.warmup=1 train.log_every=1 "
        "train.schedule=constant train.sample_tokens=0"
    )
    words = f"{model} {data} {recipe} wandb.mode=disabled device=cpu".split()
    assert main(["train", *words, f"run.dir={tmp_path}/whole", "train.steps=4"]) == 0
    assert main(["train", *words, f"run.dir={tmp_path}/part", "train.steps=2"]) == 0
    assert main(["train", f"train.resume={tmp_path}/part", "train.steps=4"]) == 0

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {
            row["step"]: row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row
        }

    assert losses("whole") == losses("part") and len(losses("whole")) == 4
