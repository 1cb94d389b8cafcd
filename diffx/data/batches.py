"""Batches of token windows, the same for every architecture and for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffx.config import UserError
from diffx.data.shards import HeldOut, TokenArray

IGNORE = -100


@dataclass(slots=True)
class Batch:
    """B windows of T tokens.

    Attributes:
        inputs: tokens, int64 (B, T).
        targets: the tokens that follow, int64 (B, T), -100 where no loss is taken.
        position: where in the data they stand, for messages.
    """

    inputs: Tensor
    targets: Tensor
    position: str


def make_batch(rows: list[tuple[np.ndarray, np.ndarray | None]], position: str) -> Batch:
    """Stack windows of T + 1 tokens and their loss masks."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64))  # (B, T + 1)
    targets = tokens[:, 1:].clone()
    for row, (_, mask) in enumerate(rows):
        if mask is not None:
            targets[row].masked_fill_(torch.from_numpy(mask[1:] == 0), IGNORE)
    return Batch(tokens[:, :-1].contiguous(), targets, position)


class WindowBatches:
    """Endless batches from a ``TokenArray``: each epoch takes all windows of T tokens once, in an order of its own.

    The order depends on the seed only; a process takes rows ``rank::world_size`` of each batch. An epoch's windows start at a
    random offset within the tokens that would be left over, so that none is left out for good.
    """

    def __init__(
        self, tokens: TokenArray, corpus: str, seq_len: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        check_rows(seq_len, batch_size, world_size)
        if len(tokens) <= seq_len:
            raise UserError(f"train.seq_len={seq_len} cannot be used: it must be below the {len(tokens)} tokens of the training text")
        self._tokens, self._corpus, self._seq_len, self._batch_size = tokens, corpus, seq_len, batch_size
        self._seed, self._rank, self._world_size = seed % 2**64, rank, world_size
        self._per_epoch = (len(tokens) - 1) // seq_len
        self._orders: dict[int, np.ndarray] = {}
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._step * self._batch_size
        numbers = range(first + self._rank, first + self._batch_size, self._world_size)
        starts = [int(self._starts(number // self._per_epoch)[number % self._per_epoch]) for number in numbers]
        epoch = first // self._per_epoch
        self._orders = {key: order for key, order in self._orders.items() if key >= epoch}
        position = f"batch {self._step} (epoch {epoch}), training tokens from {_places(starts)}"
        self._step += 1
        return make_batch([self._tokens.read(start, start + self._seq_len + 1) for start in starts], position)

    def _starts(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            random = np.random.default_rng([self._seed, epoch])
            offset = random.integers((len(self._tokens) - 1) % self._seq_len + 1)
            self._orders[epoch] = random.permutation(self._per_epoch) * self._seq_len + offset
        return self._orders[epoch]

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-able values."""
        return {"step": self._step, "corpus": self._corpus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            UserError: the text or its tokens are not those of that time.
        """
        check_corpus(state, self._corpus)
        self._step = state["step"]


def val_batches(held_out: HeldOut, seq_len: int, batch_size: int, eot_id: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Predict every held-out token once; what is short of a window, and of a row for each process, is padded without loss."""
    check_rows(seq_len, batch_size, world_size)
    n_windows = -(-(len(held_out) - 1) // seq_len)
    for first in range(0, n_windows, batch_size):
        last = min(first + batch_size, n_windows)
        last += (first - last) % world_size  # every process has the same number of rows: they may have to meet in each
        starts = [window * seq_len for window in range(first + rank, last, world_size)]
        rows = [_padded(*held_out.read(start, start + seq_len + 1), seq_len + 1, eot_id) for start in starts]
        yield make_batch(rows, f"held-out tokens from {_places(starts)}")


def _places(starts: list[int]) -> str:
    return ", ".join(map(str, starts[:8])) + (" …" if len(starts) > 8 else "")


def _padded(tokens: np.ndarray, mask: np.ndarray | None, length: int, eot_id: int) -> tuple[np.ndarray, np.ndarray | None]:
    missing = length - len(tokens)
    if not missing:
        return tokens, mask
    mask = np.ones(len(tokens), np.uint8) if mask is None else mask
    return np.pad(tokens, (0, missing), constant_values=eot_id), np.pad(mask, (0, missing))


def cu_seqlens(inputs: Tensor, eot_id: int) -> Tensor:
    """Boundaries of the documents in the flattened batch: a document starts at its leading end-of-text token, and at a row's start.

    Args:
        inputs: tokens (B, T).
        eot_id: the end-of-text token.

    Returns:
        int32 (n + 1,), from 0 to B·T.
    """
    starts = inputs == eot_id
    starts[:, 0] = True
    end = torch.tensor([inputs.numel()], device=inputs.device)
    return torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)


def check_rows(seq_len: int, batch_size: int, world_size: int) -> None:
    """Each process must get as many rows as the others."""
    if batch_size % world_size:
        accepted = f"a multiple of train.seq_len={seq_len} times {world_size} processes"
        raise UserError(f"train.batch_tokens={seq_len * batch_size} cannot be used: it must be {accepted}")


def check_corpus(state: dict[str, Any], corpus: str) -> None:
    """A position means nothing in other data."""
    if state["corpus"] != corpus:
        raise UserError("data cannot be used: its text or its tokens are not those that the checkpoint was trained on; start a new run")
