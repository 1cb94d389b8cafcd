"""From the rows of an experiment's runs to one figure for each seed and effect."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diffx.config import UserError
from diffx.config.experiment import Effect
from diffx.results.curves import tokens_at_equal_loss, tokens_to_reach
from diffx.results.table import COLUMNS

ARM = "arm"  # the column that rows of an experiment have beside those of the table of results
Curve = tuple[np.ndarray, np.ndarray]  # tokens (n,), values (n,)


def values_by_seed(rows: pd.DataFrame, effect: Effect) -> dict[int, float]:
    """The effect of each seed that all its arms have, positive in the claimed direction.

    Ratios are given as logarithms.

    Args:
        rows: the table of results, with the column ``arm``.
        effect: what is compared.

    Raises:
        UserError: there are no rows for one of its cells, or several.
    """
    unknown = (effect.select.keys() | effect.less.keys()) - COLUMNS.keys()
    if unknown:
        raise UserError(
            f"select={sorted(unknown)} cannot be used: no columns of the table of results"
        )
    arms = [*effect.candidate, *effect.baseline]
    seeds = set.intersection(*(_seeds(rows, effect, arm) for arm in arms))
    sign = _sign(effect)
    return {int(seed): sign * _effect(rows[rows["seed"] == seed], effect) for seed in sorted(seeds)}


def smallest_of(effect: Effect) -> float:
    """The smallest effect of interest on the scale of ``values_by_seed``, above zero."""
    return abs(math.log(effect.smallest)) if effect.ratio else effect.smallest


def natural(effect: Effect, value: float) -> float:
    """Turn a figure of ``values_by_seed`` back into a difference or a ratio, with its sign."""
    value *= _sign(effect)
    return math.exp(value) if effect.ratio else value


def _sign(effect: Effect) -> int:
    return -1 if effect.direction == "lower" else 1


def cells(rows: pd.DataFrame, effect: Effect) -> dict[str, dict[int, float]]:
    """The figure of each arm and seed that the effect is made of, for the report's table.

    That is the cell; for ``tokens`` the last value of the curve, for ``onset`` the tokens.
    """
    return {
        arm: {
            seed: _figure(rows[(rows[ARM] == arm) & (rows["seed"] == seed)], effect)
            for seed in sorted(_seeds(rows, effect, arm))
        }
        for arm in (*effect.baseline, *effect.candidate)
    }


def onsets(rows: pd.DataFrame, effect: Effect, arm: str) -> tuple[list[float], list[bool]]:
    """Of ``onset``: each seed's tokens, and whether its run ended before the threshold."""
    of_arm = rows[rows[ARM] == arm]
    seeds = sorted(_seeds(rows, effect, arm))
    pairs = [_onset(of_arm[of_arm["seed"] == seed], effect) for seed in seeds]
    return [tokens for tokens, _ in pairs], [censored for _, censored in pairs]


def _seeds(rows: pd.DataFrame, effect: Effect, arm: str) -> set[int]:
    """The seeds of an arm whose runs were measured."""
    chosen = _selected(rows[rows[ARM] == arm], effect.select)
    if chosen.empty:
        raise UserError(f"select={effect.select} cannot be used: {arm} has 0 such rows")
    return {int(seed) for seed in chosen["seed"]}


def _effect(rows: pd.DataFrame, effect: Effect) -> float:
    """The effect of one seed: candidate minus baseline, or the logarithm of their ratio."""
    by_arm = {arm: rows[rows[ARM] == arm] for arm in (*effect.candidate, *effect.baseline)}
    if effect.measure == "parameters":
        return _log_parameters(by_arm, effect)
    candidate, baseline = by_arm[effect.candidate[0]], by_arm[effect.baseline[0]]
    if effect.measure == "tokens":
        equal = tokens_at_equal_loss(_curve(candidate, effect), _curve(baseline, effect))
        if equal is None:
            raise UserError(f"{_named(effect)}: the curves have no loss in common")
        return math.log(equal.ratio)
    figures = _figure(candidate, effect), _figure(baseline, effect)
    if effect.measure == "difference":
        return figures[0] - figures[1]
    if min(figures) <= 0:
        raise UserError(f"{_named(effect)}: a ratio needs figures above 0, not {min(figures)}")
    return math.log(figures[0] / figures[1])


def _figure(rows: pd.DataFrame, effect: Effect) -> float:
    if effect.measure == "onset":
        return _onset(rows, effect)[0]
    if effect.measure == "tokens":
        return float(_curve(rows, effect)[1][-1])
    value = _cell(rows, effect.select)
    return value - _cell(rows, effect.select | effect.less) if effect.less else value


def _selected(rows: pd.DataFrame, select: Mapping[str, Any]) -> pd.DataFrame:
    chosen = rows
    for column, value in select.items():
        chosen = chosen[chosen[column].isna() if value is None else chosen[column] == value]
    return chosen.dropna(subset="value")


def _cell(rows: pd.DataFrame, select: Mapping[str, Any]) -> float:
    """The figure of one arm and seed at its last step."""
    chosen = _selected(rows, select)
    chosen = chosen[chosen["step"] == chosen["step"].max()]
    if len(chosen) != 1:
        arm = ", ".join(map(str, rows[ARM].unique())) or "an arm"
        raise UserError(f"select={dict(select)} cannot be used: {arm} has {len(chosen)} such rows")
    return float(chosen["value"].iloc[0])


def _curve(rows: pd.DataFrame, effect: Effect) -> Curve:
    chosen = _selected(rows, effect.select).sort_values("tokens")
    if chosen.empty:
        raise UserError(f"select={effect.select} cannot be used: an arm has no such rows")
    return chosen["tokens"].to_numpy(float), chosen["value"].to_numpy(float)


def _onset(rows: pd.DataFrame, effect: Effect) -> tuple[float, bool]:
    """Tokens until the curve is at the threshold, and whether the run ended before."""
    tokens, values = _curve(rows, effect)
    assert effect.threshold is not None
    reached = tokens_to_reach(tokens, values, effect.threshold)
    return (float(tokens[-1]), True) if reached is None else (max(reached, 1.0), False)


def _log_parameters(by_arm: Mapping[str, pd.DataFrame], effect: Effect) -> float:
    """Log ratio of the parameters at equal loss.

    Two lines of one slope are fitted, loss = a + b·log(parameters): the ratio is how far one must
    be moved along the parameters to lie on the other.
    """
    points = []
    for arms in (effect.candidate, effect.baseline):
        losses = np.array([_cell(by_arm[arm], effect.select) for arm in arms])
        sizes = [_parameters(by_arm[arm]) for arm in arms]
        points.append((np.log(sizes), losses))
    centred = [(x - x.mean(), y - y.mean()) for x, y in points]
    slope = sum(float(x @ y) for x, y in centred) / sum(float(x @ x) for x, _ in centred)
    (x, y), (base_x, base_y) = points
    if slope >= 0:
        raise UserError(f"{_named(effect)}: the loss does not fall with the parameters")
    return float((x.mean() - base_x.mean()) - (y.mean() - base_y.mean()) / slope)


def _parameters(rows: pd.DataFrame) -> int:
    return int(rows["parameters"].dropna().iloc[0])


def _named(effect: Effect) -> str:
    arms: Sequence[str] = [*effect.candidate, *effect.baseline]
    return f"measure={effect.measure} cannot be used for {', '.join(arms)}"
