"""The decoder, and the attention module of each architecture."""

from diffx.models.cache import KVCache
from diffx.models.decoder import Decoder, build_model
from diffx.models.generation import generate
from diffx.models.init import init_weights

__all__ = ["Decoder", "KVCache", "build_model", "generate", "init_weights"]
