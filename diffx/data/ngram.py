"""N-gram models of the training tokens, measured on the held-out targets of a trained model."""

import math

import numpy as np

from diffx.config.data import BpeTokenizer
from diffx.data.corpus import Corpus, open_data
from diffx.data.shards import HeldOut, ProgressCallback, TokenArray, no_progress

TRAIN_TOKENS = 20_000_000  # counted at most; more improve a bigram little


def baselines(
    corpus: Corpus, progress: ProgressCallback = no_progress
) -> dict[str, dict[str, float]]:
    """Measure the unigram and bigram models of a corpus in nats a token and bits a byte.

    A small vocabulary makes a bigram weaker, so it is also measured with a byte-level BPE of 4,096
    tokens, except on token shards, which hold no text. The synthetic tasks have no baselines: their
    targets are random.
    """
    if corpus.data.kind in ("retrieval", "recall"):
        return {}
    losses = {}
    for measure in (unigram, bigram_kneser_ney):
        nats = measure(corpus.train, corpus.val, corpus.tokenizer.vocab_size)
        losses[measure.__name__] = {"nats": nats, "bpb": bits_per_byte(nats, corpus.val)}
    if corpus.data.kind != "shards":
        other = open_data(corpus.data, BpeTokenizer(vocab_size=4096), progress=progress)
        val = other.shards.held_out(like=corpus.val)
        nats = bigram_kneser_ney(other.train, val, other.tokenizer.vocab_size)
        losses["bigram_kneser_ney_4096"] = {"bpb": bits_per_byte(nats, val)}
    return losses


def bits_per_byte(nats: float, val: HeldOut) -> float:
    """Convert the mean loss over the targets of ``val`` from nats to bits a byte."""
    return nats * val.n_tokens / val.n_bytes / math.log(2)


def unigram(train: TokenArray, val: HeldOut, vocab_size: int) -> float:
    """Return nats a token of the unigram model with add-one smoothing."""
    tokens, (_, targets) = _counted(train), _scored(val)
    probability = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)
    return float(-np.log(probability[targets]).mean())


def bigram_kneser_ney(train: TokenArray, val: HeldOut, vocab_size: int) -> float:
    """Return nats a token of the bigram model with interpolated Kneser-Ney smoothing."""
    contexts, targets = _scored(val)
    probability = kneser_ney_probability(_counted(train), contexts, targets, vocab_size)
    return float(-np.log(probability).mean())


def kneser_ney_probability(
    train: np.ndarray, contexts: np.ndarray, targets: np.ndarray, vocab_size: int
) -> np.ndarray:
    """Return p(target | context) of the interpolated Kneser-Ney bigram model.

    Kneser and Ney, 1995; Chen and Goodman, 1999, eq. 2.8. With c(u, w) the count of a pair and
    N(u·), N(·w), N(··) the numbers of different pairs that begin with u, end with w, or exist:

        p(w | u) = max(c(u, w) - D, 0) / c(u) + D·N(u·) / c(u) · q(w)
        q(w) = max(N(·w) - D', 0) / N(··) + D'·|{w: N(·w) > 0}| / N(··) / V

    An unseen context has q alone. The discounts are n1 / (n1 + 2·n2), with n1 and n2 the numbers of
    counts that are 1 and 2.

    ``train`` is int64 (N,), ``contexts`` and the ``targets`` that follow them are int64 (M,), and
    the result is float64 (M,).
    """
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    heads, tails = np.divmod(pairs, vocab_size)
    total = np.bincount(heads, counts, vocab_size)  # c(u)
    followers = np.bincount(heads, minlength=vocab_size)  # N(u·)
    preceders = np.bincount(tails, minlength=vocab_size)  # N(·w)
    seen = preceders > 0
    discount = _discount(preceders[seen])
    unseen = discount * seen.sum() / vocab_size
    lower = (np.maximum(preceders - discount, 0) + unseen) / len(pairs)  # q(w)

    discount = _discount(counts)
    wanted = contexts * vocab_size + targets
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    mass = np.maximum(total[contexts], 1)
    backoff = discount * followers[contexts] / mass * lower[targets]
    known = np.maximum(count - discount, 0) / mass + backoff
    return np.where(total[contexts] > 0, known, lower[targets])


def _discount(counts: np.ndarray) -> float:
    ones, twos = int((counts == 1).sum()), int((counts == 2).sum())
    # Without counts of 1, any discount above 0 serves.
    return ones / (ones + 2 * twos) if ones else 0.5


def _counted(train: TokenArray) -> np.ndarray:
    return train.read(0, min(len(train), TRAIN_TOKENS))[0].astype(np.int64)


def _scored(val: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """Return the scored targets and the tokens before them."""
    tokens, mask = val.read(0, len(val))
    tokens = tokens.astype(np.int64)
    scored = slice(None) if mask is None else mask[1:] > 0
    return tokens[:-1][scored], tokens[1:][scored]
