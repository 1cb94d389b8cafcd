"""What a suite declares of its results, as data: metrics, tables, pictures and published figures.

The declaration is saved with the results, so that they can be compared and drawn again from their
folder alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from string import Formatter
from typing import Any

from diffx.results.table import BY

_SAMPLES = {"string": "", "Int64": 0, "Float64": 0.0}  # of the kinds of columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: its name.
        unit: such as ``share``, ``nats``, ``tokens/s``.
        better: ``higher``, ``lower`` or ``none``.
        aggregate: how a group's examples become one figure: ``mean``, ``weighted mean``,
            ``median``; or ``given``, by the suite itself, with no figure an example.
        ratio: models are compared by their ratio, and not by their difference.
    """

    name: str
    unit: str = "share"
    better: str = "higher"
    aggregate: str = "mean"
    ratio: bool = False

    def __post_init__(self) -> None:
        _require(self.better in ("higher", "lower", "none"), f"better={self.better}")
        known = ("mean", "weighted mean", "median", "given")
        _require(self.aggregate in known, f"aggregate={self.aggregate}")


def metrics(names: Iterable[str], **options: Any) -> list[Metric]:
    """Metrics that differ in nothing but their name."""
    return [Metric(name=name, **options) for name in names]


@dataclass(frozen=True, kw_only=True, slots=True)
class Average:
    """An average over a table's groups, each counted once.

    Attributes:
        over: columns whose combinations are the groups.
        by: columns of which each combination has an average of its own.
        label: the row's label; a format string over ``by``.
        metrics: each averaged metric with the metrics that stand for it in a group, the first that
            the group has; null averages each metric that every group has.
    """

    over: list[str]
    by: list[str] = field(default_factory=list)
    label: str = "average"
    metrics: dict[str, list[str]] | None = None

    def __post_init__(self) -> None:
        _check_columns([*self.over, *self.by])
        _check_label(self.label, self.by)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of results: one for each group of examples that share the columns ``by``.

    Attributes:
        by: columns that tell the groups apart.
        label: a group's label; a format string over its columns.
        metrics: the metrics in it; null is all.
        average: an average over the groups.
        compared: comparisons of models have the table too.
    """

    by: list[str]
    label: str
    metrics: list[str] | None = None
    average: Average | None = None
    compared: bool = True

    def __post_init__(self) -> None:
        _check_columns(self.by)
        _check_label(self.label, self.by)
        if isinstance(self.average, Mapping):
            object.__setattr__(self, "average", Average(**self.average))


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A panel, or several of one kind.

    Attributes:
        kind: ``curve``, ``bars``, ``dots`` (single examples), ``heat`` or ``intervals``.
        title: the panel's title; ``{panel}`` is what the panel is of.
        metrics: what is drawn.
        x: the column along the horizontal axis; ``metric`` and ``label`` are possible too.
        y: the column along the vertical axis of a heat map.
        panels: one panel for each value of these columns (or ``metric``, ``unit``).
        series: one line or bar for each value of this column (or ``metric``).
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        log: axes that are logarithmic: ``x``, ``y``, ``xy``.
        limits: of the values.
    """

    kind: str
    title: str
    metrics: list[str] | None = None
    x: str = "label"
    y: str | None = None
    panels: list[str] = field(default_factory=list)
    series: str = "metric"
    xlabel: str = ""
    ylabel: str = ""
    log: str = ""
    limits: list[float | None] | None = None

    def __post_init__(self) -> None:
        known = ("curve", "bars", "dots", "heat", "intervals")
        _require(self.kind in known, f"kind={self.kind}")
        columns = {*BY, "label", "metric", "unit"}
        needed = {self.x, self.series, *self.panels, *([self.y] if self.kind == "heat" else [])}
        _require(needed <= columns, f"columns of the picture {self.title!r}")
        _check_fields(self.title, ["panel"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A figure to stand beside the measured one: published, or what guessing gives.

    Attributes:
        label: what it is of.
        metric: as in the results.
        value: the figure.
        by: columns of the row beside which it stands.
        average: it stands beside the average over groups.
        gain: it is how much higher one model is than another, and stands beside comparisons.
    """

    label: str
    metric: str
    value: float
    by: dict[str, Any] = field(default_factory=dict)
    average: bool = False
    gain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """All that a suite declares.

    Attributes:
        metrics: by name.
        tables: in the order in which they are shown.
        pictures: in the order in which they are drawn.
        references: published figures and guessing.
        notes: sentences that belong below the table and the picture.
    """

    metrics: list[Metric]
    tables: list[Table]
    pictures: list[Picture] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        kinds: dict[str, type] = {
            "metrics": Metric,
            "tables": Table,
            "pictures": Picture,
            "references": Reference,
        }
        try:
            parts = {name: [kind(**item) for item in value[name]] for name, kind in kinds.items()}
            return cls(**parts, notes=[str(note) for note in value["notes"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no declaration of a suite: {error}") from error


def make_label(template: str, columns: Mapping[str, Any]) -> str:
    """Fill a label's template with the columns of a row."""
    return template.format(**columns)


def _check_columns(names: list[str]) -> None:
    unknown = {*names} - BY.keys()
    _require(not unknown, f"columns {', '.join(sorted(unknown))}")


def _check_label(template: str, names: list[str]) -> None:
    _check_fields(template, names)
    make_label(template, {name: _SAMPLES[BY[name]] for name in names})


def _check_fields(template: str, names: list[str]) -> None:
    """A text may come from someone else's file: it may name columns and round figures, no more."""
    for _, name, form, _ in Formatter().parse(template):
        _require(name is None or (name in names and len(form or "") <= 3), f"label={template}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"no declaration of a suite: {what}")
