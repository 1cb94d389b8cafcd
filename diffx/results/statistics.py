"""Intervals of means and differences: scipy's bootstrap over examples, Student's t over seeds."""

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
_ELEMENTS = 2**20  # resampled at once: 8 MiB

Statistic = Callable[..., np.ndarray]  # of arrays (..., n) along `axis`


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A standard error and the ends of a 95% interval; None where too few values tell nothing."""

    stderr: float | None = None
    low: float | None = None
    high: float | None = None


def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of values (..., n)."""
    return values.mean(axis)


def median(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Median of values (..., n)."""
    return np.median(values, axis)


def weighted_mean(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of values (..., n) by weights (..., n); NaN where they sum to 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (values * weights).sum(axis) / weights.sum(axis)


def weighted_difference(
    values: np.ndarray,
    weights: np.ndarray,
    base: np.ndarray,
    base_weights: np.ndarray,
    axis: int = -1,
) -> np.ndarray:
    """Weighted mean of values (..., n) minus that of the baseline's values (..., n)."""
    return weighted_mean(values, weights, axis) - weighted_mean(base, base_weights, axis)


def mean_of_means(*groups: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over groups of the mean of each group's values (..., n)."""
    return np.mean([group.mean(axis) for group in groups], axis=0)


def bootstrap(
    samples: Sequence[np.ndarray], statistic: Statistic, key: str, paired: bool = True
) -> Interval:
    """Resample examples with ``scipy.stats.bootstrap``; the interval is the percentile interval.

    Args:
        samples: arrays (n,); if not paired, each with examples and an n of its own.
        statistic: of the arrays.
        key: the draws depend on it and on n alone.
        paired: the arrays share their examples, which are drawn together.

    Returns:
        The interval; empty with fewer than two examples in an array.
    """
    if min(map(len, samples)) < 2:
        return Interval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # equal values: no width
        result = stats.bootstrap(
            samples,
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, _ELEMENTS // max(map(len, samples))),
            confidence_level=CONFIDENCE,
            method="percentile",
            paired=paired and len(samples) > 1,
            vectorized=True,
            rng=np.random.default_rng(zlib.crc32(key.encode())),
        )
    drawn = result.bootstrap_distribution
    drawn = drawn[np.isfinite(drawn)]  # a resample whose weights sum to 0 has no mean
    if not drawn.size:
        return Interval()
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(stderr=float(drawn.std(ddof=1)), low=float(low), high=float(high))


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of values, one a seed; empty with fewer than two."""
    if len(values) < 2:
        return Interval()
    array = np.asarray(values, dtype=float)
    stderr = float(stats.sem(array))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1)) * stderr
    return Interval(stderr=stderr, low=float(array.mean()) - half, high=float(array.mean()) + half)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A figure minus the baseline's.

    Attributes:
        mean: over the seeds that both have; of the two means, if they share none.
        low: lower end of the 95% interval; None with fewer than two pairs.
        high: its upper end.
        pairs: seeds that both have.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """Compare two groups of runs seed by seed, with Student's t interval of the mean difference.

    Args:
        values: the figure of each seed.
        base: the baseline's.
    """
    seeds = sorted(values.keys() & base.keys())
    if not seeds:
        gap = float(np.mean(list(values.values())) - np.mean(list(base.values())))
        return Difference(mean=gap, low=None, high=None, pairs=0)
    gaps = [values[seed] - base[seed] for seed in seeds]
    interval = t_interval(gaps)
    return Difference(
        mean=float(np.mean(gaps)), low=interval.low, high=interval.high, pairs=len(gaps)
    )
