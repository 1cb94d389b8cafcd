"""Quantization: simulated for attention logits and hidden states, stored for weights."""
