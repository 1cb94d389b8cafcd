"""Differences between two checkpoints, paired by example: a row for each figure that both have."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from diffx.results.aggregate import Row, groups_of, parts_of_averages, per_example, shared
from diffx.results.declare import Declaration, Metric, Table, make_label
from diffx.results.statistics import Interval, bootstrap, mean_of_means, weighted_difference
from diffx.results.table import AVERAGE, EXAMPLE, by_columns

Group = tuple[str, Row, str, dict[Any, pd.DataFrame]]  # label, columns, metric, values by part


def compare(base: pd.DataFrame, rival: pd.DataFrame, declaration: Declaration) -> list[Row]:
    """Compare two evaluations of a suite with the same settings.

    Args:
        base: the baseline's rows.
        rival: the other model's rows.
        declaration: what the suite declares.

    Returns:
        A dict for each group and metric of which both have examples, and for each figure that is
        given as a whole: ``label``, ``metric``, ``unit``, ``better``, the columns of ``BY`` that
        apply, ``baseline``, ``value``, ``difference`` (of a metric with ``ratio`` the ratio),
        ``low``, ``high``, ``n`` (examples that both have), ``groups`` (more than 1 in an average)
        and ``paired`` (``example``; ``none`` has no interval).
    """
    rows: list[Row] = []
    for table in declaration.tables:
        if not table.compared:
            continue
        rival_groups = {
            (*columns.items(), metric, *parts): parts
            for _, columns, metric, parts in _groups(rival, table)
        }
        for label, columns, name, parts in _groups(base, table):
            others = rival_groups.get((*columns.items(), name, *parts))
            if others is None:
                continue
            metric = declaration.metric(name)
            pairs = zip(parts.values(), others.values(), strict=True)
            joined = [part.join(other.add_suffix("_rival"), how="inner") for part, other in pairs]
            if metric.ratio:
                joined = [part[(part[["value", "value_rival"]] > 0).all(axis=1)] for part in joined]
            if all(map(len, joined)):
                rows.append(_difference(label, columns, metric, joined))
        rows += _given(base, rival, table)
    return rows


def examples_apart(base: pd.DataFrame, rival: pd.DataFrame) -> int:
    """The number of scores that only one of two evaluations has."""
    sets = []
    for frame in (base, rival):
        scored = frame[(frame["aggregate"] == EXAMPLE) & frame["value"].notna()]
        sets.append(set(scored[["metric", "example"]].itertuples(index=False, name=None)))
    return len(sets[0] ^ sets[1])


def _groups(frame: pd.DataFrame, table: Table) -> Iterator[Group]:
    """The groups of a table with one part each, then its averages with a part for each group."""
    examples = frame[frame["aggregate"] == EXAMPLE]
    for columns, group in groups_of(examples, table):
        for name, values in group.groupby("metric", sort=False):
            yield make_label(table.label, columns), columns, str(name), {(): per_example(values)}
    if table.average:
        for columns, name, parts in parts_of_averages(examples, table, table.average):
            yield make_label(table.average.label, columns), columns, name, parts


def _difference(label: str, columns: Row, metric: Metric, joined: list[pd.DataFrame]) -> Row:
    """One row out of the parts, each (n, [value, weight, value_rival, weight_rival])."""
    key = f"{label}/{metric.name}"
    into, back = (np.log, np.exp) if metric.ratio else (np.asarray, np.asarray)
    bases = [into(part["value"].to_numpy()) for part in joined]
    values = [into(part["value_rival"].to_numpy()) for part in joined]
    if metric.aggregate == "weighted mean" and len(joined) == 1:
        weights = [joined[0][name].to_numpy() for name in ("weight_rival", "weight")]
        samples = [values[0], weights[0], bases[0], weights[1]]
        interval = bootstrap(samples, weighted_difference, key)
        value = np.average(values[0], weights=weights[0])
        base = np.average(bases[0], weights=weights[1])
    else:
        gaps = [value - base for value, base in zip(values, bases, strict=True)]
        interval = bootstrap(gaps, mean_of_means, key, paired=shared(joined))
        value, base = mean_of_means(*values), mean_of_means(*bases)
    ends = [None if end is None else float(back(end)) for end in (interval.low, interval.high)]
    # Examples that all parts share count once.
    n = len(joined[0]) if shared(joined) else sum(map(len, joined))
    figures = [float(back(figure)) for figure in (base, value, value - base)]
    return _row(label, columns, metric, figures, Interval(low=ends[0], high=ends[1])) | {
        "aggregate": AVERAGE if len(joined) > 1 else metric.aggregate,
        "n": n,
        "groups": len(joined),
        "paired": "example",
    }


def _given(base: pd.DataFrame, rival: pd.DataFrame, table: Table) -> Iterator[Row]:
    """Figures that are given as a whole, such as the largest of all."""

    def figures(frame: pd.DataFrame) -> dict[Any, Row]:
        rows = frame[(frame["aggregate"] != EXAMPLE) & frame["value"].notna()].to_dict("records")
        of_table = [row for row in rows if {*by_columns(row)} == {*table.by}]
        shown = [row for row in of_table if table.metrics is None or row["metric"] in table.metrics]
        return {(row["metric"], *by_columns(row).items()): row for row in shown}

    others = figures(rival)
    for identity, row in figures(base).items():
        if identity in others:
            metric = Metric(name=row["metric"], unit=row["unit"], better=row["better"])
            values = [row["value"], others[identity]["value"]]
            columns = by_columns(row)
            values.append(values[1] - values[0])
            given = _row(make_label(table.label, columns), columns, metric, values, Interval())
            yield given | {"aggregate": row["aggregate"], "n": 0, "groups": 1, "paired": "none"}


def _row(label: str, columns: Row, metric: Metric, figures: list[float], interval: Interval) -> Row:
    names = ("baseline", "value", "difference")
    return {
        "label": label,
        "metric": metric.name,
        "unit": metric.unit,
        "better": metric.better,
        "ratio": metric.ratio,
        **columns,
        **dict(zip(names, figures, strict=True)),
        "low": interval.low,
        "high": interval.high,
    }
