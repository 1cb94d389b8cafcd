"""Text sources, tokenizers, token shards and batches."""

from diffx.data.corpus import Corpus, open_data
from diffx.data.prepare import prepare
from diffx.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Corpus", "Tokenizer", "load_tokenizer", "open_data", "prepare"]
