"""Bootstrap intervals of means, the same for the same figures wherever they stand. No torch: reports use it too."""

import zlib

import numpy as np

RESAMPLES = 2000


def resampled_means(values: np.ndarray, key: str) -> np.ndarray:
    """Means of values (n,) drawn with replacement, (RESAMPLES,); drawn from ``key`` alone."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    return np.array([values[random.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])


def interval(means: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
