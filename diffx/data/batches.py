"""Batches of token windows, the same for every architecture and any number of processes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffx.config.checks import refuse, require
from diffx.data.shards import HeldOut, Row, TokenArray

IGNORE = -100


@dataclass(slots=True)
class Batch:
    """B windows of T tokens.

    Attributes:
        inputs: tokens, int64 (B, T).
        targets: the next tokens, int64 (B, T), -100 where no loss is taken.
        position: the place in the data, for messages.
    """

    inputs: Tensor
    targets: Tensor
    position: str


def make_batch(rows: list[Row], position: str) -> Batch:
    """Stack windows of T + 1 tokens and their loss masks."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64))  # (B, T+1)
    targets = tokens[:, 1:].clone()
    for row, (_, mask) in enumerate(rows):
        if mask is not None:
            targets[row].masked_fill_(torch.from_numpy(mask[1:] == 0), IGNORE)
    return Batch(tokens[:, :-1].contiguous(), targets, position)


class Batches(ABC):
    """Base of the endless training batches: ``batch_size`` rows of ``seq_len`` tokens over all.

    A process takes rows ``rank::world_size`` of each batch. ``corpus`` identifies the tokens.
    """

    def __init__(
        self,
        corpus: str,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _check_rows(seq_len, batch_size, world_size)
        self._corpus, self._seq_len, self._batch_size = corpus, seq_len, batch_size
        self._seed, self._rows, self._step = seed, range(rank, batch_size, world_size), 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    @abstractmethod
    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position as JSON-able values."""
        return {"step": self._step, "corpus": self._corpus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position from ``state_dict``.

        Raises:
            UserError: the text or its tokens have changed.
        """
        why = "its text or its tokens are not those that the checkpoint was trained on"
        refuse(state["corpus"] != self._corpus, "data", f"{why}; start a new run")
        self._step = state["step"]


class WindowBatches(Batches):
    """Batches from a ``TokenArray``; see ``Batches`` for the other arguments.

    Each epoch takes all windows of T tokens once, in an order that depends on the seed and the
    epoch, from a random offset, so that no token is omitted in every epoch.
    """

    def __init__(self, tokens: TokenArray, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        accepted = f"below the {len(tokens)} tokens of the training text"
        require(self._seq_len < len(tokens), "train.seq_len", self._seq_len, accepted)
        self._tokens = tokens
        self._per_epoch = (len(tokens) - 1) // self._seq_len
        self._starts = lru_cache(2)(self._shuffled_starts)  # a batch can lie in two epochs

    def __next__(self) -> Batch:
        first = self._step * self._batch_size
        windows = [divmod(first + row, self._per_epoch) for row in self._rows]
        starts = [int(self._starts(epoch)[window]) for epoch, window in windows]
        epoch = first // self._per_epoch
        position = f"batch {self._step} (epoch {epoch}), training tokens from {_listed(starts)}"
        self._step += 1
        rows = [self._tokens.read(start, start + self._seq_len + 1) for start in starts]
        return make_batch(rows, position)

    def _shuffled_starts(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self._seed % 2**64, epoch])
        offset = random.integers((len(self._tokens) - 1) % self._seq_len + 1)
        return random.permutation(self._per_epoch) * self._seq_len + offset


def val_batches(
    held_out: HeldOut,
    seq_len: int,
    batch_size: int,
    eot_id: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Predict every held-out token once; padding carries no loss."""
    _check_rows(seq_len, batch_size, world_size)
    tokens, mask = held_out.read(0, len(held_out))
    n_windows = -(-(len(tokens) - 1) // seq_len)
    padding = (0, (n_windows + world_size) * seq_len + 1 - len(tokens))
    mask = np.pad(np.ones(len(tokens), np.uint8) if mask is None else mask, padding)
    tokens = np.pad(tokens, padding, constant_values=eot_id)
    for first in range(0, n_windows, batch_size):
        last = min(first + batch_size, n_windows)
        # Every process has as many rows as the others: sharded models synchronize in each.
        last += (first - last) % world_size
        starts = [window * seq_len for window in range(first + rank, last, world_size)]
        spans = [slice(start, start + seq_len + 1) for start in starts]
        rows: list[Row] = [(tokens[span], mask[span]) for span in spans]
        yield make_batch(rows, f"held-out tokens from {_listed(starts)}")


def _listed(starts: list[int]) -> str:
    return ", ".join(map(str, starts[:8])) + (" …" if len(starts) > 8 else "")


def cu_seqlens(inputs: Tensor, eot_id: int) -> Tensor:
    """Return the document boundaries of inputs (B, T): int32 (n + 1,), from 0 to B·T.

    A document starts at its leading end-of-text token, and at the start of a row.
    """
    starts = inputs == eot_id
    starts[:, 0] = True
    end = torch.tensor([inputs.numel()], device=inputs.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)


def _check_rows(seq_len: int, batch_size: int, world_size: int) -> None:
    accepted = f"a multiple of train.seq_len={seq_len} times {world_size} processes"
    good = batch_size % world_size == 0
    require(good, "train.batch_tokens", seq_len * batch_size, accepted)
