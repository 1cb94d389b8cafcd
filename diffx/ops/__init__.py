"""Attention operations, and the attention maps that they do not store."""

from diffx.ops.absmax import absmax_quantize
from diffx.ops.dispatch import Documents, attention, differential_attention
from diffx.ops.quantized import QuantizedLogits
from diffx.ops.reference import attention_maps

__all__ = [
    "Documents",
    "QuantizedLogits",
    "absmax_quantize",
    "attention",
    "attention_maps",
    "differential_attention",
]
