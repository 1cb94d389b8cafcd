"""Differences between two checkpoints, paired by example: a row for each figure that both have."""

import numpy as np
import pandas as pd

from diffx.results.aggregate import Parts, Row, given_of, groups_of, key_of, shared
from diffx.results.declare import Declaration
from diffx.results.statistics import bootstrap, mean_of_means, weighted_difference
from diffx.results.table import AVERAGE, EXAMPLE


def compare(base: pd.DataFrame, rival: pd.DataFrame, declaration: Declaration) -> list[Row]:
    """Compare the rows of two evaluations of a suite with the same settings.

    Returns:
        A dict for each group and metric of which both have examples, and for each figure that the
        suite computes itself: ``label``, ``metric``, ``unit``, ``better``, ``ratio``, the columns
        of ``BY`` that apply, ``baseline``, ``value``, ``difference`` (of a metric with ``ratio``
        the ratio), ``low``, ``high``, ``aggregate``, ``n`` (examples that both have), ``groups``
        (more than 1 in an average) and ``paired`` (``example``; ``none`` has no interval).
    """
    rows: list[Row] = []
    for table in (table for table in declaration.tables if table.compared):
        rivals = {tuple(row.items()): parts for row, parts in groups_of(rival, table, declaration)}
        for row, parts in groups_of(base, table, declaration):
            others = rivals.get(tuple(row.items()), {})
            if parts.keys() != others.keys():
                continue
            joined = {
                key: part.join(others[key].add_suffix("_rival"), how="inner")
                for key, part in parts.items()
            }
            if row["ratio"]:
                names = ["value", "value_rival"]
                joined = {key: p[(p[names] > 0).all(axis=1)] for key, p in joined.items()}
            if all(map(len, joined.values())):
                rows.append(row | _difference(row, joined))
        figures = {tuple(row.items()): given for row, given in given_of(rival, table, declaration)}
        for row, given in given_of(base, table, declaration):
            before, after = given["value"], figures.get(tuple(row.items()), {}).get("value")
            if None not in (before, after):
                whole = {"aggregate": given["aggregate"], "n": 0, "groups": 1, "paired": "none"}
                rows.append(row | _named(before, after, after - before, None, None) | whole)
    return rows


def examples_apart(base: pd.DataFrame, rival: pd.DataFrame) -> int:
    """The number of scores that only one of two evaluations has."""
    of_base, of_rival = (
        {*pd.MultiIndex.from_frame(scored.dropna(subset=["value"])[["metric", "example"]])}
        for scored in (frame[frame["aggregate"] == EXAMPLE] for frame in (base, rival))
    )
    return len(of_base ^ of_rival)


def _difference(row: Row, joined: Parts) -> Row:
    """The figures of a row, of parts (n, [value, weight, value_rival, weight_rival])."""
    parts = list(joined.values())
    into, back = (np.log, np.exp) if row["ratio"] else (np.asarray, np.asarray)
    bases = [into(part["value"].to_numpy()) for part in parts]
    values = [into(part["value_rival"].to_numpy()) for part in parts]
    if row["aggregate"] == "weighted mean" and len(parts) == 1:
        base_weights, weights = (parts[0][name].to_numpy() for name in ("weight", "weight_rival"))
        samples = [values[0], weights, bases[0], base_weights]
        interval = bootstrap(samples, weighted_difference, key_of(row))
        base = np.average(bases[0], weights=base_weights)
        value = np.average(values[0], weights=weights)
    else:
        gaps = [value - base for value, base in zip(values, bases, strict=True)]
        interval = bootstrap(gaps, mean_of_means, key_of(row), paired=shared(joined))
        base, value = mean_of_means(*bases), mean_of_means(*values)
    figures = (base, value, value - base, interval.low, interval.high)
    return _named(*(None if figure is None else float(back(figure)) for figure in figures)) | {
        "aggregate": AVERAGE if len(parts) > 1 else row["aggregate"],
        # Examples that all parts share count once.
        "n": len(parts[0]) if shared(joined) else sum(map(len, parts)),
        "groups": len(parts),
        "paired": "example",
    }


def _named(*figures: float | None) -> Row:
    names = ("baseline", "value", "difference", "low", "high")
    return dict(zip(names, figures, strict=True))
