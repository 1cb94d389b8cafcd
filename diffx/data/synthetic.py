"""Batches of samples, and the task ``data=retrieval``: needles in text (see needles.py).

A window is one sample: end of text, the text with its needles, the question and its answer, then
the needles that were not asked for. Only the numbers carry loss.
"""

import random
from collections.abc import Callable, Iterable
from itertools import chain, cycle, islice
from typing import Any

import numpy as np

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.config.data import BpeTokenizer, RecallData, RetrievalData
from diffx.data.batches import Batch, Batches, make_batch
from diffx.data.needles import Haystack, draw_needles, needle_of
from diffx.data.prepare import Source, holdout_threshold, training_texts
from diffx.data.shards import HeldOut, Row, Shards, TokenArray, token_dtype
from diffx.data.sources import documents
from diffx.data.tokenizers import Tokenizer, decode_documents, make_tokenizer

_TEXT_TOKENS = 500_000  # used of the text, at most
# What the tokenizer is trained on: a city and a short number become one token each.
_DOCUMENTS, _NEEDLES = 20, 40_000
# The forms of ``make_pairs``, each with the share of the curriculum at which it ends. Each form
# differs little from the one before: without the second, in which only the asked city has its "is",
# one Transformer of two did not learn the third.
_CURRICULUM = (
    (1 / 2, ("", "", "")),
    (4 / 6, ("", " is", "")),
    (5 / 6, (" is", " is", "")),
    (1, (" is", " is", ".")),
)


