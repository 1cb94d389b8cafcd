"""Text sources, tokenizers, token shards and batches."""

from diffx.data.batches import Batch, Batches, cu_seqlens
from diffx.data.corpus import Corpus, open_data
from diffx.data.tokenizers import Tokenizer, load_tokenizer

__all__ = ["Batch", "Batches", "Corpus", "Tokenizer", "cu_seqlens", "load_tokenizer", "open_data"]
