import numpy as np
import pytest

from diffx.results.curves import fit_power_law


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
    assert law.error == pytest.approx(
        max(abs(law.loss(x) / y - 1) for x, y in zip(n, [5.0, 4.2, 3.0], strict=True))
    )
    assert law.error > 0.01
    with pytest.raises(ValueError, match="three sizes"):
        fit_power_law([1, 2], [3, 2])