class Samples:
    """Makes samples of ``data.length`` tokens, with needles hidden in ``text``."""

    def __init__(self, data: RetrievalData, tokenizer: Tokenizer, text: TokenArray) -> None:
        self._data, self._tokenizer = data, tokenizer
        tokens, _ = text.read(0, min(len(text), _TEXT_TOKENS))
        self._haystack = Haystack(decode_documents(tokenizer, tokens), tokenizer.encode_batch)

    def make(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the sample of a key, padded by end-of-text tokens, and its loss mask.

        Both have the shape (data.length,).

        Raises:
            UserError: it is longer than ``data.length``.
        """
        data, tokenizer = self._data, self._tokenizer
        # Another seed than that of the needles, or a city would reveal its place.
        choose = random.Random(f"{key}/shape")
        count = choose.randint(1, data.needles)
        asked = choose.randint(1, min(count, data.asked))
        needles = draw_needles(key, count, asked, choose.random(), data.digits)
        rest = list(map(needle_of, needles.cities, needles.numbers))[asked:]
        choose.shuffle(rest)
        spans = [needles.answer]
        for sentence in rest:
            beginning, _, number = sentence.rpartition(" ")
            spans += [f" {beginning}", f" {number}"]
        encoded = tokenizer.encode_batch(spans)
        used = 1 + sum(map(len, encoded[1:]))
        try:
            prompt = self._haystack.hide(needles, data.length - used).prompt
        except ValueError as error:
            least = used + self._haystack.least(needles)
            why = f"a sample may take {least} tokens without text; give more"
            why = why if least > data.length else str(error)
            raise UserError(f"data.length={data.length} cannot be used: {why}") from error
        return self._window([tokenizer.encode(prompt), *encoded], cycle([False, True]))

    def make_pairs(self, key: str, form: tuple[str, str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample of bare pairs of city and number, then twice as many drawn from them.

        Only the numbers of the second part are scored. ``form`` holds the texts after a city of the
        first part, a city of the second part, and a number.
        """
        data, choose = self._data, random.Random(f"{key}/pairs")
        needles = draw_needles(key, data.needles, 1, 0.0, data.digits)
        first = list(zip(needles.cities, needles.numbers, strict=True))
        second = choose.choices(first, k=2 * len(first))
        spans = [
            text
            for pairs, verb in ((first, form[0]), (second, form[1]))
            for city, number in pairs
            for text in (f" {city}{verb}", f" {number}{form[2]}")
        ]
        scored = chain([False] * (2 * len(first)), cycle([False, True]))
        return self._window(self._tokenizer.encode_batch(spans), scored)

    def _window(
        self, spans: list[list[int]], scored: Iterable[bool]
    ) -> tuple[np.ndarray, np.ndarray]:
        length, tokenizer = self._data.length, self._tokenizer
        tokens = np.full(length, tokenizer.eot_id, token_dtype(tokenizer.vocab_size))
        mask, place = np.zeros(length, np.uint8), 1
        for ids, carries_loss in zip(spans, scored, strict=False):
            tokens[place : place + len(ids)] = ids
            mask[place : place + len(ids)] = carries_loss
            place += len(ids)
        return tokens, mask

    def make_training(self, key: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ``number``-th training sample; the first ones follow the curriculum."""
        share = number / self._data.curriculum if number < self._data.curriculum else 1.0
        form = next((form for end, form in _CURRICULUM if share < end), None)
        return self.make(key) if form is None else self.make_pairs(key, form)


class SampleBatches(Batches):
    """Batches of samples, each used once; see ``Batches`` for the other arguments.

    Args:
        data: the task.
        eot_id: the end-of-text token.
        make: makes the tokens and the loss mask, both (data.length,), of a seed and a number.
    """

    def __init__(
        self,
        data: RetrievalData | RecallData,
        eot_id: int,
        make: Callable[[int, int], tuple[np.ndarray, np.ndarray]],
        *args: Any,
    ) -> None:
        super().__init__(*args)
        accepted = f"with data={data.kind} it must be data.length={data.length}"
        refuse(self._seq_len != data.length, f"train.seq_len={self._seq_len}", accepted)
        self._eot, self._make = eot_id, make

    def __next__(self) -> Batch:
        first = self._step * self._batch_size
        rows: list[Row] = []
        for number in (first + row for row in self._rows):
            tokens, mask = self._make(self._seed, number)
            rows.append((np.append(tokens, tokens.dtype.type(self._eot)), np.append(mask, 0)))
        batch = make_batch(rows, f"batch {self._step}, samples from {first}")
        self._step += 1
        return batch


def retrieval_batches(data: RetrievalData, shards: Shards, *args: Any) -> SampleBatches:
    """Batches of the retrieval task, in the training text of ``shards``."""
    samples = Samples(data, shards.tokenizer, shards.train)

    def make(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        return samples.make_training(f"{seed}/{number}", number)

    return SampleBatches(data, shards.tokenizer.eot_id, make, *args)


def retrieval_held_out(data: RetrievalData, shards: Shards) -> HeldOut:
    """Samples of the retrieval task for validation, in the held-out text of ``shards``."""
    samples = Samples(data, shards.tokenizer, shards.held_out(int(data.val_tokens)))
    return held_out(data, shards.tokenizer, lambda number: samples.make(f"held out/{number}"))


def held_out(
    data: RetrievalData | RecallData,
    tokenizer: Tokenizer,
    make: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> HeldOut:
    """Make samples of about ``data.val_tokens`` tokens for validation."""
    made = [make(number) for number in range(max(1, int(data.val_tokens) // data.length))]
    tokens = np.concatenate([*(tokens for tokens, _ in made), made[0][0][:1]])
    mask = np.concatenate([*(mask for _, mask in made), np.zeros(1, np.uint8)])
    scored = tokenizer.decode(tokens[mask > 0].tolist())
    return HeldOut(tokens, mask, len(scored.encode()), np.arange(len(made)))


def train_tokenizer(data: RetrievalData, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the first training documents and on needles."""
    source = Source(data.text(), lambda: documents(data))
    texts = training_texts(source, holdout_threshold(source))
    drawn = (draw_needles(f"tokenizer/{i}", 1, 1, 0.0, data.digits) for i in range(_NEEDLES))
    needles = (needle_of(one.cities[0], one.numbers[0]) + one.question for one in drawn)
    config = BpeTokenizer(vocab_size=vocab_size)
    return make_tokenizer(config, chain(islice(texts, _DOCUMENTS), needles))
