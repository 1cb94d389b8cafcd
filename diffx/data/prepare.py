"""Writing token shards, for the cache and for ``diffx data prepare``."""

import functools
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffx.config.checks import refuse
from diffx.config.data import BpeTokenizer, DataConfig, HubData, TokenizerConfig
from diffx.config.train import PrepareJob
from diffx.data.shards import (
    FORMAT,
    ProgressCallback,
    Row,
    Shards,
    no_progress,
    read_meta,
    token_dtype,
    write_meta,
    write_shards,
)
from diffx.data.sources import Document, documents, label, source_files
from diffx.data.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from diffx.errors import storage_errors
from diffx.files import json_sha256, locked, replacing_folder

_FEW = 150  # documents whose keys would often hold out far more or less than the fraction
BPE_BYTES = 200 * 10**6  # more text hardly changes a vocabulary of some thousands
_GROUP_BYTES, _GROUP_DOCUMENTS = 1 << 20, 512  # what a process tokenizes at once


@dataclass(frozen=True)
class Source:
    """Documents to tokenize: ``read`` returns the same at each call, from ``total`` bytes."""

    data: DataConfig
    read: Callable[[], Iterable[Document]]
    total: int | None = None
    progress: ProgressCallback = no_progress


def prepare(job: PrepareJob, progress: ProgressCallback = no_progress) -> Path:
    """Tokenize a corpus into ``job.out``, for ``data=shards``.

    The result does not depend on the number of processes. An unfinished folder is continued after
    its last finished shard.

    Raises:
        UserError: the text, the tokenizer or ``job.out`` cannot be used.
        RunError: the disk is full or cannot be written.
    """
    out = Path(job.out).expanduser()
    files = {} if isinstance(job.data, HubData) else source_files(job.data)
    status = {name: path.stat() for name, path in files.items()}
    state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in status.items()]
    total = sum(stat.st_size for stat in status.values()) or None
    source = Source(job.data, lambda: documents(job.data), total, progress)
    tokenizer = ready(job.tokenizer)
    wanted = settings(job.data, tokenizer, json_sha256(state)) | {"shard_tokens": job.shard_tokens}
    _begun(out, wanted)  # refuse before anything is made, the lock included
    with storage_errors(f"out={out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.with_name(f".{out.name}.lock"), f"out={out}"):
            meta = _begun(out, wanted)
            if meta and meta["complete"]:
                Shards(out, progress)  # which verifies it
            else:
                workers = job.workers or os.cpu_count() or 1
                build(out, source, tokenizer, wanted, int(job.shard_tokens), workers)
    return out


def _begun(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the ``meta.json`` of an unfinished or finished folder, ``None`` for a new one."""
    meta, setting = read_meta(out), f"out={out}"
    other = meta is None and out.exists() and (not out.is_dir() or any(out.iterdir()))
    refuse(other, setting, "it exists and holds no token shards; choose a new folder")
    for key, value in wanted.items():
        why = f"it was made with another {key}; choose a new folder or delete it"
        refuse(meta is not None and meta["settings"].get(key) != value, setting, why)
    return meta


def ready(tokenizer: TokenizerConfig | Tokenizer) -> BpeTokenizer | Tokenizer:
    """Make the tokenizer, unless it must be trained first; a cache's key depends on its content."""
    if isinstance(tokenizer, TokenizerConfig) and not isinstance(tokenizer, BpeTokenizer):
        return make_tokenizer(tokenizer, ())
    return tokenizer


def settings(
    data: DataConfig, tokenizer: BpeTokenizer | Tokenizer, contents: str
) -> dict[str, Any]:
    """Return all settings that determine the shards of a corpus, with names for messages."""
    # Version 1 held out whole documents, however few and long.
    chosen = {"format": FORMAT, "way to hold documents out": 2}
    for key, value in asdict(data).items():
        if key not in ("path", "val_tokens", "shuffle_buffer"):
            chosen[f"data.{key}"] = value
    if isinstance(tokenizer, BpeTokenizer):
        made = asdict(tokenizer)
    else:
        made = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    chosen |= {f"tokenizer.{key}": value for key, value in made.items()}
    return chosen | {"state of the files": contents}


def build(
    folder: Path,
    source: Source,
    tokenizer: BpeTokenizer | Tokenizer,
    settings: dict[str, Any],
    shard_tokens: int,
    workers: int,
) -> None:
    """Write a folder of shards, or finish it."""
    meta = read_meta(folder)
    if meta is None:
        threshold = holdout_threshold(source)
        if isinstance(tokenizer, BpeTokenizer):
            tokenizer = make_tokenizer(tokenizer, training_texts(source, threshold))
        meta = {
            "format": FORMAT,
            "complete": False,
            "settings": settings,
            "threshold": threshold,
            "tokenizer": tokenizer_facts(tokenizer),
            "dtype": token_dtype(tokenizer.vocab_size),
            "masked": getattr(source.data, "prompt_key", None) is not None,
            "sha256": "",
            "shards": 0,
            "files": {},
            **{split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")},
        }
        with replacing_folder(folder) as start:  # so that the folder never lacks its meta.json
            tokenizer.save(start / "tokenizer")
            write_meta(start, meta)
    done = meta["train"]["documents"] + meta["val"]["documents"]
    rows = _tokenize(source, done, folder / "tokenizer", meta["masked"], workers)
    write_shards(folder, meta, rows, shard_tokens)


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what is recorded of a tokenizer."""
    fields = ("kind", "vocab_size", "eot_id", "fingerprint")
    return {name: getattr(tokenizer, name) for name in fields}


def holdout_threshold(source: Source) -> int:
    """Return the highest key that is held out.

    Of more than ``_FEW`` documents, ``data.val_fraction`` of all keys is held out. Of fewer, those
    with the lowest keys are held out whose bytes come nearest to ``data.val_fraction`` of all
    bytes: at least one document, and not all.

    Raises:
        UserError: the corpus holds no text, or no two different documents.
    """
    wanted, low, high = int(source.data.val_fraction * 2**64), 2**64, -1
    read: list[tuple[int, int]] = []
    for document in source.read():
        low, high = min(low, document.key), max(high, document.key)
        read += [(document.key, document.n_bytes)] if len(read) <= _FEW else []
        if len(read) > _FEW and low <= wanted < high:
            return wanted
    setting = label(source.data)
    refuse(high < 0, setting, "it holds no text")
    one = "it holds one document, and one more is held out; give more text, or a .jsonl"
    refuse(low == high, setting, one)
    if len(read) > _FEW:
        return low
    read.sort()
    totals = itertools.accumulate(size for _, size in read)
    sizes = dict(zip((key for key, _ in read), totals, strict=True))
    aim = source.data.val_fraction * sizes.pop(high)
    return min(sizes, key=lambda key: abs(sizes[key] - aim))


def encode_documents(tokenizer: Tokenizer, documents: list[Document], masked: bool) -> list[Row]:
    """Tokenize each document to an array of end of text, prompt and text, and its loss mask."""
    prompts: list[list[int]] = [[]] * len(documents)
    if masked:
        prompts = tokenizer.encode_batch([document.prompt for document in documents])
    encoded = tokenizer.encode_batch([document.text for document in documents])
    dtype = token_dtype(tokenizer.vocab_size)
    rows = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        mask = np.array([1] + [0] * len(prompt) + [1] * len(ids), np.uint8) if masked else None
        rows.append((np.array([tokenizer.eot_id, *prompt, *ids], dtype), mask))
    return rows


def training_texts(source: Source, threshold: int) -> Iterator[str]:
    """Yield the texts that a tokenizer is trained on."""
    done, limit = 0, getattr(source.data, "tokenizer_documents", None)
    for document in itertools.islice(source.read(), limit):
        if document.key > threshold:
            yield document.prompt + document.text
            done += document.n_bytes
            source.progress("training the tokenizer", done, None)
        if done > BPE_BYTES:
            return


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += document.n_bytes
        if size >= _GROUP_BYTES or len(group) >= _GROUP_DOCUMENTS:
            yield group
            group, size = [], 0
    yield group


def _tokenize(
    source: Source, done: int, folder: Path, masked: bool, workers: int
) -> Iterator[tuple[Document, Row]]:
    """Tokenize documents after the first ``done`` in order; two groups a worker are in progress."""
    pool: Executor = ThreadPoolExecutor(1)
    if workers > 1:
        # A forked process would inherit locks that the libraries' threads hold.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, _start_worker)
    _load.cache_clear()
    pending: deque[tuple[list[Document], Future[list[Row]]]] = deque()
    groups, read = _groups(itertools.islice(source.read(), done, None)), 0
    try:
        # The empty groups at the end let the last ones be yielded.
        for group in itertools.chain(groups, itertools.repeat([], 2 * workers)):
            pending.append((group, pool.submit(_encode, folder, group, masked)))
            if len(pending) > 2 * workers:
                finished, future = pending.popleft()
                for document, row in zip(finished, future.result(), strict=True):
                    yield document, row
                    read = document.read or read + document.n_bytes
                source.progress("tokenizing", read, source.total)
    finally:
        pool.shutdown(cancel_futures=True)


_load = functools.lru_cache(1)(load_tokenizer)


def _encode(folder: Path, documents: list[Document], masked: bool) -> list[Row]:
    return encode_documents(_load(folder), documents, masked)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    # Workers would outlive a killed parent.
    threading.Thread(target=exit_with_parent, daemon=True).start()
