"""Log-likelihoods and greedy continuations of many requests: in batches by length, with shared contexts read once."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from diffx.config import RunError
from diffx.evaluation.model import LanguageModel

Item = TypeVar("Item")
Result = TypeVar("Result")
Tokens = Sequence[int]
_BUDGET = {"cpu": 2048}  # tokens computed at once where batch=auto
_GPU_BUDGET = 16384
_ALIKE = 0.9  # where batch=auto and texts are only read, the share of the longest's tokens that the shortest of a batch has,
_SMALL = 256  # if the batch has more tokens than these: with fewer a matrix product is slower than padding
_HELD = 16  # rows that read behind a cache may hold this many times as many tokens in it


def in_batches(
    items: Sequence[Item],
    length: Callable[[Item], int],
    batch: int | str,
    device: torch.device,
    work: Callable[[list[Item]], Result],
    alike: float = 0.0,
) -> Iterator[tuple[list[Item], Result]]:
    """Do ``work`` on batches of items of like length, the longest first, so that what does not fit shows at once.

    Args:
        items: what is worked on.
        length: tokens of an item.
        batch: items at once, or ``auto``: as many as a budget of tokens holds. Both are halved where the device's memory ends.
        device: whose memory it is.
        work: done on each batch.
        alike: where ``batch`` is ``auto``, the shortest item of a batch (but for small ones) has this share of the longest's tokens.

    Raises:
        RunError: one item alone does not fit in memory.
    """
    queue = deque(sorted(items, key=length, reverse=True))  # stable: the same batches each time
    budget = float(_BUDGET.get(device.type, _GPU_BUDGET)) if batch == "auto" else float("inf")
    rows = float("inf") if batch == "auto" else int(batch)

    def fits(number: int, longest: int, shortest: int) -> bool:
        return number * longest <= budget and (
            batch != "auto" or number * longest <= _SMALL or shortest >= alike * longest
        )

    while queue:
        taken: list[Item] = []
        while (
            queue
            and len(taken) < rows
            and (not taken or fits(len(taken) + 1, length(taken[0]), length(queue[0])))
        ):
            taken.append(queue.popleft())
        try:
            result = work(taken)
        except torch.OutOfMemoryError as error:
            if len(taken) == 1:
                raise RunError(
                    f"{length(taken[0])} tokens do not fit in the memory of {device}: choose shorter inputs or dtype=bf16"
                ) from error
            queue.extendleft(reversed(taken))
            rows = len(taken) // 2
            warnings.warn(
                f"{len(taken)} sequences do not fit in the memory of {device}: going on with {rows}",
                stacklevel=2,
            )
            continue
        yield taken, result


def loglikelihoods(
    lm: LanguageModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    batch: int | str = "auto",
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, bool]]:
    """Score continuations of contexts.

    Args:
        lm: the model.
        requests: context and continuation, one token or more each.
        batch: contexts at once, or ``auto``.
        progress: called with the number of requests done.

    Returns:
        For each request the sum of its continuation's log-probabilities, in nats, and whether it is what greedy decoding would give.
    """
    contexts: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(requests):
        contexts.setdefault(tuple(context), []).append(index)
    # read once where that spares more than the second pass costs: not where the continuations are all there is to read
    together = [
        context
        for context, own in contexts.items()
        if len(own) > 1 and 2 * len(context) >= max(len(requests[index][1]) for index in own)
    ]
    alone = sorted(
        {*range(len(requests))} - {index for context in together for index in contexts[context]}
    )
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    done = 0

    def shared(batch_of: list[tuple[int, ...]]) -> None:
        prefix = lm.start([list(context) for context in batch_of])
        pairs = [
            (row, index) for row, context in enumerate(batch_of) for index in contexts[context]
        ]
        held = max(map(len, batch_of))

        def behind(part: list[tuple[int, int]]) -> None:
            targets = [list(requests[index][1]) for _, index in part]
            rows = [row for row, _ in part]
            logits = prefix.logits[rows][:, None]  # (n, 1, V)
            if max(map(len, targets)) > 1:  # of targets of one token that token is read for nothing
                _, more = lm.extend(prefix, rows, [target[:-1] or target for target in targets])
                logits = torch.cat([logits, more], dim=1)
            for (_, index), score in zip(part, _scores(logits, targets), strict=True):
                found[index] = score

        for _ in in_batches(
            pairs,
            lambda pair: max(len(requests[pair[1]][1]), held // _HELD),
            batch,
            lm.device,
            behind,
        ):
            pass

    def single(indices: list[int]) -> None:
        targets = [list(requests[index][1]) for index in indices]
        texts = [[*requests[index][0], *requests[index][1][:-1]] for index in indices]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [lm.tokenizer.eot_id] * (longest - len(text)) for text in texts])
        rows = torch.tensor([row for row, target in enumerate(targets) for _ in target])
        places = torch.tensor(
            [
                len(requests[index][0]) - 1 + step
                for index in indices
                for step in range(len(requests[index][1]))
            ]
        )
        tokens = torch.tensor([token for target in targets for token in target], device=lm.device)
        scores, greedy = lm.score(ids, rows, places, tokens)
        lengths = list(map(len, targets))
        for index, score, right in zip(
            indices, scores.double().split(lengths), greedy.split(lengths), strict=True
        ):
            found[index] = (float(score.sum()), bool(right.all()))  # device sync

    for batch_of, _ in in_batches(together, len, batch, lm.device, shared, _ALIKE):
        done += sum(len(contexts[context]) for context in batch_of)
        if progress:
            progress(done)
    for indices, _ in in_batches(
        alone, lambda index: sum(map(len, requests[index])), batch, lm.device, single, _ALIKE
    ):
        done += len(indices)
        if progress:
            progress(done)
    return found


def generations(
    lm: LanguageModel,
    prompts: Sequence[Tokens],
    max_tokens: int,
    stop: Sequence[str] = (),
    batch: int | str = "auto",
) -> Iterator[tuple[int, str]]:
    """Continue prompts greedily; yields (index of the prompt, text before the first stop string) batch by batch."""

    def work(batch_of: list[int]) -> list[str]:
        drawn = lm.generate([list(prompts[index]) for index in batch_of], max_tokens, list(stop))
        return [cut(lm.decode(tokens), stop) for tokens in drawn]

    for taken, texts in in_batches(
        range(len(prompts)), lambda index: len(prompts[index]) + max_tokens, batch, lm.device, work
    ):
        yield from zip(taken, texts, strict=True)


def cut(text: str, stop: Sequence[str]) -> str:
    """The part of a text before the first of the stop strings."""
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]


def _scores(logits: Tensor, targets: list[list[int]]) -> list[tuple[float, bool]]:
    """Log-probability sums and greediness of targets whose tokens are predicted by the first logits of each row (n, T, V)."""
    longest = max(map(len, targets))
    padded = torch.tensor(
        [target + [-1] * (longest - len(target)) for target in targets], device=logits.device
    )
    logits = logits[:, :longest]
    real = padded >= 0
    chosen = logits.gather(2, padded.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)
    sums = (chosen.double() * real).sum(1)
    greedy = ((logits.argmax(-1) == padded) | ~real).all(1)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))  # device sync
