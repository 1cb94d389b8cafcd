"""Bootstrap intervals of means, the same for the same figures wherever they stand. No torch: reports use it too."""

import zlib

import numpy as np

RESAMPLES = 2000


def resampled_means(values: np.ndarray, key: str) -> np.ndarray:
    """Means over the first axis of values (n, ...) drawn with replacement, (RESAMPLES, ...); drawn from ``key`` alone."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    at_once = max(1, 2**20 // values.size)  # 8 MiB
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    return np.concatenate([values[random.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes])


def interval(means: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
