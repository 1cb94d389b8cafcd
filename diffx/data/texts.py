"""A corpus as plain documents, for evaluations."""

from itertools import islice
from pathlib import Path

from diffx.config.data import DataConfig, HubData, ShardsData
from diffx.data.prepare import Source, holdout_threshold
from diffx.data.shards import Shards
from diffx.data.sources import documents
from diffx.data.tokenizers import decode_documents
from diffx.files import sha256

MAX_CHARACTERS = 64 << 20  # no evaluation needs more


def read_texts(data: DataConfig, held_out: bool) -> tuple[list[str], str]:
    """Return a corpus's documents, at most the first 64M characters, and their SHA-256.

    Only the documents that training leaves out are read if ``held_out``, and of token shards.

    Raises:
        UserError: the text cannot be used.
    """
    texts: list[str] = []
    if isinstance(data, ShardsData):
        shards, limit = Shards(Path(data.path).expanduser()), int(data.val_tokens)
        texts = decode_documents(shards.tokenizer, shards.held_out(limit).read(0, limit)[0])
    else:
        read = None
        if isinstance(data, HubData):  # which is read once
            read = list(islice(documents(data), data.tokenizer_documents))
        source, length = Source(data, lambda: read or documents(data)), 0
        threshold = holdout_threshold(source) if held_out else 2**64
        for document in source.read():
            if document.key <= threshold:
                texts.append(document.prompt + document.text)
                length += len(document.text)
                if length > MAX_CHARACTERS:
                    break
    texts = [text for text in texts if text]
    return texts, sha256("\0".join(texts))
