import zlib

import numpy as np
import pytest
from scipy import stats

from diffx.results.statistics import (
    RESAMPLES,
    bootstrap,
    mean_of_means,
    paired_difference,
    t_interval,
    weighted_difference,
    weighted_mean,
)


def test_the_interval_is_students_over_paired_seeds():
    ours, theirs = {0: 4.0, 1: 4.2, 2: 4.1, 7: 9.0}, {2: 4.3, 1: 4.35, 0: 4.15, 9: 1.0}
    difference = paired_difference(ours, theirs)
    expected = stats.ttest_rel([4.0, 4.2, 4.1], [4.15, 4.35, 4.3])
    assert difference.pairs == 3 and difference.mean == pytest.approx(-1 / 6)
    assert (difference.low, difference.high) == pytest.approx(
        tuple(expected.confidence_interval(0.95))
    )


def test_one_pair_has_no_interval_and_no_pair_takes_the_means():
    one = paired_difference({0: 4.0}, {0: 4.5, 1: 9.0})
    assert (one.mean, one.low, one.high, one.pairs) == (-0.5, None, None, 1)
    none = paired_difference({0: 4.0}, {1: 4.5, 2: 5.5})
    assert (none.mean, none.low, none.pairs) == (-1.0, None, 0)


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_the_bootstrap_is_the_percentile_interval_by_hand(statistic):
    values = np.random.default_rng(0).exponential(size=60)
    interval = bootstrap([values], statistic, "a key")
    rng = np.random.default_rng(zlib.crc32(b"another"))
    drawn = statistic(values[rng.integers(60, size=(20_000, 60))], axis=-1)
    width = interval.high - interval.low
    expected = np.quantile(drawn, [0.025, 0.975])
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.1 * width)
    assert interval.stderr == pytest.approx(drawn.std(ddof=1), rel=0.1)
    assert bootstrap([values], statistic, "a key") == interval, "drawn from the key alone"
    assert bootstrap([values], statistic, "other") != interval


def test_the_bootstrap_is_scipys():
    values = np.random.default_rng(1).normal(size=40)
    interval = bootstrap([values], np.mean, "key")
    expected = stats.bootstrap(
        [values],
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(zlib.crc32(b"key")),
    )
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval))
    assert interval.stderr == pytest.approx(expected.standard_error)


def test_examples_that_groups_share_are_drawn_together():
    """Two groups that cancel each other out have an average without spread only if paired."""
    values = np.random.default_rng(2).normal(size=50)
    together = bootstrap([values, -values], mean_of_means, "k")
    assert (together.low, together.high) == pytest.approx((0, 0))
    apart = bootstrap([values, -values], mean_of_means, "k", paired=False)
    assert apart.stderr == pytest.approx(values.std(ddof=1) / np.sqrt(50) / np.sqrt(2), rel=0.1)
    unequal = bootstrap([values, values[:20]], mean_of_means, "k", paired=False)
    assert unequal.low < mean_of_means(values, values[:20]) < unequal.high


def test_a_weighted_mean_and_its_difference():
    rng = np.random.default_rng(3)
    values, weights, base = rng.normal(size=30), rng.integers(0, 9, 30), rng.normal(size=30)
    assert weighted_mean(values, weights) == pytest.approx(np.average(values, weights=weights))
    gap = weighted_difference(values, weights, base, weights)
    assert gap == pytest.approx(np.average(values - base, weights=weights))
    same = bootstrap([values, weights, values, weights], weighted_difference, "k")
    assert (same.low, same.high, same.stderr) == (0, 0, 0)
    drawn = bootstrap([values, weights], weighted_mean, "k")
    indices = rng.integers(30, size=(20_000, 30))
    by_hand = np.quantile(weighted_mean(values[indices], weights[indices]), [0.025, 0.975])
    assert (drawn.low, drawn.high) == pytest.approx(by_hand, abs=0.1 * (drawn.high - drawn.low))


def test_resamples_whose_weights_sum_to_nothing_are_left_out():
    values, weights = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.0, 1.0])
    interval = bootstrap([values, weights], weighted_mean, "k")
    assert (interval.low, interval.high) == (3.0, 3.0)
    nothing = bootstrap([values, np.zeros(3)], weighted_mean, "k")
    assert nothing.low is nothing.high is nothing.stderr is None


def test_one_example_has_no_interval_and_equal_ones_have_no_width():
    assert bootstrap([np.array([1.0])], np.mean, "k").low is None
    assert bootstrap([np.array([1.0, 2.0]), np.array([1.0])], mean_of_means, "k", False).low is None
    equal = bootstrap([np.full(5, 0.25)], np.mean, "k")
    assert (equal.low, equal.high, equal.stderr) == (0.25, 0.25, 0.0)


def test_students_interval():
    values = [0.4, 0.1, 0.35, 0.2]
    interval = t_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.stderr == pytest.approx(np.std(values, ddof=1) / 2)
    assert t_interval([0.4]).low is None
