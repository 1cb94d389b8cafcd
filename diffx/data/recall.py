"""The synthetic task ``data=recall``: multi-query associative recall (MQAR, arXiv 2312.04927).

A sample of T tokens: end of text; n pairs of key and value; then slots of two tokens. In n of the
slots stand the keys again, each with its value behind it, which alone carries loss. As in Zoology's
code, keys and values of a sample differ from each other, each key is asked for once, and the slots
are drawn one after the other with probabilities that fall by a power law. Different from that
code, a value stands behind its query as in text (there a random token does); distractors are keys
and values that the sample does not use, so that each query has one answer; and the queries are in
random order (there the first pairs are asked for first, so that a place tells of its answer).
"""

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from diffx.config.data import RecallData
from diffx.data.shards import token_dtype
from diffx.data.tokenizers import END_OF_TEXT, FastTokenizer

TRAINING, HELD_OUT, SUITE = range(3)  # streams of samples


def recall_tokenizer(data: RecallData) -> FastTokenizer:
    """Make the tokenizer: ``_``, then k0, k1 …, v0, v1 …, with spaces between, and end of text.

    Any other word is ``_``, which also fills a sample without distractors.
    """
    words = ["_", *(f"k{i}" for i in range(data.keys)), *(f"v{i}" for i in range(data.values))]
    vocab = {word: token for token, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="_"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([END_OF_TEXT])
    return FastTokenizer("recall", backend, END_OF_TEXT)


def make_sample(
    data: RecallData, key: list[int], pairs: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Make a sample, always the same for a seed of NumPy's generator.

    Args:
        data: the task.
        key: the seed: one of the streams above, a seed and a number.
        pairs: pairs of key and value; ``None`` draws from 1 to ``data.pairs``.

    Returns:
        Its tokens and their loss mask, both (data.length,).
    """
    random = np.random.default_rng(key)
    pairs = int(random.integers(data.pairs)) + 1 if pairs is None else pairs
    keys = 1 + random.permutation(data.keys)
    values = 1 + data.keys + random.permutation(data.values)
    unused = np.concatenate([keys[pairs:], values[pairs:]]) if data.distractors else np.zeros(1)
    end_of_text, first = 1 + data.keys + data.values, 1 + 2 * pairs
    tokens = unused[random.integers(len(unused), size=data.length)]
    tokens[0], tokens[1:first:2], tokens[2:first:2] = end_of_text, keys[:pairs], values[:pairs]
    slots = (data.length - first) // 2
    weights = np.arange(1.0, slots + 1) ** (data.power - 1)
    places = random.choice(slots, pairs, replace=False, p=weights / weights.sum())
    places = first + 2 * random.permutation(places)
    tokens[places], tokens[places + 1] = keys[:pairs], values[:pairs]
    mask = np.zeros(data.length, np.uint8)
    mask[places + 1] = 1
    return tokens.astype(token_dtype(end_of_text + 1)), mask
