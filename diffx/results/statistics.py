"""Intervals of means and differences: scipy's bootstrap over examples, Student's t over seeds."""

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
_ELEMENTS = 2**20  # resampled at once: 8 MiB

Statistic = Callable[..., np.ndarray]  # of arrays (..., n) along `axis`


class Interval(NamedTuple):
    """A standard error and the ends of a 95% interval; None where there are too few values."""

    stderr: float | None = None
    low: float | None = None
    high: float | None = None


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

    Samples are arrays (n,); ``paired`` ones share their examples, which are drawn together. The
    draws depend on ``key`` and n alone. The interval is empty with fewer than two examples in an
    array.
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
    return Interval(float(drawn.std(ddof=1)), float(low), float(high))


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of values, one a seed; empty with fewer than two."""
    if len(values) < 2:
        return Interval()
    mean, stderr = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stderr
    return Interval(stderr, mean - half, mean + half)


class Difference(NamedTuple):
    """A figure minus the baseline's."""

    mean: float  # over the seeds that both have; of the two means, if they share none
    low: float | None  # ends of the 95% interval; None with fewer than two pairs
    high: float | None
    pairs: int  # seeds that both have


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """The mean difference of figures by seed, with Student's t interval."""
    gaps = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if not gaps:
        gap = np.mean(list(values.values())) - np.mean(list(base.values()))
        return Difference(float(gap), None, None, pairs=0)
    _, low, high = t_interval(gaps)
    return Difference(float(np.mean(gaps)), low, high, pairs=len(gaps))
