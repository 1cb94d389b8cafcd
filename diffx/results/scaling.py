"""The power law of loss in parameters, loss(N) = a·N^-b + c."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerLaw:
    """loss(N) = a·N^-b + c, with loss in nats a token.

    Attributes:
        a: factor, in nats.
        b: exponent.
        c: the loss that no size gets below, in nats; 0 for fewer than four sizes, which cannot tell
            it from the slope.
        error: largest relative distance of a measured loss from the curve.
    """

    a: float
    b: float
    c: float
    error: float

    def loss(self, parameters: float) -> float:
        """Loss in nats at so many parameters."""
        return self.a * parameters**-self.b + self.c

    def parameters(self, loss: float) -> float:
        """Parameters at which the curve has this loss; infinite if it never gets there."""
        return (
            ((loss - self.c) / self.a) ** (-1 / self.b)
            if loss > self.c and self.b > 0
            else float("inf")
        )


def fit_power_law(parameters: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit by least squares of the log loss, so that every size weighs the same.

    With three sizes c is 0; with four or more it is fitted too, between 0 and the smallest loss.

    Args:
        parameters: N of each size, all different, at least three.
        losses: the final loss of each, in nats.
    """
    n, loss = np.asarray(parameters, dtype=float), np.asarray(losses, dtype=float)
    if len(n) < 3:
        raise ValueError(f"a power law needs three sizes or more, not {len(n)}")
    x = (
        np.log(n) - np.log(n).mean()
    )  # about the middle size, where the factor hardly depends on the exponent

    def power_law(theta: np.ndarray) -> np.ndarray:
        level, b, share = (
            theta  # log a at the middle size, b, and c as a share of the smallest loss
        )
        return np.exp(level - b * x) + share * loss.min()

    def start(share: float) -> np.ndarray:
        slope, level = np.polyfit(x, np.log(loss - share * loss.min()), 1)
        return np.array([level, -slope, share])

    theta = start(0.0)  # without c the straight line through the logs is the fit
    if len(n) >= 4:
        bounds = ([-np.inf, -np.inf, 0.0], [np.inf, np.inf, 1 - 1e-6])
        fits = [
            least_squares(
                lambda t: np.log(power_law(t) / loss),
                start(share),
                bounds=bounds,
                x_scale=[0.1, 0.01, 0.1],
                xtol=1e-12,
                ftol=1e-12,
            )
            for share in (0.01, 0.25, 0.5, 0.75, 0.95)
        ]
        theta = min(fits, key=lambda fit: fit.cost).x
    level, b, share = theta
    return PowerLaw(
        a=float(np.exp(level + b * np.log(n).mean())),
        b=float(b),
        c=float(share * loss.min()),
        error=float(np.abs(power_law(theta) / loss - 1).max()),
    )
