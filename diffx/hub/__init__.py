"""Models of Hugging Face: weights to and from them, and what their attention does."""

from diffx.hub.attention import AttentionView, attending_with, observing
from diffx.hub.convert import from_diffllama, from_llama, to_diffllama, to_llama

__all__ = ["AttentionView", "attending_with", "from_diffllama", "from_llama", "observing", "to_diffllama", "to_llama"]
