"""Training: one loop for every architecture, from scratch or adapting."""
