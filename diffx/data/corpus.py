"""From a config to training batches and held-out text, through a cache of tokens."""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from diffx.config import UserError
from diffx.config.data import (
    BpeTokenizer,
    DataConfig,
    HubData,
    RecallData,
    RetrievalData,
    ShardsData,
    TokenizerConfig,
)
from diffx.data.batches import Batch, Batches, WindowBatches, val_batches
from diffx.data.prepare import Source, build, holdout_threshold, ready, settings, tokenizer_facts
from diffx.data.recall import HELD_OUT, TRAINING, make_sample, recall_tokenizer
from diffx.data.shards import (
    HeldOut,
    ProgressCallback,
    Shards,
    TokenArray,
    cache_folder,
    no_progress,
    read_meta,
)
from diffx.data.sources import NO_TEXT, documents, file_hashes, source_files
from diffx.data.stream import StreamBatches
from diffx.data.synthetic import (
    SampleBatches,
    held_out,
    retrieval_batches,
    retrieval_held_out,
    train_tokenizer,
)
from diffx.data.tokenizers import Tokenizer, decode_documents, load_tokenizer
from diffx.errors import storage_errors
from diffx.files import json_sha256, sha256

_SHARD_TOKENS = 10**8
MAX_CHARACTERS = 64 << 20  # that `read_texts` reads; no evaluation needs more
_log = logging.getLogger(__name__)


@dataclass
class Corpus:
    """Text as tokens.

    Attributes:
        data: the config it was opened with.
        tokenizer: of its tokens.
        val: held-out tokens.
        info: the content of ``data.json``: hashes of the sources, and the size of each split.
    """

    data: DataConfig
    tokenizer: Tokenizer
    val: HeldOut
    info: dict[str, Any]
    _shards: Shards | None = None

    @property
    def shards(self) -> Shards:
        """The tokens on disk.

        Of a stream, those of its first documents; of the retrieval task, those of the text around
        the needles.

        Raises:
            UserError: the corpus has no text.
        """
        if self._shards is None:
            raise UserError(NO_TEXT)
        return self._shards

    @property
    def train(self) -> TokenArray:
        """The training tokens of the shards."""
        return self.shards.train

    def batches(
        self, seq_len: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Batches:
        """Return endless training batches; see ``Batches`` for the arguments.

        Raises:
            UserError: the text is too short, or the rows do not divide among the processes.
        """
        corpus = json_sha256([self.info["sha256"], self.tokenizer.fingerprint])
        args = (corpus, seq_len, batch_size, seed, rank, world_size)
        if isinstance(data := self.data, RecallData):

            def make(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
                return make_sample(data, [TRAINING, seed, number])

            return SampleBatches(data, self.tokenizer.eot_id, make, *args)
        if isinstance(data, RetrievalData):
            return retrieval_batches(data, self.shards, *args)
        if isinstance(data, HubData):
            return StreamBatches(data, self.shards, *args)
        return WindowBatches(self.train, *args)

    def val_batches(
        self, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Return batches in which every held-out token is predicted once."""
        return val_batches(self.val, seq_len, batch_size, self.tokenizer.eot_id, rank, world_size)


def open_data(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    *,
    progress: ProgressCallback = no_progress,
) -> Corpus:
    """Open a corpus; tokenize it first if the cache (``$DIFFX_CACHE``) does not have it.

    The tokenizer is made, or taken as it is; shards and the recall task have one already.

    Raises:
        UserError: the text or the tokenizer cannot be used.
        RunError: the cache cannot be written.
    """
    info: dict[str, Any] = {"kind": data.kind}
    if isinstance(data, RecallData):
        words = recall_tokenizer(data)
        val = held_out(data, words, lambda number: make_sample(data, [HELD_OUT, 0, number]))
        info |= {
            "sha256": json_sha256(asdict(data)),
            "tokenizer": tokenizer_facts(words),
            "val": {"measured": _counts(val)},
        }
        return Corpus(data, words, val, info)
    if isinstance(data, RetrievalData):
        if isinstance(tokenizer, BpeTokenizer):
            tokenizer = train_tokenizer(data, tokenizer.vocab_size)
        text = open_data(data.text(), tokenizer, progress=progress)
        val = retrieval_held_out(data, text.shards)
        info = text.info | info | {"val": text.info["val"] | {"measured": _counts(val)}}
        return Corpus(data, text.tokenizer, val, info, text.shards)
    if isinstance(data, ShardsData):
        shards = Shards(Path(data.path).expanduser(), progress)
    elif isinstance(data, HubData):
        first = list(islice(documents(data), data.tokenizer_documents))
        contents = json_sha256([document.digest.hex() for document in first])
        shards = _cached(Source(data, lambda: first, progress=progress), tokenizer, contents)
    else:
        files = source_files(data)
        hashes = dict(file_hashes(files))
        info["files"] = [
            {"name": name, "bytes": path.stat().st_size, "sha256": hashes[name]}
            for name, path in files.items()
        ]
        total = sum(file["bytes"] for file in info["files"])
        source = Source(data, lambda: documents(data), total, progress)
        shards = _cached(source, tokenizer, json_sha256(list(hashes.values())))
    val = shards.held_out(int(data.val_tokens))
    info |= {key: shards.meta[key] for key in ("sha256", "tokenizer", "train")}
    info["val"] = shards.meta["val"] | {"measured": _counts(val)}
    return Corpus(data, shards.tokenizer, val, info, shards)


def _counts(val: HeldOut) -> dict[str, int]:
    return {"documents": len(val.keys), "tokens": val.n_tokens, "bytes": val.n_bytes}


def _cached(source: Source, tokenizer: TokenizerConfig | Tokenizer, contents: str) -> Shards:
    """Open the cached shards of the source, whose hash is ``contents``; build them if needed."""
    made = ready(tokenizer)
    wanted = settings(source.data, made, contents)
    folder = cache_folder() / json_sha256(wanted)[:32]
    with storage_errors(f"the cache {folder.parent} cannot be written (set DIFFX_CACHE)"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of several processes that start together, one builds
            try:
                return Shards(folder, source.progress)
            except UserError as error:
                if folder.exists():
                    _log.warning("the cache is built again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
            temporary = folder.with_suffix(".tmp")  # that of a killed process is finished
            try:
                if read_meta(temporary):
                    load_tokenizer(temporary / "tokenizer")
            except UserError as error:
                _log.warning("the cache is built from its beginning: %s", error)
                shutil.rmtree(temporary)
            build(temporary, source, made, wanted, _SHARD_TOKENS, workers=1)
            os.replace(temporary, folder)
    return Shards(folder)


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
