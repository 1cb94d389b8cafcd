"""The rule of verdicts, by simulation, against scipy's t test, and by hand."""

import numpy as np
import pytest
from scipy import stats

from diffx.results.rule import rule, seeds_needed


def _studies(effect: float, std: float, seeds: int, count: int = 2000) -> np.ndarray:
    return np.random.default_rng(0).normal(effect, std, (count, seeds))


@pytest.mark.parametrize("effects", [1, 4])
def test_a_true_effect_of_zero_is_reproduced_in_at_most_a_twentieth_of_studies(effects):
    """With several effects in a study, any false verdict counts."""
    drawn = _studies(0.0, 1.0, 5, 2000 * effects).reshape(2000, effects, 5)
    verdicts = [{ruling.verdict for ruling in rule(study, [0.1] * effects)} for study in drawn]
    share = np.mean(["reproduced" in found for found in verdicts])
    told = np.mean([bool({"reproduced", "contradicted"} & found) for found in verdicts])
    assert 0.005 < share <= 0.05  # about half of what is told by chance is in the claimed direction
    assert told <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_without_the_correction_four_effects_would_be_told_too_often():
    drawn = _studies(0.0, 1.0, 5, 8000).reshape(2000, 4, 5)
    uncorrected = [[rule([effect], [0.1])[0].verdict for effect in study] for study in drawn]
    assert np.mean(["reproduced" in found for found in uncorrected]) > 0.05


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_the_seeds_needed_decide_with_a_power_of_80_percent(std):
    needed = seeds_needed(std, 1.0)
    assert needed is not None
    real = [rule([s], [1.0])[0] for s in _studies(1.0, std, needed)]
    none = [rule([s], [1.0])[0] for s in _studies(0.0, std, needed)]
    told = np.mean([ruling.low > 0 for ruling in real])
    excluded = np.mean([ruling.verdict == "no such effect at this scale" for ruling in none])
    assert min(told, excluded) > 0.77
    fewer = [
        (
            np.mean([rule([s], [1.0])[0].low > 0 for s in _studies(1.0, std, n)]),
            np.mean([rule([s], [1.0])[0].high < 1.0 for s in _studies(0.0, std, n)]),
        )
        for n in [max(2, round(needed * 0.7))]
    ]
    assert needed <= 3 or min(fewer[0]) < 0.8


def test_more_than_a_thousand_seeds_are_not_promised():
    assert seeds_needed(100.0, 0.1) is None


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.20, 0.21, 0.19, 0.20], "reproduced"),
        ([0.05, 0.06, 0.05, 0.06], "smaller than claimed"),
        ([0.01, -0.01, 0.02, -0.02], "no such effect at this scale"),
        ([-0.05, -0.04, -0.05, -0.04], "no such effect at this scale"),  # below what is of interest
        ([-0.20, -0.21, -0.19, -0.20], "contradicted"),
        ([0.5, -0.4, 0.3, -0.2], "undecided"),
        ([0.2, 0.2], "reproduced"),  # no spread at all
        ([0.0, 0.0], "no such effect at this scale"),
    ],
)
def test_each_verdict(values, verdict):
    (ruling,) = rule([values], [0.1])
    assert ruling.verdict == verdict


def test_the_interval_is_students():
    values = [0.3, 0.1, 0.4, 0.2, 0.35]
    (ruling,) = rule([values], [0.1])
    t = stats.ttest_1samp(values, 0)
    interval = t.confidence_interval(0.95)
    assert (ruling.low, ruling.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert ruling.p == pytest.approx(t.pvalue)


def test_holm_gives_the_smallest_p_the_strictest_level():
    """Levels by hand: 0.05/3, then 0.05/2, and the rest keeps that of the first not rejected."""
    clear, unclear = [1.0, 1.1, 0.9, 1.05], [1.0, -0.6, 0.2, 0.3]
    rulings = rule([unclear, clear, unclear], [0.1] * 3)
    assert [ruling.level for ruling in rulings] == pytest.approx([0.025, 0.05 / 3, 0.025])


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.01, -0.01, 0.02, -0.02], "reproduced"),
        ([0.20, 0.21, 0.19, 0.20], "contradicted"),
        ([-0.20, -0.21, -0.19, -0.20], "contradicted"),
        ([0.05, 0.15, 0.02, 0.09], "undecided"),
    ],
)
def test_a_claim_of_no_effect(values, verdict):
    assert rule([values], [0.1], [True])[0].verdict == verdict


def test_an_effect_as_large_as_is_of_interest_is_hardly_ever_called_none():
    verdicts = [rule([study], [1.0], [True])[0].verdict for study in _studies(1.0, 0.5, 5)]
    assert np.mean([verdict == "reproduced" for verdict in verdicts]) <= 0.05
