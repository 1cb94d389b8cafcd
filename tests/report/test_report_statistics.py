import numpy as np
import pytest
from scipy import stats

from diffx.report.scaling import fit_power_law
from diffx.report.statistics import paired_difference, tokens_at_equal_loss, tokens_to_reach


def test_the_interval_is_students_over_paired_seeds():
    ours, theirs = {0: 4.0, 1: 4.2, 2: 4.1, 7: 9.0}, {2: 4.3, 1: 4.35, 0: 4.15, 9: 1.0}
    difference = paired_difference(ours, theirs)
    expected = stats.ttest_rel([4.0, 4.2, 4.1], [4.15, 4.35, 4.3])
    assert difference.pairs == 3 and difference.mean == pytest.approx(-1 / 6)
    assert (difference.low, difference.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_one_pair_has_no_interval_and_no_pair_takes_the_means():
    one = paired_difference({0: 4.0}, {0: 4.5, 1: 9.0})
    assert (one.mean, one.low, one.high, one.pairs) == (-0.5, None, None, 1)
    none = paired_difference({0: 4.0}, {1: 4.5, 2: 5.5})
    assert (none.mean, none.low, none.pairs) == (-1.0, None, 0)


def test_tokens_to_reach_interpolates_to_the_first_crossing():
    tokens, losses = np.array([0.0, 100.0, 200.0, 300.0]), np.array([8.0, 4.0, 5.0, 3.0])
    assert tokens_to_reach(tokens, losses, 6.0) == 50
    assert tokens_to_reach(tokens, losses, 4.0) == 100
    assert tokens_to_reach(tokens, losses, 3.5) == 275
    assert tokens_to_reach(tokens, losses, 9.0) == 0
    assert tokens_to_reach(tokens, losses, 2.0) is None


def test_token_ratio_at_equal_loss_of_known_curves():
    tokens = np.array([0.0, 100.0, 200.0])
    slow, fast = np.array([8.0, 6.0, 4.0]), np.array([8.0, 4.0, 2.0])
    better = tokens_at_equal_loss((tokens, fast), (tokens, slow))
    assert (better.better, better.loss, better.tokens, better.baseline_tokens, better.ratio) == (True, 4.0, 100, 200, 0.5)
    worse = tokens_at_equal_loss((tokens, slow), (tokens, fast))
    assert (worse.better, worse.loss, worse.tokens, worse.baseline_tokens, worse.ratio) == (False, 4.0, 200, 100, 2.0)
    diverged = np.array([8.0, 9.0, 10.0])
    assert tokens_at_equal_loss((tokens, diverged), (tokens, fast)) is None


def test_power_law_recovers_its_constants():
    n = np.array([1e5, 4e5, 1e6, 3e6])
    law = fit_power_law(n, 20 * n**-0.15 + 1.7)
    assert (law.a, law.b, law.c) == pytest.approx((20, 0.15, 1.7), rel=1e-4)
    three = fit_power_law(n[:3], 20 * n[:3] ** -0.15)
    assert (three.a, three.b, three.c) == pytest.approx((20, 0.15, 0))
    assert three.parameters(three.loss(7e5)) == pytest.approx(7e5)


def test_power_law_without_a_floor_finds_none_and_with_one_never_gets_below_it():
    n = np.array([1e5, 4e5, 1e6, 3e6, 9e6])
    assert fit_power_law(n, 20 * n**-0.15).c == pytest.approx(0, abs=1e-3)
    assert fit_power_law(n, 20 * n**-0.15 + 1.7).parameters(1.6) == float("inf")


def test_power_law_error_is_the_largest_relative_distance():
    n = np.array([1e4, 1e5, 1e6])
    law = fit_power_law(n, [5.0, 4.2, 3.0])
    assert law.error == pytest.approx(max(abs(law.loss(x) / y - 1) for x, y in zip(n, [5.0, 4.2, 3.0], strict=True)))
    assert law.error > 0.01
    with pytest.raises(ValueError, match="three sizes"):
        fit_power_law([1, 2], [3, 2])
