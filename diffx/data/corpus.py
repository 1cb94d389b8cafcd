"""``open_data``: from a config to training batches and held-out text, through a cache of tokens."""

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from diffx.config import RunError, UserError
from diffx.config.data import DataConfig, HubData, ShardsData, TokenizerConfig
from diffx.data.prepare import Progress, build, digest, settings
from diffx.data.shards import HeldOut, Shards, TokenArray
from diffx.data.sources import documents, file_hashes, source_files
from diffx.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from diffx.data.batches import Batch, WindowBatches
    from diffx.data.stream import StreamBatches

    Batches = WindowBatches | StreamBatches

_SHARD_TOKENS = 10**8
_log = logging.getLogger(__name__)


@dataclass
class Corpus:
    """Text as tokens.

    Attributes:
        tokenizer: text to tokens and back.
        shards: its tokens on disk; of a stream, those of its first documents.
        val: held-out tokens.
        info: what the run folder records: the sources with their hashes, documents, tokens and bytes of each split.
        stream: the data set that training reads, if it is a stream.
    """

    tokenizer: Tokenizer
    shards: Shards
    val: HeldOut
    info: dict[str, Any]
    stream: HubData | None = None

    @property
    def train(self) -> TokenArray:
        """Training tokens; of a stream, those of its first documents."""
        return self.shards.train

    def batches(self, seq_len: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> "Batches":
        """Endless training batches of ``batch_size`` sequences of ``seq_len`` tokens over all processes.

        Raises:
            UserError: the training text is shorter than one sequence, or the rows do not divide among the processes.
        """
        from diffx.data.batches import WindowBatches  # with torch, which a process that only tokenizes does not need
        from diffx.data.stream import StreamBatches

        corpus = digest([self.info["sha256"], self.tokenizer.fingerprint])
        if self.stream is None:
            return WindowBatches(self.train, corpus, seq_len, batch_size, seed, rank, world_size)
        threshold = self.shards.meta["threshold"]
        return StreamBatches(self.stream, self.tokenizer, threshold, corpus, seq_len, batch_size, seed, rank, world_size)

    def val_batches(self, seq_len: int, batch_size: int, rank: int = 0, world_size: int = 1) -> "Iterator[Batch]":
        """Batches in which every held-out token is predicted once."""
        from diffx.data.batches import val_batches

        return val_batches(self.val, seq_len, batch_size, self.tokenizer.eot_id, rank, world_size)


def open_data(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, *, progress: Progress | None = None) -> Corpus:
    """Open a corpus, tokenizing it into the cache (``$DIFFX_CACHE`` or ``~/.cache/diffx``) if it is not there.

    Args:
        data: the source.
        tokenizer: the tokenizer to make, or one that a run already has. Shards bring their own.
        progress: called as the corpus is read.

    Raises:
        UserError: the text or the tokenizer cannot be used.
        RunError: the cache cannot be written.
    """
    info: dict[str, Any] = {"kind": data.kind}
    if isinstance(data, ShardsData):
        shards = Shards(Path(data.path).expanduser())
    elif isinstance(data, HubData):
        first = list(itertools.islice(documents(data), data.tokenizer_documents))
        wanted = settings(data, tokenizer, digest([document.digest.hex() for document in first]))
        shards = _cached(wanted, lambda folder: build(folder, lambda: first, data, tokenizer, wanted, _SHARD_TOKENS, progress=progress))
    else:
        files = source_files(data)
        hashes = file_hashes(files)
        wanted = settings(data, tokenizer, digest(list(hashes.values())))
        sizes = {name: path.stat().st_size for name, path in files.items()}
        info["files"] = [{"name": name, "bytes": sizes[name], "sha256": hashes[name]} for name in files]
        total = sum(sizes.values())
        shards = _cached(
            wanted,
            lambda folder: build(folder, lambda: documents(data), data, tokenizer, wanted, _SHARD_TOKENS, total=total, progress=progress),
        )
    val = shards.held_out(int(data.val_tokens))
    meta = shards.meta
    info |= {key: meta[key] for key in ("sha256", "tokenizer", "train")}
    info["val"] = meta["val"] | {"measured": {"documents": len(val.keys), "tokens": val.n_tokens, "bytes": val.n_bytes}}
    stream = data if isinstance(data, HubData) else None
    return Corpus(load_tokenizer(shards.folder / "tokenizer"), shards, val, info, stream)


def cache_folder() -> Path:
    """Where tokens are cached."""
    return Path(os.environ.get("DIFFX_CACHE") or "~/.cache/diffx").expanduser()


def _cached(wanted: dict[str, Any], build_in: Callable[[Path], None]) -> Shards:
    """Open the shards made with these settings, building them first if there are none or if they are damaged."""
    folder = cache_folder() / digest(wanted)[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of several processes that start together, one builds
            try:
                return Shards(folder)
            except UserError as error:
                if folder.exists():
                    _log.warning("the cache is built again: %s", error)
            temporary = folder.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            build_in(temporary)
            os.replace(temporary, folder)
    except OSError as error:
        raise RunError(f"the cache {folder.parent} cannot be written: {error.strerror or error}; DIFFX_CACHE names another") from error
    return Shards(folder)
