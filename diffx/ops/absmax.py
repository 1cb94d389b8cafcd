"""Symmetric absmax quantization, simulated: values are rounded to few levels and stay floating-point numbers."""

import torch
from torch import Tensor


def absmax_quantize(x: Tensor, bits: int, peak: Tensor) -> Tensor:
    """Round x, in place, to the nearest of the 2^bits - 1 evenly spaced levels from -peak to peak; a half goes to the even level.

    Args:
        x: the values, which are overwritten; those beyond the peak are clipped.
        bits: 2 or more.
        peak: the largest magnitude among the values that share a scale, broadcastable to x.

    Returns:
        x.
    """
    levels = 2 ** (bits - 1) - 1
    step = (peak / levels).clamp(min=torch.finfo(peak.dtype).tiny)  # where all are 0 they stay so
    return x.div_(step).round_().clamp_(-levels, levels).mul_(step)
