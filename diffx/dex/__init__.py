"""DEX: a light differential step on the attention output of a pretrained model (Kong et al., arXiv 2505.16333)."""
