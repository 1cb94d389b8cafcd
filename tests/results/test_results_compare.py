"""Differences between two models by hand: weights, ratios, averages, and what only one has."""

import numpy as np
import pytest

from diffx.results.compare import compare, examples_apart
from diffx.results.declare import Average, Declaration, Metric, Table
from diffx.results.table import EXAMPLE, make_frame


def rows_of(values, metric="nll", weights=None, **columns):
    """A row for each example: its name and its value."""
    return [
        {"metric": metric, "aggregate": EXAMPLE, "example": name, "value": value, **columns}
        | ({"weight": weights[name]} if weights else {})
        for name, value in values.items()
    ]


def declared(average=None, **options):
    table = Table(by=["task"], label="{task}", average=average)
    return Declaration(metrics=[Metric(name="nll", **options)], tables=[table])


def test_a_weighted_mean_weighs_both_models():
    base, rival = {"a": 1.0, "b": 4.0, "c": 2.0}, {"a": 3.0, "b": 1.0, "c": 2.5}
    base_weights, weights = {"a": 1, "b": 5, "c": 2}, {"a": 4, "b": 1, "c": 3}
    frames = [
        make_frame(rows_of(values, weights=by_example, task="t"))
        for values, by_example in ((base, base_weights), (rival, weights))
    ]
    (row,) = compare(*frames, declared(aggregate="weighted mean"))
    expected = [(1 + 20 + 4) / 8, (12 + 1 + 7.5) / 8]
    assert [row["baseline"], row["value"]] == pytest.approx(expected, rel=1e-12)
    assert row["difference"] == pytest.approx(expected[1] - expected[0], rel=1e-12)
    assert row["low"] < row["difference"] < row["high"] and row["n"] == 3


def test_only_examples_of_both_count_and_the_rest_is_told():
    base = make_frame(rows_of({"a": 1.0, "b": 2.0, "x": 50.0}, task="t"))
    rival = make_frame(rows_of({"b": 5.0, "a": 3.0, "y": -9.0}, task="t"))
    (row,) = compare(base, rival, declared())
    assert (row["baseline"], row["value"], row["difference"], row["n"]) == (1.5, 4.0, 2.5, 2)
    assert examples_apart(base, rival) == 2


def test_an_average_counts_each_group_once_and_a_ratio_is_of_geometric_means():
    groups = {"s": ({"a": 1.0, "b": 4.0, "c": 2.0}, {"a": 2.0, "b": 8.0, "c": 8.0}), "t": None}
    groups["t"] = ({"d": 3.0}, {"d": 6.0})
    frames = [
        make_frame([row for task in groups for row in rows_of(groups[task][i], task=task)])
        for i in (0, 1)
    ]
    rows = compare(*frames, declared(Average(over=["task"]), ratio=True, better="higher"))
    ratios = {row["label"]: row["difference"] for row in rows}
    first, second = (2 * 2 * 4) ** (1 / 3), 2.0
    expected = {"s": first, "t": second, "average": np.sqrt(first * second)}
    assert ratios == pytest.approx(expected, rel=1e-12)
    assert rows[-1]["groups"] == 2 and rows[-1]["n"] == 4 and rows[-1]["low"] is None
