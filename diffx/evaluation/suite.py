"""What suites and the runner hand each other.

A suite is a module with four functions:

    plan(context) -> list[Example]                        what is asked, always the same; refuses what cannot be measured
    answer(context, examples) -> Iterator[Record]         one record an example, as soon as it is known
    summarize(context, records) -> list[Metric]
    draw(context, records, metrics, path)                 the picture

A record is a JSON-able dict with ``id``, ``group`` (a row of the table), ``scores`` (name to figure), and what the model saw and said.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffx.config.data import DataConfig, StdlibData
from diffx.config.eval import EvalJob
from diffx.console import Bar, Reporter
from diffx.data.texts import read_texts
from diffx.evaluation.bootstrap import interval, resampled_means
from diffx.evaluation.model import LanguageModel

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


@dataclass(slots=True)
class Metric:
    """One figure of the results.

    Attributes:
        group: the row: a task, a cell, a layer.
        name: what is measured.
        value: the figure.
        stderr: its standard error, where it is a mean over examples.
        low: lower end of its 95% bootstrap interval.
        high: the upper end.
        n: examples.
        published: the papers' figures for the same, by model.
    """

    group: str
    name: str
    value: float
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 1
    published: dict[str, float] = field(default_factory=dict)


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
        seen = own is not None and all(getattr(own, key, None) == getattr(data, key, None) for key in ("kind", "path", "name"))
        return read_texts(data, held_out=seen)

    def documents(self) -> list[str]:
        """The documents of ``data=``, in a fixed order; of the text that the model was trained on only those that were held out."""
        self.sources["data"] = self._texts[1]
        return self._texts[0]


def mean_metrics(
    records: list[Record], published: Callable[[str, str], dict[str, float]] | None = None, average: bool = True
) -> list[Metric]:
    """Mean, standard error and 95% bootstrap interval of every score in every group, in the order in which groups appear.

    Args:
        records: the records.
        published: the papers' figures for a group and a score.
        average: also the mean over groups of each score that every group has, if there are several groups; these must not share examples.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for name, score in record["scores"].items():
            values.setdefault((record["group"], name), []).append(float(score))
    groups = list(dict.fromkeys(record["group"] for record in records))
    metrics = [_mean(group, name, np.array(scores)) for (group, name), scores in values.items()]
    metrics.sort(key=lambda metric: groups.index(metric.group))
    names = list(dict.fromkeys(name for _, name in values))
    if average and len(groups) > 1:
        for name in names:
            parts = [metric for metric in metrics if metric.name == name]
            if len(parts) == len(groups):
                metrics.append(_average(name, parts, [np.array(values[group, name]) for group in groups]))
    for metric in metrics:
        metric.published = published(metric.group, metric.name) if published else {}
    return metrics


def _mean(group: str, name: str, scores: np.ndarray) -> Metric:
    n = len(scores)
    stderr = float(scores.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    low, high = interval(resampled_means(scores, name)) if n > 1 else (None, None)
    return Metric(group, name, float(scores.mean()), stderr, low, high, n)


def _average(name: str, parts: list[Metric], scores: list[np.ndarray]) -> Metric:
    value = float(np.mean([metric.value for metric in parts]))
    n = sum(metric.n for metric in parts)
    if any(metric.stderr is None for metric in parts):
        return Metric("average", name, value, n=n)
    stderr = float(np.sqrt(sum((metric.stderr or 0.0) ** 2 for metric in parts)) / len(parts))
    # Each group has draws of its own: the same draws for all would tie groups together that do not share examples.
    means = np.mean([resampled_means(own, f"{metric.group}/{name}") for metric, own in zip(parts, scores, strict=True)], axis=0)
    low, high = interval(means)
    return Metric("average", name, value, stderr, low, high, n)
