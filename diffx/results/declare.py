"""What a suite declares of its results, as data: metrics, tables, pictures and published figures.

It is saved with the results, which can be compared and drawn again from their folder alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from string import Formatter
from typing import Any

from diffx.results.table import BY

_SAMPLES = {"string": "", "Int64": 0, "Float64": 0.0}  # of the kinds of columns


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric."""

    name: str
    unit: str = "share"  # or `nats`, `tokens/s` and so on
    better: str = "higher"  # or `lower` or `none`
    # How a group's examples become one figure: `mean`, `weighted mean` or `median`; `given` is
    # computed by the suite itself, without a figure an example.
    aggregate: str = "mean"
    ratio: bool = False  # models are compared by their ratio instead of their difference

    def __post_init__(self) -> None:
        _require(self.better in ("higher", "lower", "none"), f"better={self.better}")
        known = ("mean", "weighted mean", "median", "given")
        _require(self.aggregate in known, f"aggregate={self.aggregate}")


def metrics(names: Iterable[str], **options: Any) -> list[Metric]:
    """Metrics that differ only in their name."""
    return [Metric(name=name, **options) for name in names]


@dataclass(frozen=True, kw_only=True)
class Average:
    """An average over a table's groups, each counted once."""

    over: list[str]  # columns whose combinations are the groups
    by: list[str] = field(default_factory=list)  # each combination of these has an average
    label: str = "average"  # of the row; a format string over `by`
    # Each averaged metric with the metrics that stand for it in a group, the first that the group
    # has; None averages each metric that every group has.
    metrics: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        _check_label(self.label, self.by, self.over)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of results: one for each group of examples that share the columns ``by``."""

    by: list[str]
    label: str  # of a group; a format string over `by`
    metrics: list[str] | None = None  # None is all
    average: Average | None = None  # over the groups
    compared: bool = True  # comparisons of models have the table too

    def __post_init__(self) -> None:
        _check_label(self.label, self.by)
        if isinstance(self.average, Mapping):
            object.__setattr__(self, "average", Average(**self.average))


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A panel, or several of one kind."""

    kind: str  # `curve`, `bars`, `dots` (single examples), `heat` or `intervals`
    title: str  # `{panel}` is the panel's value of `panels`
    metrics: list[str] | None = None  # None is all
    x: str = "label"  # the column along the horizontal axis, or `metric`
    y: str | None = None  # the column along the vertical axis of a heat map
    panels: list[str] = field(default_factory=list)  # one for each value of these columns
    series: str = "metric"  # the column; each value is one line or bar
    xlabel: str = ""
    ylabel: str = ""
    log: str = ""  # axes that are logarithmic: `x`, `y`, `xy`
    limits: list[float | None] | None = None  # of the values

    def __post_init__(self) -> None:
        known = ("curve", "bars", "dots", "heat", "intervals")
        _require(self.kind in known, f"kind={self.kind}")
        needed = {self.x, self.series, *self.panels, *([self.y] if self.kind == "heat" else [])}
        good = needed <= {*BY, "label", "metric", "unit", "checkpoint"}
        _require(good, f"columns of the picture {self.title!r}")
        _check_fields(self.title, ["panel"])


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A figure to stand beside the measured one: published, or the result of guessing."""

    label: str  # names its source
    metric: str
    value: float
    by: dict[str, Any] = field(default_factory=dict)  # columns of the row beside which it stands
    average: bool = False  # it stands beside the average over groups
    gain: bool = False  # it is a model's gain over another, and stands beside comparisons


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """All that a suite declares."""

    metrics: list[Metric]
    tables: list[Table]
    pictures: list[Picture] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # sentences below the table and the picture

    def __post_init__(self) -> None:
        averaged = {name for t in self.tables if t.average for name in t.average.metrics or ()}
        unknown = averaged - {metric.name for metric in self.metrics}
        _require(not unknown, f"metrics {', '.join(sorted(unknown))}")

    def metric(self, name: str) -> Metric:
        """The metric of this name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def as_json(self) -> dict[str, Any]:
        """The declaration as JSON has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Declaration":
        """Read what ``as_json`` gave.

        Raises:
            ValueError: it is no declaration.
        """
        try:
            return cls(
                metrics=[Metric(**item) for item in value["metrics"]],
                tables=[Table(**item) for item in value["tables"]],
                pictures=[Picture(**item) for item in value["pictures"]],
                references=[Reference(**item) for item in value["references"]],
                notes=[str(note) for note in value["notes"]],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no declaration of a suite: {error}") from error


def _check_label(template: str, by: list[str], others: Iterable[str] = ()) -> None:
    unknown = {*by, *others} - BY.keys()
    _require(not unknown, f"columns {', '.join(sorted(unknown))}")
    _check_fields(template, by)
    template.format(**{name: _SAMPLES[BY[name]] for name in by})


def _check_fields(template: str, names: list[str]) -> None:
    """A text may come from someone else's file: it may name columns and round figures, no more."""
    for _, name, form, _ in Formatter().parse(template):
        _require(name is None or (name in names and len(form or "") <= 3), f"label={template}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"no declaration of a suite: {what}")
