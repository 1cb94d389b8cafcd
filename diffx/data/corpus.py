"""From a config to training batches and held-out text, through a cache of tokens."""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from diffx.config import UserError
from diffx.config.data import (
    BpeTokenizer,
    DataConfig,
    HubData,
    RetrievalData,
    ShardsData,
    TokenizerConfig,
)
from diffx.data.batches import Batch, Batches, WindowBatches, val_batches
from diffx.data.prepare import Source, build, holdout_threshold, ready, settings
from diffx.data.shards import (
    HeldOut,
    ProgressCallback,
    Shards,
    TokenArray,
    cache_folder,
    no_progress,
    read_meta,
)
from diffx.data.sources import documents, file_hashes, source_files
from diffx.data.stream import StreamBatches
from diffx.data.synthetic import SampleBatches, held_out, train_tokenizer
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
        shards: the tokens on disk; of a stream, those of its first documents; of the retrieval
            task, those of the text around the needles.
        val: held-out tokens.
        info: the content of ``data.json``: hashes of the sources, and the size of each split.
    """

    data: DataConfig
    shards: Shards
    val: HeldOut
    info: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shards."""
        return self.shards.tokenizer

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
        if isinstance(self.data, RetrievalData):
            return SampleBatches(self.data, self.shards, *args)
        if isinstance(self.data, HubData):
            return StreamBatches(self.data, self.shards, *args)
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

    The tokenizer is made, or taken as it is; shards have one already.

    Raises:
        UserError: the text or the tokenizer cannot be used.
        RunError: the cache cannot be written.
    """
    info: dict[str, Any] = {"kind": data.kind}
    if isinstance(data, RetrievalData):
        if isinstance(tokenizer, BpeTokenizer):
            tokenizer = train_tokenizer(data, tokenizer.vocab_size)
        text = open_data(data.text(), tokenizer, progress=progress)
        val = held_out(data, text.shards)
        return Corpus(data, text.shards, val, text.info | info | _measured(text.shards, val))
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
    return Corpus(data, shards, val, info | _measured(shards, val))


def _measured(shards: Shards, val: HeldOut) -> dict[str, Any]:
    counts = {"documents": len(val.keys), "tokens": val.n_tokens, "bytes": val.n_bytes}
    return {"val": shards.meta["val"] | {"measured": counts}}


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
