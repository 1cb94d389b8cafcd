import itertools
import json
import random

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from diffx.config import UserError
from diffx.config.data import TextData
from diffx.config.eval import EvalJob
from diffx.config.suite import LongContextSuite
from diffx.console import Reporter
from diffx.data import open_data
from diffx.data.shards import TokenArray
from diffx.evaluation import long_context
from diffx.evaluation.suite import Context


@pytest.fixture
def context(tiny, tmp_path, documents):
    def make(lm=None, limit=None, **options):
        suite = LongContextSuite(
            name="long_context",
            **{"length": 100, "texts": 4, "chunk": 16, "frequent": 20} | options,
        )
        job = EvalJob(checkpoint="x", suite=suite, data=TextData(path=str(documents)), limit=limit)
        return Context(job, lm or tiny(), tmp_path, Reporter())

    return make


def slow_hits(row, training, frequent):
    """AR-hits as the definition reads, token by token."""
    counts = {}
    for pair in itertools.pairwise(training):
        counts[pair] = counts.get(pair, 0) + 1
    hits, seen = [], set()
    for pair in itertools.pairwise(row):
        hits.append(pair in seen and counts.get(pair, 0) <= frequent)
        seen.add(pair)
    return hits


@pytest.mark.parametrize("kind", ["transformer", "diff_v1", "diff_v2"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@torch.no_grad()
def test_losses_behind_the_cache_are_those_of_a_full_forward_pass(tiny, kind, chunk):
    lm = tiny(kind)
    row = [random.Random(0).randrange(256) for _ in range(41)]
    steps = lm.model(torch.tensor([row[:-1]]))[0].float().log_softmax(-1)
    expected = [-step[token].item() for step, token in zip(steps, row[1:], strict=True)]
    np.testing.assert_allclose(long_context.token_losses(lm, row, chunk), expected, atol=1e-4)


def test_repeats_and_counts(monkeypatch):
    choose = random.Random(1)
    row, training = choose.choices(range(6), k=60), choose.choices(range(6), k=500)
    array = np.array(row, np.uint16)
    wanted = np.unique(long_context.pair_keys(array))
    parts = TokenArray([np.array(training[:123], np.uint16), np.array(training[123:], np.uint16)])
    for block in (7, 1 << 20):  # pairs across blocks and parts count once
        monkeypatch.setattr(long_context, "_BLOCK", block)
        counts = long_context.count_pairs(parts, wanted)
        pairs = [(int(key) >> 32, int(key) & 0xFFFFFFFF) for key in wanted]
        assert counts.tolist() == [
            sum(pair == other for other in itertools.pairwise(training)) for pair in pairs
        ]
    assert long_context.repeated(array).tolist() == slow_hits(row, [], 0)
    assert long_context.repeated(np.array([5, 5, 5, 5])).tolist() == [False, True, True]
    assert long_context.count_pairs(parts, wanted[:0]).tolist() == []


@torch.no_grad()
def test_records_match_slow_computations(context, summarize, tmp_path):
    made = context()
    examples = long_context.plan(made)
    corpus = examples[0].data["corpus"].tolist()
    eot, texts = made.lm.tokenizer.eot_id, made.documents()
    assert corpus == [token for text in texts for token in (eot, *made.lm.encode(text))]
    records = list(long_context.answer(made, examples))
    json.dumps(records)
    hits, losses = [], []
    for example, record in zip(examples, records, strict=True):
        row = example.data["tokens"].tolist()
        assert row[0] == eot and len(row) == 101 and record["tokens"] == 100
        steps = made.lm.model(torch.tensor([row[:-1]]))[0].float().log_softmax(-1)
        loss = np.array([-step[token].item() for step, token in zip(steps, row[1:], strict=True)])
        hit = np.array(slow_hits(row, corpus, 20))
        assert 0 < hit.sum() == record["ar_hits"] < 100
        rows = {row["metric"]: row for row in record["rows"] if "position" not in row}
        for name, part in (("nll", loss), ("nll/ar_hit", loss[hit]), ("nll/others", loss[~hit])):
            assert rows[name]["value"] == pytest.approx(part.mean(), abs=1e-4) and rows[name][
                "weight"
            ] == len(part)
        cumulative = {row["position"]: row["value"] for row in record["rows"] if "position" in row}
        assert list(cumulative) == [1, 2, 4, 8, 16, 32, 64, 100]
        for position, nll in cumulative.items():
            assert nll == pytest.approx(loss[:position].mean(), abs=1e-4)
        hits.append(hit)
        losses.append(loss)
    path = tmp_path / "long.png"
    metrics = summarize(long_context, made, records, path)
    parts = "100 tokens"
    every, hit = np.concatenate(losses), np.concatenate(hits)
    assert metrics["100 tokens", "nll"]["value"] == pytest.approx(every.mean(), abs=1e-4)
    assert metrics[parts, "nll/ar_hit"]["value"] == pytest.approx(
        every[hit].mean(), abs=1e-4
    )  # each token counts the same
    assert metrics[parts, "nll/others"]["value"] == pytest.approx(every[~hit].mean(), abs=1e-4)
    assert metrics[parts, "ar_hit share"]["value"] == pytest.approx(hit.mean())
    first = metrics["first 4 tokens", "cumulative nll"]
    assert first["value"] == pytest.approx(np.mean([loss[:4].mean() for loss in losses]), abs=1e-4)
    assert first["low"] < first["value"] < first["high"]
    assert records[0]["frequent"] == "over 20 times in the evaluated corpus"
    assert imread(path).std() > 0.05


def test_texts_without_hits_or_others(context, summarize, tmp_path):
    made = context(texts=1, frequent=10**6, length=2)
    records = list(long_context.answer(made, long_context.plan(made)))
    assert records[0]["ar_hits"] == 0
    metrics = summarize(long_context, made, records, tmp_path / "long.png")
    names = ["nll", "nll/others", "ar_hit share", "cumulative nll", "cumulative nll"]
    assert [name for _, name in metrics] == names


def test_a_runs_own_training_tokens_decide_what_is_frequent(
    context, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"{n} squared is what? The square of"}) + "\n" for n in range(60)
        )
    )
    lm = tiny()
    lm.loaded.data = TextData(path=str(path))
    made = context(lm)
    examples = long_context.plan(made)
    records = list(long_context.answer(made, examples))
    train = open_data(lm.loaded.data, lm.tokenizer).train
    training = train.read(0, len(train))[0].tolist()
    for example, record in zip(examples, records, strict=True):
        row = example.data["tokens"].tolist()
        assert (
            record["ar_hits"]
            == sum(slow_hits(row, training, 20))
            != sum(slow_hits(row, examples[0].data["corpus"].tolist(), 20))
        )
        assert record["frequent"] == "over 20 times in the training tokens"
    path.unlink()
    records = list(long_context.answer(made, examples))
    assert (
        records[0]["frequent"] == "over 20 times in the evaluated corpus"
        and "the training text is missing" in capsys.readouterr().out
    )


def test_too_little_text_or_context_is_one_line(context, wrap, tiny):
    total = len(long_context.plan(context())[0].data["corpus"])
    with pytest.raises(
        UserError,
        match=rf"^suite\.texts=4 cannot be used: data\.path=.* has {total} tokens, "
        rf"and each text takes {total}; ",
    ):
        long_context.plan(context(length=total))
    assert len(long_context.plan(context(length=total, limit=1))) == 1
    assert len(long_context.plan(context(length=None))[0].data["tokens"]) == 257
    limited = wrap(tiny().model, limit=64)
    with pytest.raises(
        UserError, match=r"^suite\.length=100 cannot be used with tiny: it reads 64 tokens at most$"
    ):
        long_context.plan(context(limited))
