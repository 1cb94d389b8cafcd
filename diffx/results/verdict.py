"""What a comparison shows, as sentences made of its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

FEW = 10  # examples below which no verdict is given


def headline(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that sum a metric up: its averages, or its only group; else the first's groups."""
    paired = [row for row in rows if row["n"]]
    metrics = dict.fromkeys(row["metric"] for row in paired)
    by_metric = [[row for row in paired if row["metric"] == metric] for metric in metrics]
    chosen = [
        row for of_metric in by_metric for row in of_metric
        if row["groups"] > 1 or len(of_metric) == 1
    ]
    return chosen or [row for of_metric in by_metric[:1] for row in of_metric]


def verdict_on_difference(
    suite: str, base: str, rival: str, row: Mapping[str, Any], several: bool
) -> str:
    """Say whether a rival differs from the baseline on one row of a comparison.

    Args:
        suite: its name.
        base: the baseline's name.
        rival: the other model's name.
        row: of ``diffx.results.compare``.
        several: the comparison has several groups, so that the row's is named.
    """
    metric = f"{suite} {row['metric']}" + (f" ({row['label']})" if several else "")
    gap = signed(row["difference"])
    if row["low"] is None or row["n"] < FEW:
        few = f"in too few examples ({row['n']})"
        return f"No verdict on {metric}: {rival} differs from {base} by {gap} {few}."
    gap += f" [{signed(row['low'])}, {signed(row['high'])}] over {row['n']} examples"
    if row["low"] <= 0 <= row["high"]:
        return f"No difference can be told between {rival} and {base} on {metric}: {gap}."
    direction = "higher" if row["difference"] > 0 else "lower"
    better = {"higher": row["difference"] > 0, "lower": row["difference"] < 0}.get(row["better"])
    judged = "" if better is None else ", which is better" if better else ", which is worse"
    return f"{rival} scores {direction} than {base} on {metric}{judged}: {gap}."


def signed(value: float) -> str:
    """A difference with its sign, to three decimals."""
    return f"{value:+.3f}" if abs(value) < 100 else f"{value:+,.1f}"


_EQUAL = 5e-5  # a change that is smaller is shown as 0


def cost_of_bits(cost: Mapping[str, Any]) -> str:
    """A change for the worse with its interval."""
    texts = {
        key: None if cost[key] is None else f"{cost[key] if abs(cost[key]) >= _EQUAL else 0.0:+.4f}"
        for key in ("loss", "low", "high")
    }
    interval = "" if texts["low"] is None else f" [{texts['low']}, {texts['high']}]"
    return f"{texts['loss']}{interval}"


def verdicts_on_bits(models: Sequence[Mapping[str, Any]], exact: int) -> list[str]:
    """What each number of bits costs; who loses less is said where the intervals tell it.

    Args:
        models: each with its ``label`` and ``by_bits``, of each width its ``loss``, ``low``,
            ``high`` and ``n``.
        exact: the width of the model as it is.
    """
    lines = []
    for bits in sorted(set.intersection(*({*m["by_bits"]} for m in models)) - {exact}, reverse=True):
        costs = sorted(
            ((model["by_bits"][bits], model["label"]) for model in models),
            key=lambda pair: pair[0]["loss"],
        )
        told = ", ".join(f"{label} {cost_of_bits(cost)}" for cost, label in costs)
        line = f"Change for the worse at {bits} bits: {told}."
        (least, first), (most, last) = costs[0], costs[-1]
        gap, n = most["loss"] - least["loss"], min(cost["n"] for cost, _ in costs)
        known = least["high"] is not None and most["low"] is not None
        if len(costs) > 1 and gap < _EQUAL:
            line += " They lose alike."
        elif len(costs) > 1 and n < FEW:
            line += f" No verdict: {n} examples are too few."
        elif len(costs) > 1 and known and least["high"] < most["low"]:
            line += f" {first} loses less than {last}, by {gap:.4f}."
        elif len(costs) > 1:
            overlap = "their intervals overlap or are not known"
            line += f" No verdict: {first} and {last} differ by {gap:.4f}, and {overlap}."
        lines.append(line)
    return lines
