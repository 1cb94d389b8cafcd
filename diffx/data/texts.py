"""A corpus as plain documents, for evaluations."""

import itertools
from pathlib import Path

from diffx.config.data import DataConfig, HubData, ShardsData
from diffx.data.prepare import Source, holdout_threshold
from diffx.data.shards import Shards
from diffx.data.sources import documents
from diffx.data.tokenizers import decode_documents
from diffx.files import sha256

MAX_CHARACTERS = 64 << 20  # no evaluation needs more


def read_texts(data: DataConfig, held_out: bool) -> tuple[list[str], str]:
    """Read a corpus's documents, at most the first 64M characters.

    Args:
        data: the source; of token shards only held-out text is read.
        held_out: read only the documents that training leaves out.

    Returns:
        The documents and their SHA-256.

    Raises:
        UserError: the text cannot be used.
    """
    if isinstance(data, ShardsData):
        shards = Shards(Path(data.path).expanduser())
        tokens = shards.held_out(int(data.val_tokens)).read(0, int(data.val_tokens))[0]
        texts = decode_documents(shards.tokenizer, tokens)
    else:
        read = None
        if isinstance(data, HubData):
            read = list(itertools.islice(documents(data), data.tokenizer_documents))
        source = Source(data, lambda: read or documents(data))
        threshold = holdout_threshold(source) if held_out else 2**64
        texts, length = [], 0
        for document in source.read():
            if document.key <= threshold:
                texts.append(f"{document.prompt}{document.text}")
                length += len(document.text)
                if length > MAX_CHARACTERS:
                    break
    texts = [text for text in texts if text]
    return texts, sha256("\0".join(texts))
