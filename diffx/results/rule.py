"""The rule by which an experiment ends in a verdict, written before its runs.

The rule looks at the interval of an effect, paired by seed, and at the smallest effect of interest.
A claim that there is no effect is reproduced where the whole interval is smaller than that.
Several effects of one experiment are corrected by Holm's method (1979), so that the chance of one
false ``reproduced`` or ``contradicted`` among them is at most 5%.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

LEVEL, POWER = 0.05, 0.8
_MOST_SEEDS = 1000
VERDICTS = (
    "reproduced",
    "smaller than claimed",
    "no such effect at this scale",
    "contradicted",
    "undecided",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ruling:
    """What the rule makes of one effect; a positive effect is in the claimed direction.

    Attributes:
        verdict: one of ``VERDICTS``.
        estimate: the mean over seeds.
        std: the standard deviation over seeds.
        low: the lower end of the interval at ``level``.
        high: its upper end.
        level: the level of the interval after Holm's correction, such as 0.05.
        p: of the two-sided t test that the effect is zero; where none is claimed, of the two tests
            that it is as large as the smallest one of interest.
        seeds: how many seeds there are.
        smallest: the smallest effect of interest.
    """

    verdict: str
    estimate: float
    std: float
    low: float
    high: float
    level: float
    p: float
    seeds: int
    smallest: float

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds would decide, by the spread seen; None above 1000."""
        return seeds_needed(self.std, self.smallest, self.level)


def rule(
    effects: Sequence[Sequence[float]],
    smallest: Sequence[float],
    equal: Sequence[bool] | None = None,
) -> list[Ruling]:
    """Rule on the effects of one experiment.

    Args:
        effects: of each effect its value for every seed, at least two, positive in the claimed
            direction.
        smallest: of each its smallest effect of interest, above zero.
        equal: of each whether the claim is that there is no effect of interest.
    """
    values = [np.asarray(effect, dtype=float) for effect in effects]
    equal = equal or [False] * len(values)
    tests = [
        max(_p_value(v + s), _p_value(v - s)) if none else _p_value(v)  # by two tests (TOST)
        for v, s, none in zip(values, smallest, equal, strict=True)
    ]
    rulings: dict[int, Ruling] = {}
    level, rejecting = LEVEL, True
    for rank, index in enumerate(sorted(range(len(tests)), key=tests.__getitem__)):
        if rejecting:
            level = LEVEL / (len(tests) - rank)
            rejecting = tests[index] < level
        rulings[index] = _decide(values[index], smallest[index], equal[index], tests[index], level)
    return [rulings[index] for index in range(len(tests))]


def _p_value(values: np.ndarray) -> float:
    if np.ptp(values) == 0:  # no spread: the t statistic is infinite, or 0/0
        return 1.0 if values[0] == 0 else 0.0
    t = values.mean() / (values.std(ddof=1) / math.sqrt(len(values)))
    return float(2 * special.stdtr(len(values) - 1, -abs(t)))


def _decide(values: np.ndarray, smallest: float, equal: bool, p: float, level: float) -> Ruling:
    n, estimate, std = len(values), float(values.mean()), float(values.std(ddof=1))
    half = float(special.stdtrit(n - 1, 1 - level / 2)) * std / math.sqrt(n)
    low, high = estimate - half, estimate + half
    within = -smallest < low and high < smallest
    if equal:
        beyond = low > smallest or high < -smallest
        verdict = "reproduced" if within else "contradicted" if beyond else "undecided"
    elif low > 0:
        verdict = "reproduced" if estimate >= smallest else "smaller than claimed"
    elif within:
        verdict = "no such effect at this scale"
    else:
        verdict = "contradicted" if high < 0 else "undecided"
    return Ruling(
        verdict=verdict,
        estimate=estimate,
        std=std,
        low=low,
        high=high,
        level=level,
        p=p,
        seeds=n,
        smallest=smallest,
    )


def seeds_needed(std: float, smallest: float, level: float = LEVEL) -> int | None:
    """The number of seeds that decide with a power of 80%, or None above 1000.

    With so many, the interval excludes zero in 80% of studies where the true effect is the
    smallest one of interest, and lies within it in 80% of those where the true effect is zero.

    Args:
        std: of the effect over seeds.
        smallest: the smallest effect of interest.
        level: of the interval.
    """
    if std == 0:
        return 2
    seeds = np.arange(2, _MOST_SEEDS + 1)
    noncentrality = smallest * np.sqrt(seeds) / std
    critical = stats.t.ppf(1 - level / 2, seeds - 1)
    detects = stats.nct.sf(critical, seeds - 1, noncentrality)
    # The estimate must be nearer to zero than the smallest effect by half an interval.
    excludes = 2 * stats.t.cdf(noncentrality - critical, seeds - 1) - 1
    enough = np.flatnonzero(np.minimum(detects, excludes) >= POWER)
    return int(seeds[enough[0]]) if enough.size else None
