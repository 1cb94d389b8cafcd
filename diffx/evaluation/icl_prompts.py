"""Demonstrations, queries and labels as tokens, and the label that a model finds likeliest.

Every piece has tokens of its own, so that a prompt with more demonstrations begins with the tokens of one with fewer, and what
prompts share is computed once: the demonstrations for all queries, a query for all labels.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, groupby

import torch

from diffx.evaluation.icl_tasks import Row
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import in_batches
from diffx.evaluation.suite import Context, Example, Record

_CACHED = (
    4  # rows behind a shared context may hold this many times a batch's tokens in their caches
)


class Prompts:
    """A template's pieces as tokens.

    Args:
        lm: whose tokens.
        template: has ``{text}``, then ``{label}``, and nothing but whitespace behind it.
        labels: all labels of the task.

    Attributes:
        labels: their tokens, in the order given: the whitespace before a label, the label, and the template's end, without which
            a label that begins like a longer one would always be likelier than it.
        answers: tokens of the labels as answers to a query: in a chat, each is a turn of its own.
    """

    def __init__(self, lm: LanguageModel, template: str, labels: Sequence[str]) -> None:
        head, self._tail = template.split("{label}")
        self._lm, self._head, self._names = lm, head.rstrip(), labels
        self._gap = head[len(self._head) :]
        self.labels = [self._label(label) for label in labels]
        self.answers = (
            [lm.encode(label) + lm.closing[:1] for label in labels] if lm.suffix else self.labels
        )

    def _label(self, label: str) -> list[int]:
        """Cut a label's tokens out of a text: alone, many tokenizers would treat its beginning and its end differently."""
        start, _, before = self._head.partition("{text}")
        end = self._gap + label + self._tail
        tokens, first = self._lm.encode(before + end + (start or "a")), len(self._lm.encode(before))
        for last in range(first + 1, len(tokens)):
            if (
                self._lm.decode(tokens[:last]) == before + end
                and self._lm.decode(tokens[:first]) == before
            ):
                return tokens[first:last]
        return self._lm.encode(end)

    def queries(self, texts: Iterable[str]) -> list[list[int]]:
        """Each text in the template, up to where the label begins; as tokens that stand behind another demonstration."""
        behind = self._tail[-1:]
        cut = self._lm.encode(behind)
        pieces = [self._head.replace("{text}", text) for text in texts]
        joined = zip(
            pieces, self._lm.encode_batch([behind + piece for piece in pieces]), strict=True
        )
        return [
            tokens[len(cut) :] if tokens[: len(cut)] == cut else self._lm.encode(piece)
            for piece, tokens in joined
        ]

    def demonstrations(self, rows: Sequence[Row]) -> list[list[int]]:
        """Each text in the template, with its label."""
        ends = dict(zip(self._names, self.labels, strict=True))
        return [
            query + ends[label]
            for query, (_, label) in zip(self.queries(text for text, _ in rows), rows, strict=True)
        ]

    def room(self, rows: Sequence[Row], queries: Sequence[Row], tokens: int) -> int:
        """How many of the first rows fit into so many tokens with the longest query and label; -1 if not even these two do."""
        longest = (
            max(map(len, self.queries(text for text, _ in queries)))
            + max(map(len, self.answers))
            + len(self._lm.suffix)
        )
        used = accumulate(
            map(len, self.demonstrations(rows[:tokens])), initial=len(self._lm.prefix) + longest
        )
        return sum(total <= tokens for total in used) - 1


def likeliest(
    lm: LanguageModel,
    context: list[int],
    queries: Sequence[list[int]],
    labels: Sequence[list[int]],
    batch: int | str = "auto",
) -> Iterator[tuple[int, int, float]]:
    """Find the label with the highest sum of its tokens' log-probabilities behind ``context`` and each query.

    A label's first tokens bound its sum from above, so that only labels that can still win are read to their ends: the result is
    that of reading all of them, for a fraction of the copies of the cache.

    Args:
        lm: the model.
        context: what stands before every query; may be empty.
        queries: one token or more each.
        labels: one token or more each.
        batch: queries at once, or ``auto``.

    Yields:
        Index of the query, index of its label, and the label's sum in nats.
    """
    shared = lm.start([context]) if context else None
    firsts = [label[0] for label in labels]
    single = torch.tensor([len(label) == 1 for label in labels])

    def work(indices: list[int]) -> list[tuple[int, int, float]]:
        texts = [queries[index] for index in indices]
        state = lm.start(texts) if shared is None else lm.extend(shared, [0] * len(texts), texts)[0]
        sums = (
            state.logits.log_softmax(-1)[:, firsts].double().cpu()
        )  # (n, labels): bounds, until they are whole
        whole = single.repeat(len(texts), 1)
        while True:
            best = sums.argmax(1).tolist()
            open_rows = [row for row, label in enumerate(best) if not whole[row, label]]
            if not open_rows:
                return [
                    (index, label, float(sums[row, label]))
                    for row, (index, label) in enumerate(zip(indices, best, strict=True))
                ]
            _, logits = lm.extend(state, open_rows, [labels[best[row]][:-1] for row in open_rows])
            for place, row in enumerate(open_rows):
                rest = torch.tensor(labels[best[row]][1:], device=logits.device)
                steps = logits[place, : len(rest)].log_softmax(-1)
                sums[row, best[row]] += steps.gather(1, rest[:, None]).sum().item()  # device sync
                whole[row, best[row]] = True

    longest = max(map(len, labels))

    def cost(index: int) -> int:
        own = len(queries[index]) + longest
        return max(own, (len(context) + own) // _CACHED)

    for _, found in in_batches(range(len(queries)), cost, batch if lm.pads else 1, lm.device, work):
        yield from found


def classify(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Answer ``icl`` and ``icl_order``: examples whose ids differ in the last part alone share their demonstrations."""
    lm = context.lm
    for _, group in groupby(examples, lambda example: example.id.rpartition("/")[0]):
        members = list(group)
        first = members[0].data
        prompts = Prompts(lm, context.suite.template, first["labels"])
        shared = lm.prefix + list(
            chain.from_iterable(prompts.demonstrations(first["demonstrations"]))
        )
        queries = [
            query + lm.suffix
            for query in prompts.queries(example.data["text"] for example in members)
        ]
        for index, label, score in likeliest(lm, shared, queries, prompts.answers, context.batch):
            data, predicted = members[index].data, first["labels"][label]
            yield {
                "id": members[index].id,
                "example": data["example"],
                "by": data["by"],
                "scores": {"accuracy": float(predicted == data["label"])},
                **data["about"],
                "text": data["text"],
                "label": data["label"],
                "predicted": predicted,
                "log_probability": score,
                "tokens": len(shared) + len(queries[index]),
                **(
                    {"demonstrations": first["demonstrations"]}
                    if members[index].id.endswith("/0")
                    else {}
                ),  # the same for all
            }
