"""From examples to figures: every table of a suite, with standard errors and intervals."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from diffx.results.declare import Average, Declaration, Metric, Table
from diffx.results.statistics import Statistic, bootstrap, mean_of_means, weighted_mean
from diffx.results.table import AVERAGE, BY, EXAMPLE, by_columns

_STATISTICS: dict[str, Statistic] = {
    "mean": np.mean,
    "median": np.median,
    "weighted mean": weighted_mean,
    AVERAGE: mean_of_means,
}

Row = dict[str, Any]
Parts = dict[Any, pd.DataFrame]  # of each group that is averaged its values, as of `per_example`


def aggregate(frame: pd.DataFrame, declaration: Declaration) -> list[Row]:
    """Work out every row of every table from the rows of single examples.

    Returns:
        A dict each: ``label``, ``metric``, ``unit``, ``better``, ``aggregate``, the columns of
        ``BY`` that apply, ``value``, ``stderr``, ``low``, ``high``, ``n`` and ``published``.
        Figures that the suite computes itself are in each table whose columns they have.
    """
    rows: list[Row] = []
    for table in declaration.tables:
        figures = [row | _figure(row, parts) for row, parts in groups_of(frame, table, declaration)]
        averages = [row for row in figures if row["aggregate"] == AVERAGE]
        of_table = [row for row in figures if row["aggregate"] != AVERAGE]
        of_table += [row | given for row, given in given_of(frame, table, declaration)]
        order = list(dict.fromkeys(row["label"] for row in of_table))
        rows += sorted(of_table, key=lambda row: order.index(row["label"]))
        # A ratio, such as of tokens/s, compares two models: one model has no mean over shapes.
        rows += [row for row in averages if not row["ratio"]]
    for row in rows:
        row |= {"published": references_of(row, declaration)}
        del row["ratio"]
    return rows


def groups_of(
    frame: pd.DataFrame, table: Table, declaration: Declaration
) -> Iterator[tuple[Row, Parts]]:
    """A row, without figures, and the values of a table's groups of examples, then its averages.

    A group has one part; an average has one for each group that it is over, in the order of the
    groups' keys.
    """
    examples = frame[frame["aggregate"] == EXAMPLE]
    for columns, group in _split(examples, table, table.by):
        for name, values in group.groupby("metric", sort=False):
            metric = declaration.metric(str(name))
            yield _row(table.label, columns, metric), {(): per_example(values)}
    if average := table.average:
        for columns, group in _split(examples, table, average.by):
            for name, parts in _averaged(group, average):
                yield _row(average.label, columns, declaration.metric(name)), parts


def _row(template: str, columns: Row, metric: Metric) -> Row:
    row = {"label": template.format(**columns), **asdict(metric)}
    return row | {"metric": row.pop("name")} | columns


def _split(
    examples: pd.DataFrame, table: Table, by: list[str]
) -> Iterator[tuple[Row, pd.DataFrame]]:
    shown = examples if table.metrics is None else examples[examples["metric"].isin(table.metrics)]
    for key, group in shown.groupby(by, sort=False) if by else [((), shown)]:
        yield by_columns(dict(zip(by, key, strict=True))), group


def _averaged(group: pd.DataFrame, average: Average) -> Iterator[tuple[str, Parts]]:
    """Leaves out an average of fewer than two groups, or with a group without the metric."""
    # A group of the average may hold several of the table's, as a group of tasks does.
    parts = dict(iter(group.groupby(average.over)))
    present = [{*part["metric"]} for part in parts.values()]
    stand_ins = average.metrics or {name: [name] for name in group["metric"].unique()}
    for name, accepted in stand_ins.items() if len(parts) > 1 else ():
        chosen = [next((m for m in accepted if m in names), None) for names in present]
        if None not in chosen and (name in chosen or name not in accepted):
            pairs = zip(parts.items(), chosen, strict=True)
            yield name, {key: per_example(p[p["metric"] == m]) for (key, p), m in pairs}


def given_of(
    frame: pd.DataFrame, table: Table, declaration: Declaration
) -> Iterator[tuple[Row, Row]]:
    """A row, without figures, and the figures in a table that a suite computes itself."""
    rows = frame[frame["aggregate"] != EXAMPLE]
    for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
        columns = by_columns(row)
        shown = table.metrics is None or row["metric"] in table.metrics
        if shown and {*columns} == {*table.by}:
            names = ("aggregate", "value", "stderr", "low", "high", "n")
            figures = {name: row[name] for name in names}
            yield _row(table.label, columns, declaration.metric(row["metric"])), figures


def per_example(values: pd.DataFrame) -> pd.DataFrame:
    """One row an example, (n, [value, weight]); of repeated examples the mean."""
    columns = values[["example", "value", "weight"]].dropna(subset=["value"])
    if columns["example"].is_unique:
        return columns.set_index("example").astype(float)
    return columns.astype({"value": float, "weight": float}).groupby("example", sort=False).mean()


def _figure(row: Row, parts: Parts) -> Row:
    """The figures of a row: of several parts the mean, in which each is resampled by itself."""
    how = row["aggregate"] if len(parts) == 1 else AVERAGE
    samples = [part["value"].to_numpy() for part in parts.values()]
    n = sum(map(len, samples))
    if how == "weighted mean":
        samples += [part["weight"].to_numpy() for part in parts.values()]
    statistic = _STATISTICS[how]
    interval = bootstrap(samples, statistic, key_of(row), paired=shared(parts))
    if interval.stderr is not None and how in ("mean", AVERAGE):
        variances = [sample.var(ddof=1) / len(sample) for sample in samples]
        interval = interval._replace(stderr=float(np.sqrt(np.sum(variances)) / len(samples)))
    value = float(statistic(*samples))
    return {"aggregate": how, "value": value, **interval._asdict(), "n": n}


def key_of(row: Row) -> str:
    """The key of a row's bootstrap."""
    return f"{row['label']}/{row['metric']}"


def shared(parts: Parts) -> bool:
    """Whether groups have the same examples, which are then drawn together."""
    first, *others = parts.values()
    return all(part.index.equals(first.index) for part in others)


def references_of(row: Row, declaration: Declaration, gains: bool = False) -> dict[str, float]:
    """The published figures (or gains) that stand beside a row of results, by their label."""
    columns = {name: row[name] for name in BY if name in row}
    place = (row["metric"], columns, row["aggregate"] == AVERAGE, gains)
    return {
        reference.label: reference.value
        for reference in declaration.references
        if (reference.metric, reference.by, reference.average, reference.gain) == place
    }
