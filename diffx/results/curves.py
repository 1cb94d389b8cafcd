"""The tokens that two architectures need for the same loss, read off their validation curves."""

from dataclasses import dataclass

import numpy as np


def tokens_to_reach(tokens: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """Tokens at which a curve first reaches ``target``, linear between points; None if never.

    Args:
        tokens: (n,) rising.
        losses: (n,) in nats.
        target: in nats.
    """
    reached = np.flatnonzero(losses <= target)
    if not reached.size:
        return None
    i = int(reached[0])
    if i == 0:
        return float(tokens[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


Curve = tuple[np.ndarray, np.ndarray]  # tokens (n,) and losses (n,) in nats


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualLoss:
    """Tokens that a group and the baseline needed for the higher of their two final losses.

    Attributes:
        loss: that loss, in nats.
        tokens: what the group needed.
        baseline_tokens: what the baseline needed.
        better: the group is the one that got there before its end.
    """

    loss: float
    tokens: float
    baseline_tokens: float
    better: bool

    @property
    def ratio(self) -> float:
        """The group's tokens as a share of the baseline's: below 1 is better than the baseline."""
        return self.tokens / self.baseline_tokens


def tokens_at_equal_loss(curve: Curve, base: Curve) -> EqualLoss | None:
    """Compare two mean validation curves (tokens, losses) at the final loss of the worse one.

    None if that loss is not between the better curve's first and last, as when a run diverged.
    """
    better = bool(curve[1][-1] <= base[1][-1])
    ahead, behind = (curve, base) if better else (base, curve)
    loss = float(behind[1][-1])
    needed, spent = tokens_to_reach(*ahead, loss), float(behind[0][-1])
    if not needed or not spent:
        return None
    return EqualLoss(
        loss=loss,
        tokens=needed if better else spent,
        baseline_tokens=spent if better else needed,
        better=better,
    )
