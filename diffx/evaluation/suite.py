"""What suites and the runner hand each other.

A suite is a module with three functions, and a fourth where a figure is no aggregate over examples:

    plan(context) -> list[Example]                        what is asked, always the same; refuses what cannot be measured
    answer(context, examples) -> Iterator[Record]         one record an example, as soon as it is known
    declare(context) -> Declaration                       its metrics, tables, pictures and published figures
    figures(context, records) -> Iterable[dict]           rows of the table of results that the suite works out itself

A record is a JSON-able dict with ``id``; ``by``, the columns of ``diffx.results.table.BY`` that apply; ``scores``, name to figure;
``example``, which pairs models, if it is not the id; ``rows``, rows of the table with columns of their own; and what the model saw
and said.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from diffx.config.data import DataConfig, StdlibData
from diffx.config.eval import EvalJob
from diffx.console import Bar, Reporter
from diffx.data.texts import read_texts
from diffx.evaluation.model import LanguageModel
from diffx.results.declare import Declaration
from diffx.results.table import EXAMPLE

Record = dict[str, Any]


@dataclass(slots=True)
class Example:
    """One thing that a model is asked.

    Attributes:
        id: unique in the suite, and the same for every model.
        data: what the suite needs to ask it.
    """

    id: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a suite works with.

    Attributes:
        job: the job.
        lm: the model.
        folder: where the results go; a suite may keep files of its own in it.
        reporter: for lines and warnings.
        sources: SHA-256 (or revision) of each data source that the plan read; part of the settings hash.
        bar: the progress display, while the examples are answered; a suite may say more on it than records done.
    """

    job: EvalJob
    lm: LanguageModel
    folder: Path
    reporter: Reporter
    sources: dict[str, str] = field(default_factory=dict)
    bar: Bar | None = None

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

    def limited(self, examples: list[Any]) -> list[Any]:
        """The first ``limit`` of a group's examples, or that share of them."""
        limit = self.job.limit
        return examples[: math.ceil(len(examples) * limit) if isinstance(limit, float) else limit]

    @property
    def data(self) -> DataConfig:
        """The text's source: ``data=``, else what the model was trained on, where that is known, else Python's source."""
        return self.job.data or self.lm.loaded.data or StdlibData()

    @cached_property
    def _texts(self) -> tuple[list[str], str]:
        own, data = self.lm.loaded.data, self.data
        seen = own is not None and all(
            getattr(own, key, None) == getattr(data, key, None) for key in ("kind", "path", "name")
        )
        return read_texts(data, held_out=seen)

    def documents(self) -> list[str]:
        """The documents of ``data=``, in a fixed order; of the text that the model was trained on only those that were held out."""
        self.sources["data"] = self._texts[1]
        return self._texts[0]


def rows_of(records: Iterable[Record], declaration: Declaration) -> Iterator[dict[str, Any]]:
    """The table's rows of single examples: a record's ``scores``, and what stands in its ``rows``."""
    for record in records:
        common = {
            "example": record.get("example", record["id"]),
            "aggregate": EXAMPLE,
            **record["by"],
        }
        scores = [{"metric": name, "value": value} for name, value in record["scores"].items()]
        for row in (*scores, *record.get("rows", ())):
            metric = declaration.metric(row["metric"])
            yield {"unit": metric.unit, "better": metric.better} | common | row
