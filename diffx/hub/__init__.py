"""Models of Hugging Face: weights to and from them, what their attention does, and ours as theirs."""
