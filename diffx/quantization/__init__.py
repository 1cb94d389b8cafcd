"""Low bits: attention logits and hidden states, simulated."""
