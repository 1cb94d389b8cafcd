"""Attention operations: `attention` and `differential_attention`, and the maps that they never store."""

from diffx.ops.dispatch import attention, differential_attention
from diffx.ops.reference import attention_maps, differential_attention_maps

__all__ = ["attention", "attention_maps", "differential_attention", "differential_attention_maps"]
