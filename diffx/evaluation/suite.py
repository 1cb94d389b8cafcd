"""The interface between suites and the runner.

A suite is a module with three functions, and a fourth for figures that no aggregate gives:

    plan(context) -> list[Example]           the same for every model; UserError for bad settings
    answer(context, examples) -> Iterator[Record]      one record an example, as soon as it is known
    declare(context) -> Declaration          its metrics, tables, pictures and published figures
    figures(context, records) -> Iterable[dict]        more rows of the table of results

A record is a JSON-able dict with ``id``; ``by``, columns of ``diffx.results.table.BY``; ``scores``,
name to figure; optionally ``example``, which pairs models in place of the id, and ``rows``, rows of
the table with further columns; and the model's input and output.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffx.config.checks import refuse
from diffx.config.data import DataConfig, StdlibData
from diffx.config.eval import EvalJob
from diffx.console import Bar, Reporter
from diffx.data.corpus import MAX_CHARACTERS, read_texts
from diffx.evaluation.model import LanguageModel
from diffx.files import read_json
from diffx.results.declare import Declaration
from diffx.results.table import EXAMPLE

Record = dict[str, Any]


@dataclass(slots=True)
class Example:
    """One question to a model: an id, the same for every model, and what the suite needs."""

    id: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a suite works with.

    ``folder`` is that of the results; ``sources`` has the SHA-256 of what the plan reads, by name;
    ``bar`` is the progress display while examples are answered, of which ``answered`` were before.
    """

    job: EvalJob
    lm: LanguageModel
    folder: Path
    reporter: Reporter
    sources: dict[str, str] = field(default_factory=dict)
    bar: Bar | None = None
    answered: int = 0

    @property
    def suite(self) -> Any:
        """The suite's config."""
        return self.job.suite

    @property
    def seed(self) -> int:
        """The job's seed."""
        return self.job.seed

    @property
    def batch(self) -> int | str:
        """Sequences at once, or ``auto``."""
        return self.job.batch

    def limited(self, examples: Any) -> Any:
        """The first ``limit`` of a sequence of examples, or that share of them."""
        limit = self.job.limit
        return examples[: math.ceil(len(examples) * limit) if isinstance(limit, float) else limit]

    def check_length(self, key: str, length: int, more: int = 0) -> None:
        """Raise ``UserError`` if the model cannot read ``length`` tokens and ``more``."""
        limit, needed = self.lm.limit, f", and {more} more are needed" if more else ""
        too_long = limit is not None and length + more > limit
        problem = f"it reads {limit} tokens at most{needed}"
        refuse(too_long, f"{key}={length}", problem, self.lm.name)

    @property
    def data(self) -> DataConfig:
        """The source of text: ``data=``, else the model's training data, else Python's source."""
        return self.job.data or self.lm.loaded.data or StdlibData()

    @cached_property
    def _texts(self) -> tuple[list[str], str]:
        trained, used = (
            [getattr(data, key, None) for key in ("kind", "path", "name")]
            for data in (self.lm.loaded.data, self.data)
        )
        texts, digest = read_texts(self.data, held_out=trained == used)
        path = self.lm.loaded.folder / "data.json"
        if trained == used and self.data.kind in ("text", "stdlib") and path.is_file():
            split = read_json(path).get("val")
            recorded = split.get("bytes") if isinstance(split, dict) else None
            size = sum(len(text.encode()) for text in texts)
            # Of more text only the beginning is read.
            if isinstance(recorded, int) and recorded != size and recorded < MAX_CHARACTERS:
                self.reporter.warn(
                    f"{self.lm.name} held out {recorded:,} bytes of its text, and {size:,} are "
                    "held out today: it may have been trained on a part of them (the text or the "
                    "version of diffx changed)"
                )
        return texts, digest

    def documents(self) -> list[str]:
        """The documents of ``data``, in a fixed order; only held-out ones of the training data."""
        documents, self.sources["data"] = self._texts
        return documents


def rows_of(records: Iterable[Record], declaration: Declaration) -> Iterator[dict[str, Any]]:
    """The table's rows of single examples: a record's ``scores`` and ``rows``."""
    for record in records:
        example = {"example": record.get("example", record["id"]), "aggregate": EXAMPLE}
        scores = [{"metric": name, "value": value} for name, value in record["scores"].items()]
        for row in (*scores, *record.get("rows", ())):
            yield with_unit(example | record["by"] | row, declaration)


def with_unit(row: dict[str, Any], declaration: Declaration) -> dict[str, Any]:
    """The row with the unit and the direction of its metric."""
    metric = declaration.metric(row["metric"])
    return {"unit": metric.unit, "better": metric.better, **row}
