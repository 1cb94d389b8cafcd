"""Labelled texts: data sets of the hub, JSON lines, and a mapping of invented words."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diffx.config import UserError
from diffx.data.hub import asking_hub
from diffx.errors import reason
from diffx.evaluation.suite import Context
from diffx.files import json_sha256, open_text, parse_json

_CONVERTED = "refs/convert/parquet"  # `datasets` no longer runs a data set's script
# name: (data set, subset, revision, text column, label column, a label that is skipped)
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
        test: rows to take queries from; None without such a split: they come out of ``train``.
    """

    name: str
    labels: list[str]
    train: list[Row]
    test: list[Row] | None

    def draw(self, seed: int, queries: int, by_class: bool) -> tuple[list[Row], list[Row]]:
        """Draw queries and shuffled demonstrations.

        The number of queries changes neither their order nor that of the demonstrations.

        Args:
            seed: of both.
            queries: how many at most.
            by_class: the classes take turns, so that the first k·C demonstrations hold k of each of
                C classes.

        Raises:
            UserError: there are too few rows for the queries.
        """
        choose = random.Random(f"{seed}/{self.name}")
        train, test = list(self.train), None if self.test is None else list(self.test)
        choose.shuffle(train)
        if test is None:
            if queries >= len(train):
                raise UserError(
                    f"suite.queries={queries} cannot be used: {self.name} has {len(train)} texts, "
                    "demonstrations included"
                )
            train, test = train[:-queries], train[: -queries - 1 : -1]
        else:
            choose.shuffle(test)
        return test[:queries], alternate(train, choose) if by_class else train


def alternate(rows: Sequence[Row], choose: random.Random) -> list[Row]:
    """Let the classes take turns: a round has a row of each class with rows left."""
    classes = defaultdict(list)
    for row in rows:
        classes[row[1]].append(row)
    result: list[Row] = []
    for rows_of_round in zip_longest(*(classes[label] for label in sorted(classes))):
        turn = [row for row in rows_of_round if row is not None]
        choose.shuffle(turn)
        result += turn
    return result


def load_tasks(context: Context) -> list[Task]:
    """Load ``suite.tasks``.

    Raises:
        UserError: a task cannot be read or has fewer than two labels, or two have one name.
    """
    names = context.suite.tasks
    tasks = [_load(name, context.suite.labels, context.seed) for name in names]
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise UserError(
                f"suite.tasks={','.join(names)} cannot be used: two tasks would be called "
                f"{task.name}; rename a file"
            )
        if len(task.labels) < 2:
            raise UserError(
                f"suite.tasks={task.name} cannot be used: its texts have {len(task.labels)} "
                "labels; two are needed"
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
        raise UserError(
            f"suite.tasks={name} cannot be used: there is no such file; it must be "
            f"{', '.join(HUB_TASKS)}, synthetic or a path of JSON lines"
        )
    rows = _read_lines(path)
    short = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Task(short, sorted({label for _, label in rows}), rows, None)


def _read_lines(path: Path) -> list[Row]:
    refused = f"suite.tasks={path} cannot be used:"
    try:
        with open_text(path) as file:
            lines = [(n, parse_json(line)) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{refused} {reason(error)}; it must be UTF-8 JSON lines, or those in .gz"
        ) from error
    rows = []
    for number, row in lines:
        values: list[Any] = [None]
        if isinstance(row, dict):
            values = [row.get("text"), row.get("label")]
        if not all(isinstance(value, str) and value.strip() for value in values):
            form = '{"text": "...", "label": "..."}'
            raise UserError(f"{refused} line {number} is not {form}")
        rows.append((values[0].strip(), values[1].strip()))
    return rows


def _from_hub(name: str) -> Task:
    """A data set of the hub; labels have spaces for underscores."""
    import datasets  # slow to import, and most runs need no hub

    path, subset, revision, text, label, skipped = HUB_TASKS[name]
    splits = []
    try:
        for split in ("train", "test"):
            with asking_hub(path):
                rows = datasets.load_dataset(path, subset, revision=revision, split=split)
            names = rows.features[label].int2str
            pairs = [(row[text].strip(), names(row[label])) for row in rows]
            splits.append([(body, tag.replace("_", " ")) for body, tag in pairs if tag != skipped])
    except Exception as error:  # each library has its exceptions
        raise UserError(
            f"suite.tasks={name} cannot be used: {path} cannot be fetched: {reason(error)}; "
            'give a path of JSON lines {"text", "label"} in its place'
        ) from error
    train, test = splits
    return Task(name, sorted({tag for _, tag in train + test}), train, test)


def _synthetic(labels: int, seed: int) -> Task:
    """Invented words, four to each label, which is one too: only the demonstrations tell which."""
    choose = random.Random(f"{seed}/synthetic/{labels}")
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words: list[str] = []
    while len(words) < labels * (1 + _WORDS_A_LABEL):
        word = "".join(choose.choices(syllables, k=2 if len(words) < labels else 3))
        if word not in words:
            words.append(word)
    names = words[:labels]
    texts = [(word, names[place % labels]) for place, word in enumerate(words[labels:])]
    train = choose.choices(texts, k=_SYNTHETIC_ROWS)
    test = choose.choices(texts, k=_SYNTHETIC_QUERIES)
    return Task("synthetic", sorted(names), train, test)
