import itertools
import math
from collections import Counter

import numpy as np
import pytest

from diffx.config.data import BpeTokenizer, BytesTokenizer, ShardsData, TextData
from diffx.config.train import PrepareJob
from diffx.data import open_data
from diffx.data.ngram import (
    baselines,
    bigram_kneser_ney,
    bits_per_byte,
    kneser_ney_probability,
    unigram,
)
from diffx.data.prepare import prepare


def brute_force(train, vocab_size):
    """The formula of the docstring, token by token."""
    pairs = Counter(itertools.pairwise(train))
    context = Counter(train[:-1])
    followers, preceders = Counter(u for u, _ in pairs), Counter(w for _, w in pairs)

    def discount(counts):
        ones, twos = list(counts).count(1), list(counts).count(2)
        return ones / (ones + 2 * twos) if ones else 0.5

    d, lower_d = discount(pairs.values()), discount(preceders.values())

    def probability(u, w):
        lower = (
            max(preceders[w] - lower_d, 0) / len(pairs)
            + lower_d * len(preceders) / len(pairs) / vocab_size
        )
        if not context[u]:
            return lower
        return max(pairs[u, w] - d, 0) / context[u] + d * followers[u] / context[u] * lower

    return probability


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "vocab_size"), [(300, 12), (40, 30), (5, 4), (2000, 5)])
def test_kneser_ney_is_the_formula_and_sums_to_one(seed, size, vocab_size):
    train = np.random.default_rng(seed).geometric(0.3, size).astype(np.int64) % (
        vocab_size - 1
    )  # the last token is never seen
    contexts, targets = (grid.flatten() for grid in np.mgrid[0:vocab_size, 0:vocab_size])
    found = kneser_ney_probability(train, contexts, targets, vocab_size)
    expected = brute_force(train.tolist(), vocab_size)
    assert found == pytest.approx(
        [expected(u, w) for u, w in zip(contexts.tolist(), targets.tolist(), strict=True)],
        abs=1e-13,
    )
    assert found.reshape(vocab_size, vocab_size).sum(1) == pytest.approx(
        np.ones(vocab_size), abs=1e-12
    )
    assert (found > 0).all()


@pytest.mark.parametrize("prompt_key", [None, "prompt"])
def test_measured_on_the_scored_targets(jsonl, prompt_key):
    corpus = open_data(
        TextData(path=str(jsonl), val_fraction=0.2, prompt_key=prompt_key), BytesTokenizer()
    )
    train = corpus.train.read(0, len(corpus.train))[0].tolist()
    tokens, mask = corpus.val.read(0, len(corpus.val))
    pairs = [
        (u, w)
        for i, (u, w) in enumerate(itertools.pairwise(tokens.tolist()))
        if mask is None or mask[i + 1]
    ]
    assert len(pairs) == corpus.val.n_tokens
    counts, bigram = Counter(train), brute_force(train, 257)
    expected = -sum(math.log((counts[w] + 1) / (len(train) + 257)) for _, w in pairs) / len(pairs)
    assert unigram(corpus.train, corpus.val, 257) == pytest.approx(expected, rel=1e-12)
    expected = -sum(math.log(bigram(u, w)) for u, w in pairs) / len(pairs)
    assert bigram_kneser_ney(corpus.train, corpus.val, 257) == pytest.approx(expected, rel=1e-12)


def test_bits_per_byte_of_a_code_of_known_length(jsonl, texts_of):
    """A uniform code over 256 bytes and the end of text costs log2(257) bits a token."""
    corpus = open_data(TextData(path=str(jsonl), val_fraction=0.2), BytesTokenizer())
    texts = texts_of(corpus.val, corpus.tokenizer)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert bits_per_byte(math.log(257), corpus.val) == pytest.approx(
        (n_bytes + len(texts)) * math.log2(257) / n_bytes, rel=1e-12
    )


def test_baselines(jsonl, tmp_path):
    data = TextData(path=str(jsonl), val_fraction=0.2, val_tokens=300)
    corpus = open_data(data, BpeTokenizer(vocab_size=280))
    found = baselines(corpus)
    assert found["unigram"]["nats"] > found["bigram_kneser_ney"]["nats"] > 0
    for name in ("unigram", "bigram_kneser_ney"):
        assert found[name]["bpb"] == pytest.approx(
            found[name]["nats"] * corpus.val.n_tokens / corpus.val.n_bytes / math.log(2)
        )
    # The larger vocabulary is measured on the same documents, though its cap would admit more.
    other = open_data(data, BpeTokenizer(vocab_size=4096))
    val = other.shards.held_out(like=corpus.val)
    assert val.n_bytes == corpus.val.n_bytes and val.n_tokens < corpus.val.n_tokens
    nats = bigram_kneser_ney(other.train, val, other.tokenizer.vocab_size)
    assert found["bigram_kneser_ney_4096"] == {"bpb": bits_per_byte(nats, val)}

    out = prepare(
        PrepareJob(
            data=data, tokenizer=BpeTokenizer(vocab_size=280), out=str(tmp_path / "out"), workers=1
        )
    )
    shards = baselines(open_data(ShardsData(path=str(out), val_tokens=300), BytesTokenizer()))
    assert shards == {name: found[name] for name in ("unigram", "bigram_kneser_ney")}
