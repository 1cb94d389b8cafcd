"""Demonstrations, queries and labels as tokens, and the label that a model finds likeliest.

Each part is tokenized by itself: a model reads demonstrations once for all queries, and a query
once for all labels.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, groupby
from typing import Any

import torch

from diffx.config.checks import refuse
from diffx.evaluation.icl_tasks import Row, Task
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import in_batches
from diffx.evaluation.suite import Context, Example, Record

_CACHED = 4  # cached tokens of rows after a shared context, as a multiple of a batch's tokens


class Prompts:
    """The parts of a template, which has ``{text}`` and ends with ``{label}``, as tokens.

    Attributes:
        labels: tokens of each label, with the whitespace before it and the template's end, without
            which a label would always be likelier than a longer one that begins with it.
        answers: tokens of each label as an answer to a query: in a chat, a turn.
    """

    def __init__(self, lm: LanguageModel, template: str, labels: Sequence[str]) -> None:
        head, self._tail = template.split("{label}")
        self._lm, self._head, self._names = lm, head.rstrip(), labels
        self._gap = head[len(self._head) :]
        self.labels = self.answers = [self._label(label) for label in labels]
        if lm.suffix:
            self.answers = [lm.encode(label) + lm.closing[:1] for label in labels]

    def _label(self, label: str) -> list[int]:
        """Tokens of a label within a text: alone, many tokenizers treat its ends differently."""
        lm = self._lm
        start, _, before = self._head.partition("{text}")
        end = self._gap + label + self._tail
        tokens, first = lm.encode(before + end + (start or "a")), len(lm.encode(before))
        if lm.decode(tokens[:first]) == before:
            for last in range(first + 1, len(tokens)):
                if lm.decode(tokens[:last]) == before + end:
                    return tokens[first:last]
        return lm.encode(end)

    def queries(self, texts: Iterable[str]) -> list[list[int]]:
        """Tokens of each text in the template up to the label, as after another demonstration."""
        lm, end = self._lm, self._tail[-1:]
        cut = lm.encode(end)
        parts = [self._head.replace("{text}", text) for text in texts]
        encoded = lm.encode_batch([end + part for part in parts])
        return [
            tokens[len(cut) :] if tokens[: len(cut)] == cut else lm.encode(part)
            for part, tokens in zip(parts, encoded, strict=True)
        ]

    def demonstrations(self, rows: Sequence[Row]) -> list[list[int]]:
        """Tokens of each text in the template, with its label."""
        ends = dict(zip(self._names, self.labels, strict=True))
        queries = self.queries(text for text, _ in rows)
        return [query + ends[label] for query, (_, label) in zip(queries, rows, strict=True)]

    def room(self, rows: Sequence[Row], queries: Sequence[Row], tokens: int) -> int:
        """How many of the first rows fit into ``tokens`` with any query and label, or -1."""
        query = max(map(len, self.queries(text for text, _ in queries)))
        fixed = query + max(map(len, self.answers)) + len(self._lm.suffix) + len(self._lm.prefix)
        used = accumulate(map(len, self.demonstrations(rows[:tokens])), initial=fixed)
        return sum(total <= tokens for total in used) - 1


def check_shots(context: Context, task: Task, good: bool, most: int, unit: str = "") -> None:
    """Raise ``UserError`` unless ``suite.shots`` is good: ``most`` demonstrations fit."""
    shots = context.suite.shots
    shots = ",".join(map(str, shots)) if isinstance(shots, list) else shots or "null"
    fit = f"demonstrations{unit} that fit into the model's {context.lm.context} tokens"
    number = f"{task.name} has {max(most, 0)} {fit}; ask for another number, or null"
    refuse(not good, f"suite.shots={shots}", number)


def ask_queries(name: str, pair: str, queries: list[Row], data: dict[str, Any]) -> list[Example]:
    """Queries after the same demonstrations; for comparisons, ``pair`` names a query's example."""
    return [
        Example(f"{name}/{n}", data | {"text": text, "label": label, "example": f"{pair}/{n}"})
        for n, (text, label) in enumerate(queries)
    ]


def likeliest(
    lm: LanguageModel,
    context: list[int],
    queries: Sequence[list[int]],
    labels: Sequence[list[int]],
    batch: int | str = "auto",
) -> Iterator[tuple[int, int, float]]:
    """Find the label with the highest sum of log-probabilities after ``context`` and each query.

    The first token bounds a label's sum from above, so that only labels that can still be the
    highest are read whole. The context may be empty; ``batch`` is queries at once, or ``auto``.

    Yields:
        Index of the query, index of its label, and the label's sum in nats.
    """
    shared = lm.start([context]) if context else None
    firsts = [label[0] for label in labels]
    single = torch.tensor([len(label) == 1 for label in labels])

    def work(indices: list[int]) -> list[tuple[int, int, float]]:
        texts = [queries[index] for index in indices]
        state = lm.start(texts) if shared is None else lm.extend(shared, [0] * len(texts), texts)[0]
        # (n, labels): bounds, and sums where ``whole``
        sums = state.logits.log_softmax(-1)[:, firsts].double().cpu()
        whole = single.repeat(len(texts), 1)
        while True:
            best = sums.argmax(1).tolist()
            rows = [row for row, label in enumerate(best) if not whole[row, label]]
            if not rows:
                highest = sums.max(1).values.tolist()
                return list(zip(indices, best, highest, strict=True))
            _, logits = lm.extend(state, rows, [labels[best[row]][:-1] for row in rows])
            for place, row in enumerate(rows):
                rest = torch.tensor(labels[best[row]][1:], device=logits.device)
                steps = logits[place, : len(rest)].log_softmax(-1)
                sums[row, best[row]] += steps.gather(1, rest[:, None]).sum().item()  # device sync
                whole[row, best[row]] = True

    longest = max(map(len, labels))

    def cost(index: int) -> int:
        read = len(queries[index]) + longest
        return max(read, (len(context) + read) // _CACHED)

    size = batch if lm.pads else 1
    for _, results in in_batches(range(len(queries)), cost, size, lm.device, work):
        yield from results


def classify(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Answer ``icl`` and ``icl_order``: ids with one beginning share demonstrations."""
    lm = context.lm
    for _, group in groupby(examples, lambda example: example.id.rpartition("/")[0]):
        members = list(group)
        first = members[0].data
        prompts = Prompts(lm, context.suite.template, first["labels"])
        demonstrations = prompts.demonstrations(first["demonstrations"])
        shared = lm.prefix + list(chain.from_iterable(demonstrations))
        texts = [example.data["text"] for example in members]
        queries = [query + lm.suffix for query in prompts.queries(texts)]
        for index, label, score in likeliest(lm, shared, queries, prompts.answers, context.batch):
            example, predicted = members[index], first["labels"][label]
            data = example.data
            record = {key: data[key] for key in ("example", "by", "text", "label")}
            record |= {"id": example.id, "predicted": predicted, "log_probability": score}
            record["scores"] = {"accuracy": float(predicted == data["label"])}
            record["tokens"] = len(shared) + len(queries[index])
            if example.id.endswith("/0"):  # the same for all
                record["demonstrations"] = first["demonstrations"]
            yield record | data.get("about", {})
