"""Associative recall of a run of ``data=recall``, by the number of pairs (see data/recall.py)."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from diffx.config import UserError
from diffx.config.data import RecallData
from diffx.data.recall import SUITE, make_sample
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Declaration, Metric, Picture, Reference, Table

_CHUNK = 1 << 14  # tokens read at once


def plan(context: Context) -> list[Example]:
    """As many samples for each number of pairs, drawn with the seed of the job.

    Raises:
        UserError: the model was not trained on ``data=recall``, cannot read the length, or a sample
            cannot hold so many pairs.
    """
    suite, lm, data = context.suite, context.lm, task_of(context)
    if data.length > (lm.limit or data.length):
        raise UserError(
            f"suite.length={data.length} cannot be used: the model reads {lm.limit} tokens at most"
        )
    counts = numbers_of_pairs(context)
    if max(counts) > data.most:
        raise UserError(
            f"suite.pairs={max(counts)} cannot be used: it must be {data.why_most()}; a larger "
            "suite.length holds more"
        )
    return [
        Example(f"{data.length}/{pairs}/{number}", {"pairs": pairs, "number": number})
        for pairs in counts
        for number in context.limited(range(suite.samples))
    ]


def task_of(context: Context) -> RecallData:
    """The task that the model was trained on, with samples of the suite's length."""
    data = context.lm.loaded.data
    if not isinstance(data, RecallData):
        raise UserError(
            f"suite=recall cannot be used with {context.lm.name}: it was not trained on data=recall"
        )
    length = int(context.suite.length or data.length)
    return dataclasses.replace(data, length=length, pairs=1)


def numbers_of_pairs(context: Context) -> list[int]:
    """The numbers asked for; by default 1, 2, 4 … to as many as a sample can hold."""
    most = task_of(context).most
    return context.suite.pairs or [1 << power for power in range(most.bit_length())]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Score the values of a sample's queries, several samples at once."""
    data = task_of(context)
    size = max(1, _CHUNK // data.length) if context.batch == "auto" else int(context.batch)
    for first in range(0, len(examples), size):
        chunk = examples[first : first + size]
        made = [
            make_sample(data, [SUITE, context.seed, number, pairs], pairs)
            for pairs, number in (example.data.values() for example in chunk)
        ]
        tokens = torch.from_numpy(np.stack([tokens for tokens, _ in made]).astype(np.int64))
        rows, places = torch.from_numpy(np.stack([mask for _, mask in made])).nonzero().T
        targets = tokens[rows, places]
        scores, greedy = context.lm.score(tokens[:, :-1], rows, places - 1, targets)
        for row, example in enumerate(chunk):
            of_row = rows == row
            yield {
                "id": example.id,
                "by": {"length": data.length, "pairs": example.data["pairs"]},
                "scores": {
                    "accuracy": float(greedy.cpu()[of_row].double().mean()),
                    "nll": -float(scores.cpu()[of_row].double().mean()),
                },
                "sample": context.lm.decode(tokens[row].tolist()),
            }


def declare(context: Context) -> Declaration:
    """Accuracy and loss of the queries by the number of pairs."""
    trained, task = context.lm.loaded.data, task_of(context)
    assert isinstance(trained, RecallData)  # plan has refused others
    guesses = [
        Reference(
            label="guessing among the sample's values",
            metric="accuracy",
            value=1 / pairs,
            by={"length": task.length, "pairs": pairs},
        )
        for pairs in numbers_of_pairs(context)
    ]
    pictures = [
        Picture(
            kind="curve",
            title=f"{metric} in {{panel}} tokens",
            metrics=[metric],
            x="pairs",
            panels=["length"],
            xlabel="pairs in a sample",
            log="x",
            limits=[0, most],
        )
        for metric, most in (("accuracy", 1), ("nll", None))
    ]
    return Declaration(
        metrics=[
            Metric(name="accuracy", unit="share of queries right"),
            Metric(name="nll", unit="nats per query", better="lower"),
        ],
        tables=[Table(by=["length", "pairs"], label="{pairs} pairs T={length}")],
        pictures=pictures,
        references=guesses,
        notes=[
            f"Trained on samples of {trained.length} tokens with 1 to {trained.pairs} pairs. "
            "Bands: 95% intervals over samples."
        ],
    )
