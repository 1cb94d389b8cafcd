"""Log-likelihoods and greedy continuations of many requests, in batches by length."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffx.config import RunError
from diffx.evaluation.model import LanguageModel, log_probabilities

Item = TypeVar("Item")
Result = TypeVar("Result")
Tokens = Sequence[int]
_CPU_BUDGET, _GPU_BUDGET = 2048, 16384  # tokens computed at once with batch=auto
_ALIKE = 0.9  # with batch=auto, least length of a text in a batch, as a share of the longest,
_SMALL = 256  # in batches of more tokens than these: below, padding is cheaper than a small product
_HELD = 16  # cached tokens of a batch, as a multiple of its computed tokens


def in_batches(
    items: Sequence[Item],
    length: Callable[[Item], int],
    batch: int | str,
    device: torch.device,
    work: Callable[[list[Item]], Result],
    alike: float = 0.0,
) -> Iterator[tuple[list[Item], Result]]:
    """Apply ``work`` to batches of items of similar length, the longest first.

    Args:
        items: the items.
        length: tokens of an item.
        batch: items at once, or ``auto``: as many as a budget of tokens holds. Either is halved
            when memory runs out.
        device: where the work runs.
        work: gives the result of a batch.
        alike: with ``auto``, the least length in a batch as a share of the longest.

    Yields:
        A batch and its result.

    Raises:
        RunError: a single item does not fit in memory.
    """
    auto = batch == "auto"
    queue = deque(sorted(items, key=length, reverse=True))  # stable: the same batches each time
    budget = _CPU_BUDGET if device.type == "cpu" else _GPU_BUDGET
    rows = float("inf") if auto else int(batch)

    def fits(taken: list[Item]) -> bool:
        if not auto or not taken:
            return True
        longest = length(taken[0])
        tokens = (len(taken) + 1) * longest
        return tokens <= budget and (tokens <= _SMALL or length(queue[0]) >= alike * longest)

    while queue:
        taken: list[Item] = []
        while queue and len(taken) < rows and fits(taken):
            taken.append(queue.popleft())
        try:
            result = work(taken)
        except torch.OutOfMemoryError as error:
            if len(taken) == 1:
                raise RunError(
                    f"{length(taken[0])} tokens do not fit in the memory of {device}: "
                    "choose shorter inputs or dtype=bf16"
                ) from error
            queue.extendleft(reversed(taken))
            rows = len(taken) // 2
            failed = f"{len(taken)} sequences do not fit in the memory of {device}"
            warnings.warn(f"{failed}: going on with {rows}", stacklevel=2)
            continue
        yield taken, result


def loglikelihoods(
    lm: LanguageModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    batch: int | str = "auto",
) -> list[tuple[float, bool]]:
    """Score continuations of contexts, pairs of one token or more each.

    Returns:
        For each request the sum of the continuation's log-probabilities, in nats, and whether
        greedy decoding gives the continuation.
    """
    contexts: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(requests):
        contexts.setdefault(tuple(context), []).append(index)
    # a context is read once where that saves more than the second pass costs
    shared = [
        context
        for context, indices in contexts.items()
        if len(indices) > 1 and 2 * len(context) >= max(len(requests[i][1]) for i in indices)
    ]
    single = {*range(len(requests))} - {index for context in shared for index in contexts[context]}
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

    def store(indices: list[int], sums: Tensor, greedy: Tensor) -> None:
        lengths = [len(requests[index][1]) for index in indices]
        parts = zip(sums.cpu().double().split(lengths), greedy.cpu().split(lengths), strict=True)
        for index, (part, right) in zip(indices, parts, strict=True):
            scores[index] = float(part.sum()), bool(right.all())

    def score_shared(batch_of: list[tuple[int, ...]]) -> None:
        prefix = lm.start([list(context) for context in batch_of])
        held = max(map(len, batch_of)) // _HELD

        def cost(pair: tuple[int, int]) -> int:
            return max(len(requests[pair[1]][1]), held)

        def extend(pairs: list[tuple[int, int]]) -> None:
            rows = [row for row, _ in pairs]
            targets = [list(requests[index][1]) for _, index in pairs]
            logits = prefix.logits[rows][:, None]  # (n, 1, V)
            if max(map(len, targets)) > 1:  # the extra token of a one-token target is padding
                _, more = lm.extend(prefix, rows, [each[:-1] or each for each in targets])
                logits = torch.cat([logits, more], dim=1)
            flat = torch.tensor(list(chain.from_iterable(targets)), device=logits.device)
            places = zip(logits, targets, strict=True)
            logits = torch.cat([row[: len(target)] for row, target in places])
            store([index for _, index in pairs], *log_probabilities(logits, flat))

        pairs = [(row, i) for row, context in enumerate(batch_of) for i in contexts[context]]
        deque(in_batches(pairs, cost, batch, lm.device, extend), maxlen=0)  # runs all

    def score_single(indices: list[int]) -> None:
        chosen = [requests[index] for index in indices]
        texts = [torch.tensor([*context, *target[:-1]]) for context, target in chosen]
        ids = pad_sequence(texts, batch_first=True, padding_value=lm.tokenizer.eot_id)
        places = [
            (row, len(context) - 1 + step, token)
            for row, (context, target) in enumerate(chosen)
            for step, token in enumerate(target)
        ]
        store(indices, *lm.score(ids, *torch.tensor(places).T))

    def size(index: int) -> int:
        return sum(map(len, requests[index]))

    deque(in_batches(shared, len, batch, lm.device, score_shared, _ALIKE), maxlen=0)
    deque(in_batches(sorted(single), size, batch, lm.device, score_single, _ALIKE), maxlen=0)
    return scores


def generations(
    lm: LanguageModel,
    prompts: Sequence[Tokens],
    max_tokens: int,
    stop: Sequence[str] = (),
    batch: int | str = "auto",
) -> Iterator[tuple[int, str]]:
    """Continue prompts greedily; yields (index, text before the first stop string)."""

    def work(indices: list[int]) -> list[str]:
        drawn = lm.generate([list(prompts[index]) for index in indices], max_tokens, list(stop))
        return [cut(lm.decode(tokens), stop) for tokens in drawn]

    def length(index: int) -> int:
        return len(prompts[index]) + max_tokens

    for indices, texts in in_batches(range(len(prompts)), length, batch, lm.device, work):
        yield from zip(indices, texts, strict=True)


def cut(text: str, stop: Sequence[str]) -> str:
    """The part of a text before the first of the stop strings."""
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]
