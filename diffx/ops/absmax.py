"""Simulated symmetric absmax quantization: rounded values that stay floating-point numbers."""

import torch
from torch import Tensor


def absmax_quantize(x: Tensor, bits: int, peak: Tensor) -> Tensor:
    """Round x in place to 2^bits - 1 evenly spaced levels from -peak to peak, halves to even.

    Args:
        x: the values, which are overwritten and clipped to [-peak, peak].
        bits: at least 2.
        peak: the largest magnitude of the values that share a scale, broadcastable to x.

    Returns:
        x.
    """
    levels = 2 ** (bits - 1) - 1
    # zeros stay zeros where the peak is 0
    step = (peak / levels).clamp(min=torch.finfo(peak.dtype).tiny)
    return x.div_(step).round_().clamp_(-levels, levels).mul_(step)
