"""Tokens and parameters that two architectures need for the same loss."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

Curve = tuple[np.ndarray, np.ndarray]  # tokens (n,) and losses (n,) in nats


class PowerLaw(NamedTuple):
    """loss(N) = a·N^-b + c, with loss in nats a token."""

    a: float  # in nats
    b: float
    c: float  # the least loss, in nats; 0 for three sizes, which cannot tell it from the slope
    error: float  # largest relative distance of a measured loss from the curve

    def loss(self, parameters: float) -> float:
        """Loss in nats at so many parameters."""
        return self.a * parameters**-self.b + self.c

    def parameters(self, loss: float) -> float:
        """Parameters at which the curve has this loss; infinite if it never does."""
        if loss <= self.c or self.b <= 0:
            return float("inf")
        return ((loss - self.c) / self.a) ** (-1 / self.b)


def fit_power_law(parameters: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit by least squares of the log loss, so that every size weighs the same.

    ``parameters`` are at least three different sizes; ``losses`` are final ones in nats. With three
    sizes c is 0; with four or more it is fitted too, between 0 and the smallest loss.
    """
    n, loss = np.asarray(parameters, dtype=float), np.asarray(losses, dtype=float)
    if len(n) < 3:
        raise ValueError(f"a power law needs three sizes or more, not {len(n)}")
    # About the middle size the factor hardly depends on the exponent.
    x = np.log(n) - np.log(n).mean()

    def power_law(theta: np.ndarray) -> np.ndarray:
        level, b, share = theta  # log a at the middle size, b, and c as a share of the least loss
        return np.exp(level - b * x) + share * loss.min()

    def start(share: float) -> np.ndarray:
        slope, level = np.polyfit(x, np.log(loss - share * loss.min()), 1)
        return np.array([level, -slope, share])

    theta = start(0.0)  # without c the straight line through the logs is the fit
    if len(n) >= 4:
        fits = [
            least_squares(
                lambda theta: np.log(power_law(theta) / loss),
                start(share),
                bounds=([-np.inf, -np.inf, 0.0], [np.inf, np.inf, 1 - 1e-6]),
                x_scale=[0.1, 0.01, 0.1],
                xtol=1e-12,
                ftol=1e-12,
            )
            for share in (0.01, 0.25, 0.5, 0.75, 0.95)
        ]
        theta = min(fits, key=lambda fit: fit.cost).x
    level, b, share = theta
    a, error = np.exp(level + b * np.log(n).mean()), np.abs(power_law(theta) / loss - 1).max()
    return PowerLaw(float(a), float(b), float(share * loss.min()), float(error))


class EqualLoss(NamedTuple):
    """Tokens that a group and the baseline needed for the higher of their two final losses."""

    loss: float  # in nats
    tokens: float  # of the group
    baseline_tokens: float
    better: bool  # the group reached the loss before its end

    @property
    def ratio(self) -> float:
        """The group's tokens as a share of the baseline's: below 1 is better than the baseline."""
        return self.tokens / self.baseline_tokens


def tokens_to_reach(tokens: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """Tokens at which a curve first reaches a loss, linear between points; None if never."""
    reached = np.flatnonzero(losses <= target)
    if not reached.size:
        return None
    i = int(reached[0])
    if i == 0:
        return float(tokens[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def tokens_at_equal_loss(curve: Curve, base: Curve) -> EqualLoss | None:
    """Compare two mean validation curves (tokens, losses) at the final loss of the worse one.

    None if that loss is not between the better curve's first and last, as when a run diverged.
    """
    better = bool(curve[1][-1] <= base[1][-1])
    ahead, behind = (curve, base) if better else (base, curve)
    loss, spent = float(behind[1][-1]), float(behind[0][-1])
    needed = tokens_to_reach(*ahead, loss)
    if not needed or not spent:
        return None
    tokens, base_tokens = (needed, spent) if better else (spent, needed)
    return EqualLoss(loss, tokens, base_tokens, better)
