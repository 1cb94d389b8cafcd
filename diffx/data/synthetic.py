"""The synthetic task ``data=retrieval``: samples of needles in text (see needles.py).

A window is one sample: end of text, the text with its needles, the question and its answer, then
the needles that were not asked for. Only the numbers carry loss.
"""

import random
from collections.abc import Iterable
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np

from diffx.config import UserError
from diffx.config.data import BpeTokenizer, RetrievalData
from diffx.data.batches import Batch, Batches, Row, make_batch
from diffx.data.needles import Haystack, draw_needles, needle_of
from diffx.data.prepare import Source, holdout_threshold
from diffx.data.shards import HeldOut, Shards, TokenArray, token_dtype
from diffx.data.sources import documents
from diffx.data.tokenizers import Tokenizer, make_tokenizer

_TEXT_TOKENS = 500_000  # used of the text, at most
_DOCUMENTS, _NEEDLES = (
    20,
    40_000,
)  # of the tokenizer: a city and a short number become one token each
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
    """Makes samples of ``data.length`` tokens.

    Args:
        data: the task.
        tokenizer: of the samples.
        text: the text in which needles are hidden.
    """

    def __init__(self, data: RetrievalData, tokenizer: Tokenizer, text: TokenArray) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._haystack = Haystack(_decoded(text, tokenizer), tokenizer.encode_batch)

    def make(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Make the sample of a key, always the same.

        Returns:
            Its tokens, padded by end-of-text tokens, and their loss mask; both (data.length,).

        Raises:
            UserError: it is longer than ``data.length``.
        """
        data, tokenizer = self._data, self._tokenizer
        choose = random.Random(
            f"{key}/shape"
        )  # another draw than the needles', or a city would reveal its place
        told = choose.randint(1, data.needles)
        needles = draw_needles(
            key, told, choose.randint(1, min(told, data.asked)), choose.random(), data.digits
        )
        rest = list(zip(needles.cities, needles.numbers, strict=True))[needles.asked :]
        choose.shuffle(rest)
        again = [
            (f" {needle_of(city, number)}".removesuffix(f" {number}."), f" {number}.")
            for city, number in rest
        ]
        spans = [
            needles.answer,
            *(text for pair in again for text in pair),
        ]  # scored and not, in turn
        encoded = tokenizer.encode_batch(spans)
        behind = sum(map(len, encoded[1:]))
        try:
            prompt = self._haystack.hide(needles, data.length - 1 - behind).prompt
        except ValueError as error:
            least = 1 + behind + self._haystack.least(needles)
            why = (
                f"a sample may take {least} tokens without text; give more"
                if least > data.length
                else str(error)
            )
            raise UserError(f"data.length={data.length} cannot be used: {why}") from error
        tokens = np.full(data.length, tokenizer.eot_id, token_dtype(tokenizer.vocab_size))
        mask = np.zeros(data.length, np.uint8)
        place = 1
        for scored, ids in zip(
            [False, *[True, False] * len(spans)], [tokenizer.encode(prompt), *encoded], strict=False
        ):
            tokens[place : place + len(ids)] = ids
            mask[place : place + len(ids)] = scored
            place += len(ids)
        return tokens, mask

    def make_pairs(self, key: str, form: tuple[str, str, str]) -> tuple[np.ndarray, np.ndarray]:
        """Make a sample of bare pairs of city and number, then twice as many drawn from them.

        Only the numbers of the second part are scored.

        Args:
            key: of the sample.
            form: texts after a city of the first part, a city of the second part, and a number.

        Returns:
            Tokens and loss mask, as ``make`` does.
        """
        data, tokenizer, choose = self._data, self._tokenizer, random.Random(f"{key}/pairs")
        needles = draw_needles(key, data.needles, 1, 0.0, data.digits)
        told = list(zip(needles.cities, needles.numbers, strict=True))
        again = choose.choices(told, k=2 * len(told))
        spans = [
            text
            for place, (city, number) in enumerate(told + again)
            for text in (f" {city}{form[place >= len(told)]}", f" {number}{form[2]}")
        ]
        encoded = tokenizer.encode_batch(spans)
        used = 1 + sum(map(len, encoded))  # less than the same needles take in sentences
        tokens = np.full(data.length, tokenizer.eot_id, token_dtype(tokenizer.vocab_size))
        mask = np.zeros(data.length, np.uint8)
        tokens[1:used] = list(chain.from_iterable(encoded))
        mask[1:used] = [
            index >= 2 * len(told) and index % 2 for index, ids in enumerate(encoded) for _ in ids
        ]
        return tokens, mask

    def make_training(self, key: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Make the ``number``-th training sample; the first ones follow the curriculum."""
        share = number / self._data.curriculum if number < self._data.curriculum else 1.0
        form = next((form for end, form in _CURRICULUM if share < end), None)
        return self.make(key) if form is None else self.make_pairs(key, form)


class SampleBatches(Batches):
    """Batches of samples, each used once; see ``Batches`` for the other arguments."""

    def __init__(self, data: RetrievalData, shards: Shards, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._seq_len != data.length:
            raise UserError(
                f"train.seq_len={self._seq_len} cannot be used: with data=retrieval it must be "
                f"data.length={data.length}"
            )
        self._samples = Samples(data, shards.tokenizer, shards.train)
        self._eot = shards.tokenizer.eot_id

    def __next__(self) -> Batch:
        first = self._step * self._batch_size
        rows: list[Row] = []
        for number in (first + row for row in self._rows):
            tokens, mask = self._samples.make_training(f"{self._seed}/{number}", number)
            tokens = np.append(tokens, tokens.dtype.type(self._eot))
            rows.append((tokens, np.append(mask, np.uint8(0))))
        batch = make_batch(rows, f"batch {self._step}, samples from {first}")
        self._step += 1
        return batch


def held_out(data: RetrievalData, shards: Shards) -> HeldOut:
    """Make samples of about ``data.val_tokens`` tokens for validation, in held-out text."""
    samples = Samples(data, shards.tokenizer, shards.held_out(int(data.val_tokens)))
    made = [
        samples.make(f"held out/{number}")
        for number in range(max(1, int(data.val_tokens) // data.length))
    ]
    tokens = np.concatenate([*(tokens for tokens, _ in made), made[0][0][:1]])
    mask = np.concatenate([*(mask for _, mask in made), np.zeros(1, np.uint8)])
    scored = shards.tokenizer.decode(tokens[mask > 0].tolist())
    return HeldOut(tokens, mask, len(scored.encode()), np.arange(len(made)))


def train_tokenizer(data: RetrievalData, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the first training documents and on needles."""
    source = Source(data.text(), lambda: documents(data))
    threshold = holdout_threshold(source)
    texts = islice(
        (document.text for document in source.read() if document.key > threshold), _DOCUMENTS
    )
    drawn = (
        draw_needles(f"tokenizer/{number}", 1, 1, 0.0, data.digits) for number in range(_NEEDLES)
    )
    needles = (needle_of(one.cities[0], one.numbers[0]) + one.question for one in drawn)
    return make_tokenizer(BpeTokenizer(vocab_size=vocab_size), chain(texts, needles))


def _decoded(text: TokenArray, tokenizer: Tokenizer) -> Iterable[str]:
    tokens, _ = text.read(0, min(len(text), _TEXT_TOKENS))
    ends = np.flatnonzero(tokens == tokenizer.eot_id)
    return [
        tokenizer.decode(tokens[start + 1 : end].tolist())
        for start, end in pairwise([*ends.tolist(), len(tokens)])
    ]
