"""Batches from a data set that is streamed from the Hugging Face hub and tokenized on the way."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from diffx.config.data import HubData
from diffx.data.batches import Batch, Batches, make_batch
from diffx.data.prepare import encode_documents
from diffx.data.shards import Row, Shards, TokenArray
from diffx.data.sources import hub_dataset, hub_documents

_BLOCK = 1000  # documents read at once if they are not shuffled
_GROUP = 64  # documents tokenized at once


class StreamBatches(Batches):
    """Batches from a data set that is read over and over; see ``Batches`` for the other arguments.

    Documents are shuffled within blocks of ``data.shuffle_buffer``. The seed and the number of a
    block give its order, so a position is the data set's state at the start of the block and an
    index within it. Every process tokenizes the whole stream.
    """

    def __init__(self, data: HubData, shards: Shards, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._data, self._tokenizer = data, shards.tokenizer
        self._threshold = shards.meta["threshold"]
        self._go_to({"epoch": 0, "block": 0, "index": 0, "dataset": None}, 0)

    def __next__(self) -> Batch:
        batch_tokens = self._seq_len * self._batch_size
        while len(tokens := self._pending_tokens()) <= self._offset + batch_tokens:
            self._pending.append(next(self._documents))
        starts = [self._offset + row * self._seq_len for row in self._rows]
        place = self._pending[0][0]
        position = (
            f"batch {self._step} (epoch {place['epoch']}), {self._data.name} from block "
            f"{place['block']}, document {place['index']}"
        )
        rows = [tokens.read(start, start + self._seq_len + 1) for start in starts]
        self._step += 1
        self._offset += batch_tokens
        while self._offset >= len(self._pending[0][1][0]):
            self._offset -= len(self._pending.popleft()[1][0])
        return make_batch(rows, position)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON-able values."""
        place = self._pending[0][0] if self._pending else self._start
        return super().state_dict() | {"offset": self._offset, "document": place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position from ``state_dict``; see ``Batches.load_state_dict``."""
        super().load_state_dict(state)
        self._go_to(state["document"], state["offset"])

    def _go_to(self, place: dict[str, Any], offset: int) -> None:
        self._start, self._offset = place, offset
        self._pending: deque[tuple[dict[str, Any], Row]] = deque()
        self._documents = self._read(place)

    def _pending_tokens(self) -> TokenArray:
        masks = [mask for _, (_, mask) in self._pending if mask is not None]
        return TokenArray([tokens for _, (tokens, _) in self._pending], masks or None)

    def _read(self, place: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Row]]:
        """Yield the training documents from a place on."""
        data, seed = self._data, self._seed % 2**64
        epoch, block, index, state = (place[key] for key in ("epoch", "block", "index", "dataset"))
        while True:
            dataset = hub_dataset(data)
            if state is not None:
                dataset.load_state_dict(state)
            stream = hub_documents(data, dataset)
            while documents := list(islice(stream, data.shuffle_buffer or _BLOCK)):
                if data.shuffle_buffer:
                    order = np.random.default_rng([seed, epoch, block]).permutation(len(documents))
                    documents = [documents[i] for i in order]
                documents = [doc for doc in documents if doc.key > self._threshold]
                for first in range(index, len(documents), _GROUP):
                    group, masked = documents[first : first + _GROUP], data.prompt_key is not None
                    encoded = encode_documents(self._tokenizer, group, masked)
                    for number, row in enumerate(encoded, first):
                        place = {"epoch": epoch, "block": block, "index": number, "dataset": state}
                        yield place, row
                state, block, index = dataset.state_dict(), block + 1, 0
            epoch, block, state = epoch + 1, 0, None
