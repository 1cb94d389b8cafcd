"""From examples to figures: every table of a suite, with standard errors and intervals."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from diffx.results.declare import Average, Declaration, Metric, Table, make_label
from diffx.results.statistics import (
    Interval,
    Statistic,
    bootstrap,
    mean,
    mean_of_means,
    median,
    weighted_mean,
)
from diffx.results.table import AVERAGE, BY, EXAMPLE, by_columns

_STATISTICS: dict[str, Statistic] = {
    "mean": mean,
    "median": median,
    "weighted mean": weighted_mean,
}

Row = dict[str, Any]


def aggregate(frame: pd.DataFrame, declaration: Declaration) -> list[Row]:
    """Work out every row of every table from the rows of single examples.

    Args:
        frame: rows of one evaluation.
        declaration: what its suite declares.

    Returns:
        A dict each: ``label``, ``metric``, ``unit``, ``better``, ``aggregate``, the columns of
        ``BY`` that apply, ``value``, ``stderr``, ``low``, ``high``, ``n`` and ``published``.
        Figures that the suite gave itself stand behind the table whose columns they have.
    """
    examples = frame[frame["aggregate"] == EXAMPLE]
    given = [dict(row) for row in frame[frame["aggregate"] != EXAMPLE].to_dict("records")]
    rows: list[Row] = []
    for table in declaration.tables:
        of_table: list[Row] = []
        for columns, group in groups_of(examples, table):
            label = make_label(table.label, columns)
            for metric, values in _metrics_of(group, table, declaration):
                of_table.append(_figure(label, columns, metric, per_example(values)))
        for row in given:
            if {*by_columns(row)} == {*table.by} and _shows(table, row["metric"]):
                of_table.append(_given(make_label(table.label, by_columns(row)), row))
        order = list(dict.fromkeys(row["label"] for row in of_table))
        rows += sorted(of_table, key=lambda row: order.index(row["label"]))
        if table.average:
            rows += averages(examples, table, table.average, declaration)
    return [row | {"published": references_of(row, declaration)} for row in rows]


def groups_of(examples: pd.DataFrame, table: Table) -> Iterator[tuple[Row, pd.DataFrame]]:
    """The groups of a table, in the order in which they appear: columns, and rows of examples."""
    shown = examples if table.metrics is None else examples[examples["metric"].isin(table.metrics)]
    shown = shown.dropna(subset=table.by) if table.by else shown
    if not table.by:
        if len(shown):
            yield {}, shown
        return
    for key, group in shown.groupby(table.by, sort=False):
        yield by_columns(dict(zip(table.by, key, strict=True))), group


def _metrics_of(
    group: pd.DataFrame, table: Table, declaration: Declaration
) -> Iterator[tuple[Metric, pd.DataFrame]]:
    for name, values in group.groupby("metric", sort=False):
        yield declaration.metric(str(name)), values


def _shows(table: Table, metric: str) -> bool:
    return table.metrics is None or metric in table.metrics


def per_example(values: pd.DataFrame) -> pd.DataFrame:
    """One row an example, (n, [value, weight]); of repeated examples the mean."""
    columns = values[["example", "value", "weight"]].dropna(subset=["value"])
    if columns["example"].is_unique:
        return columns.set_index("example").astype(float)
    return columns.astype({"value": float, "weight": float}).groupby("example", sort=False).mean()


def _figure(label: str, columns: Row, metric: Metric, values: pd.DataFrame) -> Row:
    samples = [values["value"].to_numpy()]
    if metric.aggregate == "weighted mean":
        samples.append(values["weight"].to_numpy())
    statistic = _STATISTICS[metric.aggregate]
    value, n = float(statistic(*samples)), len(values)
    interval = bootstrap(samples, statistic, f"{label}/{metric.name}")
    stderr = interval.stderr
    if metric.aggregate == "mean" and n > 1:
        stderr = float(samples[0].std(ddof=1) / np.sqrt(n))
    return _row(label, columns, metric, metric.aggregate, value, stderr, interval, n)


def _row(
    label: str,
    columns: Row,
    metric: Metric,
    how: str,
    value: float,
    stderr: float | None,
    interval: Interval,
    n: int,
) -> Row:
    return {
        "label": label,
        "metric": metric.name,
        "unit": metric.unit,
        "better": metric.better,
        "aggregate": how,
        **columns,
        "value": value,
        "stderr": stderr,
        "low": interval.low,
        "high": interval.high,
        "n": n,
    }


def _given(label: str, row: Row) -> Row:
    keys = ("metric", "unit", "better", "aggregate")
    figures = {
        key: None if pd.isna(row[key]) else row[key] for key in ("value", "stderr", "low", "high")
    }
    count = None if pd.isna(row["n"]) else int(row["n"])
    return {
        "label": label,
        **{key: row[key] for key in keys},
        **by_columns(row),
        **figures,
        "n": count,
    }


def parts_of_averages(
    examples: pd.DataFrame, table: Table, average: Average
) -> Iterator[tuple[Row, str, dict[Any, pd.DataFrame]]]:
    """For each average: its columns, the metric and each group's values (n, [value, weight]).

    Groups are in the order of their keys, whatever the order of the examples.

    An average that has fewer than two groups, or a group without the metric, is left out.
    """
    scope = Table(by=average.by, label="", metrics=table.metrics)
    for columns, group in groups_of(examples, scope):
        # A group of the average may hold several of the table's, as a group of tasks does.
        parts = dict(iter(group.groupby(average.over)))
        if len(parts) < 2:
            continue
        present = [{*part["metric"]} for part in parts.values()]
        stand_ins = average.metrics or {name: [name] for name in group["metric"].unique()}
        for name, accepted in stand_ins.items():
            chosen = [next((m for m in accepted if m in names), None) for names in present]
            if None in chosen or (name in accepted and name not in chosen):
                continue
            pairs = zip(parts.items(), chosen, strict=True)
            yield columns, name, {k: per_example(p[p["metric"] == m]) for (k, p), m in pairs}


def averages(
    examples: pd.DataFrame, table: Table, average: Average, declaration: Declaration
) -> list[Row]:
    """The averages over a table's groups; each group counts once and is resampled by itself."""
    rows = []
    for columns, name, by_group in parts_of_averages(examples, table, average):
        parts = list(by_group.values())
        if declaration.metric(name).ratio:
            continue  # such as tokens/s: of one model there is no mean over shapes
        label = make_label(average.label, columns)
        samples = [part["value"].to_numpy() for part in parts]
        n = sum(map(len, samples))
        metric = declaration.metric(name)
        value = float(mean_of_means(*samples))
        stderr = None
        if min(map(len, samples)) > 1:
            variances = [sample.var(ddof=1) / len(sample) for sample in samples]
            stderr = float(np.sqrt(np.sum(variances)) / len(samples))
        interval = bootstrap(samples, mean_of_means, f"{label}/{name}", paired=shared(parts))
        rows.append(_row(label, columns, metric, AVERAGE, value, stderr, interval, n))
    return rows


def shared(parts: list[pd.DataFrame]) -> bool:
    """Whether groups have the same examples, which are then drawn together."""
    return all(part.index.equals(parts[0].index) for part in parts[1:])


def references_of(row: Row, declaration: Declaration, gains: bool = False) -> dict[str, float]:
    """The published figures (or gains) that stand beside a row of results, by their label."""
    columns = {name: row[name] for name in BY if name in row}
    average = row["aggregate"] == AVERAGE
    return {
        reference.label: reference.value
        for reference in declaration.references
        if (reference.metric, reference.by) == (row["metric"], columns)
        and (reference.average, reference.gain) == (average, gains)
    }
