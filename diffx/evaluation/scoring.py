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
_HELD = 16  # rows that read behind a cache may hold this many times as many tokens in it


def in_batches(
    items: Sequence[Item], length: Callable[[Item], int], batch: int | str, device: torch.device, work: Callable[[list[Item]], Result]
) -> Iterator[tuple[list[Item], Result]]:
    """Do ``work`` on batches of items of like length, the longest first, so that what does not fit shows at once.

    Args:
        items: what is worked on.
        length: tokens of an item.
        batch: items at once, or ``auto``: as many as a budget of tokens holds. Both are halved where the device's memory ends.
        device: whose memory it is.
        work: done on each batch.

    Raises:
        RunError: one item alone does not fit in memory.
    """
    queue = deque(sorted(items, key=length, reverse=True))  # stable: the same batches each time
    budget = float(_BUDGET.get(device.type, _GPU_BUDGET)) if batch == "auto" else float("inf")
    rows = float("inf") if batch == "auto" else int(batch)
    while queue:
        taken: list[Item] = []
        while queue and len(taken) < rows and (not taken or (len(taken) + 1) * length(taken[0]) <= budget):
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
            warnings.warn(f"{len(taken)} sequences do not fit in the memory of {device}: going on with {rows}", stacklevel=2)
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
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    done = 0

    def shared(batch_of: list[tuple[int, ...]]) -> None:
        prefix = lm.start([list(context) for context in batch_of])
        pairs = [(row, index) for row, context in enumerate(batch_of) for index in contexts[context]]
        pairs.sort(key=lambda pair: -len(requests[pair[1]][1]))
        held, read = max(map(len, batch_of)), len(requests[pairs[0][1]][1])
        budget = _BUDGET.get(lm.device.type, _GPU_BUDGET) if batch == "auto" else int(batch) * (held + read)
        size = max(1, min(_HELD * budget // (held + read), budget // read))
        for first in range(0, len(pairs), size):
            part = pairs[first : first + size]
            rows = [row for row, _ in part]
            targets = [list(requests[index][1]) for _, index in part]
            logits = prefix.logits[rows][:, None]  # (n, 1, V)
            if len(targets[0]) > 1:  # the longest: of the others the first token is read for nothing
                _, more = lm.extend(prefix, rows, [target[:-1] or target for target in targets])
                logits = torch.cat([logits, more], dim=1)
            for (_, index), score in zip(part, _scores(logits, targets), strict=True):
                found[index] = score

    def single(batch_of: list[tuple[int, ...]]) -> None:
        indices = [contexts[context][0] for context in batch_of]
        targets = [list(requests[index][1]) for index in indices]
        texts = [[*requests[index][0], *requests[index][1][:-1]] for index in indices]
        longest = max(map(len, texts))
        ids = torch.tensor([text + [lm.tokenizer.eot_id] * (longest - len(text)) for text in texts])
        firsts = [len(context) - 1 for context in batch_of]  # the place whose logits are of the first target
        start = min(firsts)
        logits = lm.logits(ids, keep=longest - start)
        rows = [logits[row, first - start :] for row, first in enumerate(firsts)]
        for index, row, target in zip(indices, rows, targets, strict=True):
            found[index] = _scores(row[None], [target])[0]

    for work, chosen in ((shared, True), (single, False)):
        keys = [context for context, indices in contexts.items() if (len(indices) > 1) is chosen]
        length = len if chosen else (lambda context: len(context) + len(requests[contexts[context][0]][1]))
        for taken, _ in in_batches(keys, length, batch, lm.device, work):
            done += sum(len(contexts[context]) for context in taken)
            if progress:
                progress(done)
    return found


def generations(
    lm: LanguageModel, prompts: Sequence[Tokens], max_tokens: int, stop: Sequence[str] = (), batch: int | str = "auto"
) -> Iterator[tuple[int, str]]:
    """Continue prompts greedily; yields (index of the prompt, text before the first stop string) batch by batch."""

    def work(batch_of: list[int]) -> list[str]:
        drawn = lm.generate([list(prompts[index]) for index in batch_of], max_tokens, list(stop))
        return [cut(lm.decode(tokens), stop) for tokens in drawn]

    for taken, texts in in_batches(range(len(prompts)), lambda index: len(prompts[index]) + max_tokens, batch, lm.device, work):
        yield from zip(taken, texts, strict=True)


def cut(text: str, stop: Sequence[str]) -> str:
    """The part of a text before the first of the stop strings."""
    return text[: min((text.index(word) for word in stop if word in text), default=len(text))]


def _scores(logits: Tensor, targets: list[list[int]]) -> list[tuple[float, bool]]:
    """Log-probability sums and greediness of targets whose tokens are predicted by the first logits of each row (n, T, V)."""
    longest = max(map(len, targets))
    padded = torch.tensor([target + [-1] * (longest - len(target)) for target in targets], device=logits.device)
    logits = logits[:, :longest]
    real = padded >= 0
    chosen = logits.gather(2, padded.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)
    sums = (chosen.double() * real).sum(1)
    greedy = ((logits.argmax(-1) == padded) | ~real).all(1)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))  # device sync
