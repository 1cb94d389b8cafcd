"""Associative recall as training data: samples, their distribution, resumption, the tokenizer."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoTokenizer

from diffx.cli import main
from diffx.config import UserError
from diffx.config.data import BpeTokenizer, RecallData
from diffx.data import load_tokenizer, open_data
from diffx.data.ngram import baselines
from diffx.data.recall import make_sample, recall_tokenizer

TASK = {"length": 30, "pairs": 5, "keys": 12, "values": 9, "val_tokens": 330}


def opened(**options):
    return open_data(RecallData(**(TASK | options)), BpeTokenizer())


def rows_of(corpus, steps=1, rows=20, seed=0, **options):
    batches = corpus.batches(30, rows, seed, **options)
    return [
        (x, y)
        for batch in itertools.islice(batches, steps)
        for x, y in zip(batch.inputs, batch.targets, strict=True)
    ]


def read(corpus, inputs, targets):
    """The pairs, the queries with their slots, and the other words of a window, by its text."""
    first, *words = corpus.tokenizer.decode(inputs.tolist()).split()
    assert first == "<|endoftext|>" and len(words) == 29
    scored = {place: target for place, target in enumerate(targets.tolist()) if target >= 0}
    pairs = dict(zip(words[: 2 * len(scored) : 2], words[1 : 2 * len(scored) : 2], strict=True))
    slots, rest = {}, words[2 * len(scored) :]
    for place, target in scored.items():
        key, value = words[place - 1], words[place]
        assert corpus.tokenizer.decode([target]) == value == pairs[key]
        slots[key], odd = divmod(place - 1 - 2 * len(scored), 2)
        assert not odd and slots[key] >= 0
        rest[2 * slots[key]] = rest[2 * slots[key] + 1] = None
    assert len(pairs) == len(set(pairs.values())) == len(slots) == len(scored)
    return pairs, slots, [word for word in rest if word is not None]


def test_samples():
    corpus, seen, words = opened(), Counter(), Counter()
    for row in rows_of(corpus, steps=20):
        pairs, _, rest = read(corpus, *row)
        assert all(key[0] == "k" and value[0] == "v" for key, value in pairs.items())
        assert not {*pairs, *pairs.values()} & {*rest}, "one answer to each query"
        seen[len(pairs)] += 1
        words.update([*pairs, *pairs.values()] if len(pairs) == 5 else [])
        words.update(rest if len(pairs) == 5 else [])
    assert sorted(seen) == [1, 2, 3, 4, 5] and chisquare([*seen.values()]).pvalue > 0.001
    assert set(words) == {f"k{i}" for i in range(12)} | {f"v{i}" for i in range(9)}


def test_without_distractors():
    corpus = opened(distractors=False, pairs=7, keys=7, values=7)
    fills = {word for row in rows_of(corpus, steps=5) for word in read(corpus, *row)[2]}
    assert fills == {"_"}


@pytest.mark.parametrize("power", [0.01, 0.5, 1.0])
def test_queries_stand_where_a_power_law_says(power):
    """Slots are drawn one after the other, as in Zoology, and do not tell which pair is asked."""
    corpus = opened(power=power, length=17, keys=3, values=3, pairs=2)  # six slots behind two pairs
    weights = np.arange(1.0, 7) ** (power - 1)
    drawn = {
        (i, j): weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i])
        for i, j in itertools.permutations(range(6), 2)
    }
    expected = {(i, j): (drawn[i, j] + drawn[j, i]) / 2 for i, j in drawn}
    seen: Counter = Counter()
    for number in range(3000):
        tokens, mask = make_sample(corpus.data, [9, number], pairs=2)
        places = {tokens[place - 1]: (place - 6) // 2 for place in mask.nonzero()[0].tolist()}
        seen[places[tokens[1]], places[tokens[3]]] += 1
    counts = [seen[slots] for slots in expected]
    assert chisquare(counts, 3000 * np.array([*expected.values()])).pvalue > 0.001


def test_batches_depend_on_the_seed_and_divide_among_processes():
    corpus = opened()
    whole, again, other = (rows_of(corpus, 2, rows=4, seed=seed) for seed in (3, 3, 4))
    for row, same in zip(whole, again, strict=True):
        assert torch.equal(row[0], same[0]) and torch.equal(row[1], same[1])
    assert len({tuple(inputs.tolist()) for inputs, _ in whole + other}) == 16
    for rank in range(2):
        part = rows_of(corpus, 2, rows=4, seed=3, rank=rank, world_size=2)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[rank::2], part, strict=True))


def test_held_out_samples_are_no_training_samples():
    corpus = opened(val_tokens=600)
    held_out = [
        (x, y)
        for batch in corpus.val_batches(30, 4)
        for x, y in zip(batch.inputs, batch.targets, strict=True)
    ]
    assert len(held_out) == 20 == len(corpus.val.keys)
    scored = sum(len(read(corpus, *row)[0]) for row in held_out)
    assert scored == corpus.val.n_tokens == corpus.info["val"]["measured"]["tokens"]
    trained = {tuple(x.tolist()) for seed in range(3) for x, _ in rows_of(corpus, 20, seed=seed)}
    assert len(trained) == 1200 and not trained & {tuple(x.tolist()) for x, _ in held_out}
    assert baselines(corpus) == {}


def test_the_tokenizer_is_saved_with_the_run(tmp_path):
    tokenizer = recall_tokenizer(RecallData(**TASK))
    assert tokenizer.vocab_size == 1 + 12 + 9 + 1 and tokenizer.decode([3, 13]) == "k2 v0"
    assert tokenizer.encode("k2 v0 what") == [3, 13, 0]
    tokenizer.save(tmp_path, begin=True)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.eot_id) == (tokenizer.fingerprint, tokenizer.eot_id)
    assert AutoTokenizer.from_pretrained(tmp_path)("k2 v0").input_ids == [22, 3, 13]


def test_refusals():
    for options in ({"pairs": 8}, {"pairs": 9, "keys": 9, "length": 99}, {"pairs": 0}):
        with pytest.raises(UserError, match=r"data\.pairs=\d cannot be used"):
            RecallData(**(TASK | options))
    assert RecallData(**(TASK | {"pairs": 7})).most == 7
    corpus = opened()
    with pytest.raises(UserError, match=r"with data=recall it must be data\.length=30"):
        corpus.batches(32, 4, seed=0)
    with pytest.raises(UserError, match="data=recall cannot be used: its samples are not text"):
        corpus.train  # noqa: B018  # a property that raises


def test_a_run_resumes_exactly(tmp_path):
    model = (
        "model=diff_v1 model.hidden_size=16 model.num_layers=1 model.num_heads=4 "
        "model.num_kv_heads=2 model.intermediate_size=16"
    )
    data = (
        "data=recall data.length=30 data.pairs=4 data.keys=12 data.values=9 data.val_tokens=90 "
        "train.seq_len=30 train.batch_tokens=60"
    )
    recipe = (
        "train.warmup=1 train.log_every=1 train.schedule=constant train.sample_tokens=4 "
        "wandb.mode=disabled device=cpu"
    )
    words = [*model.split(), *data.split(), *recipe.split()]
    assert main(["train", *words, f"run.dir={tmp_path}/whole", "train.steps=4"]) == 0
    assert main(["train", *words, f"run.dir={tmp_path}/part", "train.steps=2"]) == 0
    assert main(["train", f"train.resume={tmp_path}/part", "train.steps=4"]) == 0

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {
            row["step"]: row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row
        }

    assert losses("whole") == losses("part") and len(losses("whole")) == 4
