"""Batches from a stream of the Hugging Face hub, tokenized on the way; a position in it is small and exact."""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from diffx.config.data import HubData
from diffx.data.batches import Batch, check_corpus, check_rows, make_batch
from diffx.data.prepare import encode_documents
from diffx.data.shards import Shards, TokenArray
from diffx.data.sources import hub_dataset, hub_documents

_BLOCK = 1000  # documents read at once where none are shuffled
_GROUP = 64  # documents tokenized at once


class StreamBatches:
    """Endless batches from a data set that is read over and over; see ``WindowBatches`` for the arguments.

    Documents are shuffled within blocks of ``data.shuffle_buffer``: a block's order follows from the seed and the block's
    number, so that a position is the state of the data set at the block's start and a place within the block. Every process
    reads and tokenizes the whole stream and takes its rows; for many processes, token shards cost less.
    """

    def __init__(
        self, data: HubData, shards: Shards, corpus: str, seq_len: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        check_rows(seq_len, batch_size, world_size)
        self._data, self._tokenizer, self._threshold, self._corpus = data, shards.tokenizer, shards.meta["threshold"], corpus
        self._seq_len, self._batch_tokens, self._rows = seq_len, seq_len * batch_size, range(rank, batch_size, world_size)
        self._seed = seed % 2**64
        self._go_to({"step": 0, "offset": 0, "document": {"epoch": 0, "block": 0, "index": 0, "dataset": None}})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(tokens := self._pending_tokens()) <= self._offset + self._batch_tokens:
            self._pending.append(next(self._documents))
        starts = [self._offset + row * self._seq_len for row in self._rows]
        place = self._pending[0][0]
        position = f"batch {self._step} (epoch {place['epoch']}), {self._data.name} from block {place['block']}, document {place['index']}"
        batch = make_batch([tokens.read(start, start + self._seq_len + 1) for start in starts], position)
        self._step += 1
        self._offset += self._batch_tokens
        while self._offset >= len(self._pending[0][1]):
            self._offset -= len(self._pending.popleft()[1])
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-able values."""
        place = self._pending[0][0] if self._pending else self._start
        return {"step": self._step, "offset": self._offset, "document": place, "corpus": self._corpus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            UserError: the data set's first documents or their tokens are not those of that time.
        """
        check_corpus(state, self._corpus)
        self._go_to(state)

    def _go_to(self, state: dict[str, Any]) -> None:
        self._step, self._offset, self._start = state["step"], state["offset"], state["document"]
        self._pending: deque[tuple[dict[str, Any], np.ndarray, np.ndarray | None]] = deque()
        self._documents = self._read(self._start)

    def _pending_tokens(self) -> TokenArray:
        masks = [mask for _, _, mask in self._pending if mask is not None]
        return TokenArray([tokens for _, tokens, _ in self._pending], masks or None)

    def _read(self, place: dict[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray | None]]:
        """Yield the training documents from a place on: the place of each, its tokens and its loss mask."""
        data = self._data
        epoch, block, index, state = (place[key] for key in ("epoch", "block", "index", "dataset"))
        while True:
            dataset = hub_dataset(data)
            if state is not None:
                dataset.load_state_dict(state)
            documents = hub_documents(data, dataset)
            while found := list(itertools.islice(documents, data.shuffle_buffer or _BLOCK)):
                random = np.random.default_rng([self._seed, epoch, block])
                order = random.permutation(len(found)) if data.shuffle_buffer else range(len(found))
                kept = [(found[i].prompt, found[i].text) for i in order if found[i].key > self._threshold]
                for first in range(index, len(kept), _GROUP):
                    encoded = encode_documents(self._tokenizer, kept[first : first + _GROUP], data.prompt_key is not None)
                    for number, (tokens, mask) in enumerate(encoded, first):
                        yield {"epoch": epoch, "block": block, "index": number, "dataset": state}, tokens, mask
                state, block, index = dataset.state_dict(), block + 1, 0
            epoch, block, state = epoch + 1, 0, None
