"""Labelled texts: data sets of the hub, JSON lines, and a mapping of invented words."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from diffx.config.checks import refuse
from diffx.data.hub import asking_hub
from diffx.evaluation.suite import Context
from diffx.evaluation.task_rows import check_names, read_rows, refusing, short_name
from diffx.files import json_sha256

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
    """Texts with labels (sorted), to draw demonstrations (``train``) and queries (``test``) from.

    Without ``test``, queries come out of ``train``.
    """

    name: str
    labels: list[str]
    train: list[Row]
    test: list[Row] | None

    def draw(self, seed: int, queries: int, by_class: bool) -> tuple[list[Row], list[Row]]:
        """Draw ``queries`` rows at most, and shuffled demonstrations; the number changes no order.

        ``by_class`` lets the classes take turns: the first k·C demonstrations hold k of each of C
        classes.

        Raises:
            UserError: there are too few rows for the queries.
        """
        choose = random.Random(f"{seed}/{self.name}")
        train, test = list(self.train), list(self.test or ())
        choose.shuffle(train)
        if self.test is None:
            reason = f"{self.name} has {len(train)} texts, demonstrations included"
            refuse(queries >= len(train), f"suite.queries={queries}", reason)
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
    check_names(names, [task.name for task in tasks])
    for task in tasks:
        few = f"its texts have {len(task.labels)} labels; two are needed"
        refuse(len(task.labels) < 2, f"suite.tasks={task.name}", few)
        context.sources[task.name] = json_sha256([task.train, task.test])
    return tasks


def _load(name: str, labels: int, seed: int) -> Task:
    if name == "synthetic":
        return _synthetic(labels, seed)
    if name in HUB_TASKS:
        return _from_hub(name)
    path = Path(name).expanduser()
    known = f"it must be {', '.join(HUB_TASKS)}, synthetic or a path of JSON lines"
    refuse(not path.is_file(), f"suite.tasks={name}", f"there is no such file; {known}")
    rows = []
    for number, row in read_rows(path):
        values = [row.get("text"), row.get("label")] if isinstance(row, dict) else []
        texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
        accepted = '{"text": "...", "label": "..."}'
        refuse(len(texts) < 2, f"suite.tasks={path}", f"line {number} is not {accepted}")
        rows.append((texts[0], texts[1]))
    return Task(short_name(path), sorted({label for _, label in rows}), rows, None)


def _from_hub(name: str) -> Task:
    """A data set of the hub; labels have spaces for underscores."""
    import datasets  # slow to import, and most runs need no hub

    path, subset, revision, text, label, skipped = HUB_TASKS[name]
    splits, advice = [], 'give a path of JSON lines {"text", "label"} in its place'
    for split in ("train", "test"):
        with refusing(f"suite.tasks={name}", f"{path} cannot be fetched", advice), asking_hub(path):
            rows = datasets.load_dataset(path, subset, revision=revision, split=split)
            names = rows.features[label].int2str
            pairs = [(row[text].strip(), names(row[label])) for row in rows]
        splits.append([(body, tag.replace("_", " ")) for body, tag in pairs if tag != skipped])
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
