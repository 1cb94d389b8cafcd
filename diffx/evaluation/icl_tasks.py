"""Labelled texts for in-context classification: data sets of the hub, JSON lines, and a mapping of invented words."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from diffx.config import UserError
from diffx.data.hub import asking_hub
from diffx.errors import reason
from diffx.evaluation.suite import Context
from diffx.files import json_sha256, open_text, parse_json

_CONVERTED = "refs/convert/parquet"  # the hub's own conversion: `datasets` no longer runs a data set's script
# name: (data set, subset, revision, text column, label column, a label that is left out)
HUB_TASKS: dict[str, tuple[str, str | None, str | None, str, str, str | None]] = {
    "trec": ("CogComp/trec", None, _CONVERTED, "text", "coarse_label", None),
    "trec_fine": ("CogComp/trec", None, _CONVERTED, "text", "fine_label", None),
    "banking77": ("PolyAI/banking77", None, _CONVERTED, "text", "label", None),
    "clinc150": ("clinc/clinc_oos", "plus", None, "text", "intent", "oos"),
}
_SYNTHETIC_ROWS, _SYNTHETIC_QUERIES, _WORDS_A_LABEL = 16384, 1024, 4
Row = tuple[str, str]  # a text and its label


@dataclass(frozen=True, slots=True)
class Task:
    """Texts with labels.

    Attributes:
        name: as results name it.
        labels: all labels, sorted.
        train: rows to take demonstrations from.
        test: rows to take queries from; None where the data has no such split, and they come out of ``train``.
    """

    name: str
    labels: list[str]
    train: list[Row]
    test: list[Row] | None

    def draw(self, seed: int, queries: int, by_class: bool) -> tuple[list[Row], list[Row]]:
        """Draw queries, and demonstrations in an order of which every suite takes the first ones.

        Neither a query's number nor the demonstrations depend on how many queries are asked for, but for those that then lack.

        Args:
            seed: of both.
            queries: how many at most.
            by_class: the classes take turns in the order, each round in an order of its own, so that the first k·C rows hold
                k of each of C classes; otherwise it is a plain shuffle.

        Raises:
            UserError: there are too few rows for the queries.
        """
        choose = random.Random(f"{seed}/{self.name}")
        train, test = list(self.train), None if self.test is None else list(self.test)
        choose.shuffle(train)
        if test is None:
            if queries >= len(train):
                raise UserError(
                    f"suite.queries={queries} cannot be used: {self.name} has {len(train)} texts, demonstrations included"
                )
            train, test = train[:-queries], train[: -queries - 1 : -1]
        else:
            choose.shuffle(test)
        return test[:queries], alternate(train, choose) if by_class else train


def alternate(rows: Sequence[Row], choose: random.Random) -> list[Row]:
    """Let the classes take turns: each round has one row of every class that has one left, in an order of its own."""
    classes = defaultdict(list)
    for row in rows:
        classes[row[1]].append(row)
    rounds = [
        [row for row in turn if row is not None]
        for turn in zip_longest(*(classes[label] for label in sorted(classes)))
    ]
    for turn in rounds:
        choose.shuffle(turn)
    return list(chain.from_iterable(rounds))


def load_tasks(context: Context) -> list[Task]:
    """Load ``suite.tasks``.

    Raises:
        UserError: a task that cannot be read, has fewer than two labels, or two of one name.
    """
    names = context.suite.tasks
    tasks = [_load(name, context.suite.labels, context.seed) for name in names]
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise UserError(
                f"suite.tasks={','.join(names)} cannot be used: two tasks would be called {task.name}; rename a file"
            )
        if len(task.labels) < 2:
            raise UserError(
                f"suite.tasks={task.name} cannot be used: its texts have {len(task.labels)} labels; two are needed"
            )
        context.sources[task.name] = json_sha256([task.train, task.test])
    return tasks


def _load(name: str, labels: int, seed: int) -> Task:
    if name == "synthetic":
        return _synthetic(labels, seed)
    if name in HUB_TASKS:
        return _from_hub(name)
    path = Path(name).expanduser()
    if not path.is_file():
        known = ", ".join([*HUB_TASKS, "synthetic"])
        raise UserError(
            f"suite.tasks={name} cannot be used: there is no such file; it must be {known} or a path of JSON lines"
        )
    rows = _read_lines(path)
    short = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Task(short, sorted({label for _, label in rows}), rows, None)


def _read_lines(path: Path) -> list[Row]:
    rows = []
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = parse_json(line)
                    values = [
                        str(row[key]).strip()
                        for key in ("text", "label")
                        if isinstance(row, dict) and isinstance(row.get(key), str)
                    ]
                    if len(values) < 2 or not all(values):
                        raise UserError(
                            f'suite.tasks={path} cannot be used: line {number} is not {{"text": "...", "label": "..."}}'
                        )
                    rows.append((values[0], values[1]))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"suite.tasks={path} cannot be used: {reason(error)}; it must be UTF-8 JSON lines, or those in .gz"
        ) from error
    return rows


def _from_hub(name: str) -> Task:
    """A label reads as the data set names it, with spaces for underscores."""
    import datasets  # slow to import, and most runs need no hub

    where, subset, revision, text, label, left_out = HUB_TASKS[name]
    try:
        with asking_hub(where):
            splits = [
                datasets.load_dataset(where, subset, revision=revision, split=split)
                for split in ("train", "test")
            ]
        train, test = (
            [(row[text].strip(), split.features[label].int2str(row[label])) for row in split]
            for split in splits
        )
    except Exception as error:  # any library below may fail here, each with an exception of its own
        local = 'give a path of JSON lines {"text", "label"} in its place'
        raise UserError(
            f"suite.tasks={name} cannot be used: {where} cannot be fetched: {reason(error)}; {local}"
        ) from error
    train, test = (
        [(body, tag.replace("_", " ")) for body, tag in rows if tag != left_out]
        for rows in (train, test)
    )
    return Task(name, sorted({tag for _, tag in train + test}), train, test)


def _synthetic(labels: int, seed: int) -> Task:
    """Invented words, of which four belong to each label, an invented word too: only the demonstrations tell which."""
    choose = random.Random(f"{seed}/synthetic/{labels}")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words: list[str] = []
    while len(words) < labels * (1 + _WORDS_A_LABEL):
        word = "".join(choose.choices(syllables, k=2 if len(words) < labels else 3))
        if word not in words:
            words.append(word)
    names = words[:labels]
    texts = [(word, names[place % labels]) for place, word in enumerate(words[labels:])]
    train, test = (
        choose.choices(texts, k=_SYNTHETIC_ROWS),
        choose.choices(texts, k=_SYNTHETIC_QUERIES),
    )
    return Task("synthetic", sorted(names), train, test)
