"""Differences paired by seed, and the tokens that two architectures need for the same loss."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A group's figure minus the baseline's.

    Attributes:
        mean: over the seeds that both have; of the two means, if they share none.
        low: lower end of the confidence interval; None with fewer than two pairs.
        high: its upper end.
        pairs: seeds that both have.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Compare two groups seed by seed, with Student's t interval of the mean difference (95%)."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return Difference(mean=float(np.mean(list(ours.values())) - np.mean(list(theirs.values()))), low=None, high=None, pairs=0)
    gaps = np.array([ours[s] - theirs[s] for s in seeds])
    mean, n = float(gaps.mean()), len(gaps)
    if n < 2:
        return Difference(mean=mean, low=None, high=None, pairs=n)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * gaps.std(ddof=1) / np.sqrt(n))
    return Difference(mean=mean, low=mean - half, high=mean + half, pairs=n)


def tokens_to_reach(tokens: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """Tokens at which a curve first gets down to ``target``, linear between its points; None if it never does.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualLoss:
    """Tokens that a group and the baseline needed for the same loss: the higher of the two final losses.

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


def tokens_at_equal_loss(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> EqualLoss | None:
    """Compare two mean validation curves (tokens, losses) at the final loss of the worse one.

    None if that loss is not between the better curve's first and last, as when a run diverged.
    """
    better = bool(ours[1][-1] <= theirs[1][-1])
    ahead, behind = (ours, theirs) if better else (theirs, ours)
    loss = float(behind[1][-1])
    needed, spent = tokens_to_reach(*ahead, loss), float(behind[0][-1])
    if not needed or not spent:
        return None
    return EqualLoss(loss=loss, tokens=needed if better else spent, baseline_tokens=spent if better else needed, better=better)
