"""What a model must beat: n-gram models of the training tokens, measured on exactly the held-out targets that it is measured on."""

import math

import numpy as np

from diffx.config.data import BpeTokenizer
from diffx.data.corpus import Corpus, open_data
from diffx.data.shards import HeldOut, Progress, TokenArray, no_progress

TRAIN_TOKENS = 20_000_000  # counted at most; a bigram gains little from more


def baselines(corpus: Corpus, progress: Progress = no_progress) -> dict[str, dict[str, float]]:
    """Nats a token and bits a byte of the unigram and bigram models of a corpus.

    The bigram is measured over a byte-level BPE of 4,096 tokens of the same text too (bits a byte alone, on the same
    documents): a small vocabulary weakens it. Token shards hold no text, so that there this one is left out; the retrieval task
    has no baselines, since what is scored are random numbers.
    """
    if corpus.data.kind == "retrieval":
        return {}
    vocab_size = corpus.tokenizer.vocab_size
    found = {}
    for name, nats in (
        ("unigram", unigram(corpus.train, corpus.val, vocab_size)),
        ("bigram_kneser_ney", bigram_kneser_ney(corpus.train, corpus.val, vocab_size)),
    ):
        found[name] = {"nats": nats, "bpb": bits_per_byte(nats, corpus.val)}
    if corpus.data.kind != "shards":
        other = open_data(corpus.data, BpeTokenizer(vocab_size=4096), progress=progress)
        val = other.shards.held_out(like=corpus.val)
        found["bigram_kneser_ney_4096"] = {"bpb": bits_per_byte(bigram_kneser_ney(other.train, val, other.tokenizer.vocab_size), val)}
    return found


def bits_per_byte(nats: float, val: HeldOut) -> float:
    """Turn the mean loss over ``val``'s scored targets, in nats, into bits a byte of their text."""
    return nats * val.n_tokens / val.n_bytes / math.log(2)


def unigram(train: TokenArray, val: HeldOut, vocab_size: int) -> float:
    """Nats a token of the unigram model with additive (add-one) smoothing."""
    _, targets = _scored(val)
    tokens = _counted(train)
    probability = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)
    return float(-np.log(probability[targets]).mean())


def bigram_kneser_ney(train: TokenArray, val: HeldOut, vocab_size: int) -> float:
    """Nats a token of the bigram model with interpolated Kneser-Ney smoothing."""
    contexts, targets = _scored(val)
    return float(-np.log(kneser_ney_probability(_counted(train), contexts, targets, vocab_size)).mean())


def kneser_ney_probability(train: np.ndarray, contexts: np.ndarray, targets: np.ndarray, vocab_size: int) -> np.ndarray:
    """p(target | context) of the interpolated Kneser-Ney bigram model (Kneser and Ney, 1995; Chen and Goodman, 1999, eq. 2.8).

    With c(u, w) the count of a pair and N(u·), N(·w), N(··) the numbers of different pairs that begin with u, end in w, or exist:

        p(w | u) = max(c(u, w) - D, 0) / c(u) + D·N(u·) / c(u) · q(w)
        q(w) = max(N(·w) - D', 0) / N(··) + D'·|{w: N(·w) > 0}| / N(··) / V

    An unseen context has q alone. The discounts are n1 / (n1 + 2·n2), from how many counts are 1 and 2.

    Args:
        train: tokens, int64 (N,).
        contexts: tokens, int64 (M,).
        targets: the tokens that follow them, int64 (M,).
        vocab_size: V.

    Returns:
        float64 (M,).
    """
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    heads, tails = np.divmod(pairs, vocab_size)
    total = np.bincount(heads, counts, vocab_size)  # c(u)
    followers = np.bincount(heads, minlength=vocab_size)  # N(u·)
    preceders = np.bincount(tails, minlength=vocab_size)  # N(·w)
    seen = preceders > 0
    lower_discount = _discount(preceders[seen])
    lower = (np.maximum(preceders - lower_discount, 0) + lower_discount * seen.sum() / vocab_size) / len(pairs)

    discount = _discount(counts)
    wanted = contexts * vocab_size + targets
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    mass = np.maximum(total[contexts], 1)
    known = np.maximum(count - discount, 0) / mass + discount * followers[contexts] / mass * lower[targets]
    return np.where(total[contexts] > 0, known, lower[targets])


def _discount(counts: np.ndarray) -> float:
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    return ones / (ones + 2 * twos) if ones else 0.5  # without singletons, any discount that leaves the unseen something


def _counted(train: TokenArray) -> np.ndarray:
    return train.read(0, min(len(train), TRAIN_TOKENS))[0].astype(np.int64)


def _scored(val: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and targets of the scored targets."""
    tokens, mask = val.read(0, len(val))
    tokens = tokens.astype(np.int64)
    scored = slice(None) if mask is None else mask[1:] > 0
    return tokens[:-1][scored], tokens[1:][scored]
