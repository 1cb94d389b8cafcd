"""The interface between suites and the runner.

A suite is a module with three functions, and a fourth for figures that no aggregate gives:

    plan(context) -> list[Example]              the same for every model; refuses bad settings
    answer(context, examples) -> Iterator[Record]      one record an example, as soon as it is known
    declare(context) -> Declaration             its metrics, tables, pictures and published figures
    figures(context, records) -> Iterable[dict]         more rows of the table of results

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
    """One question to a model.

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
        folder: the folder of results.
        reporter: for lines and warnings.
        sources: SHA-256 (or revision) of each data source that the plan read; part of the settings
            hash.
        bar: the progress display while examples are answered.
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

    def limited(self, examples: Any) -> Any:
        """The first ``limit`` of a sequence of examples, or that share of them."""
        limit = self.job.limit
        return examples[: math.ceil(len(examples) * limit) if isinstance(limit, float) else limit]

    @property
    def data(self) -> DataConfig:
        """The source of text: ``data=``, else the model's training data, else Python's source."""
        return self.job.data or self.lm.loaded.data or StdlibData()

    @cached_property
    def _texts(self) -> tuple[list[str], str]:
        trained, keys = self.lm.loaded.data, ("kind", "path", "name")
        held_out = trained is not None and all(
            getattr(trained, key, None) == getattr(self.data, key, None) for key in keys
        )
        texts, digest = read_texts(self.data, held_out=held_out)
        path = self.lm.loaded.folder / "data.json"
        if held_out and self.data.kind in ("text", "stdlib") and path.is_file():
            split = read_json(path).get("val")
            recorded = split.get("bytes") if isinstance(split, dict) else None
            size = sum(len(text.encode()) for text in texts)
            # Of more text only the beginning is read.
            if isinstance(recorded, int) and recorded != size and recorded < MAX_CHARACTERS:
                self.reporter.warn(
                    f"{self.lm.name} held out {recorded:,} bytes of its text, and {size:,} are "
                    "held out today (the text changed, or another version of diffx split it): it "
                    "may have been trained on a part of them"
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
            metric = declaration.metric(row["metric"])
            unit = {"unit": metric.unit, "better": metric.better}
            yield unit | example | record["by"] | row
