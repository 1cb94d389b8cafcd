"""Write token shards: for the cache, and for ``diffx data prepare``. A killed one goes on behind its last finished shard."""

import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from diffx.config import RunError, UserError
from diffx.config.data import BpeTokenizer, DataConfig, HubData, TokenizerConfig
from diffx.config.train import PrepareJob
from diffx.data.shards import FORMAT, ShardWriter, read_meta, write_meta
from diffx.data.sources import Document, documents, label, reason, source_files
from diffx.data.tokenizers import FastTokenizer, TiktokenEncoding, Tokenizer, load_tokenizer, make_tokenizer

Progress = Callable[[str, int, int | None], None]
"""Called with a stage (``training the tokenizer``, ``tokenizing``), bytes done, and bytes in all (``None`` if unknown)."""

BPE_BYTES = 200 * 10**6  # a vocabulary of some thousands is settled long before
_GROUP_BYTES, _GROUP_DOCUMENTS = 1 << 20, 512  # what a process tokenizes at once


def prepare(job: PrepareJob, progress: Progress | None = None) -> Path:
    """Tokenize a corpus into ``job.out``, for ``data=shards``. The result does not depend on the number of processes.

    An unfinished folder is taken up behind its last finished shard: the documents before are read again, but not tokenized.

    Raises:
        UserError: the text or the tokenizer cannot be used, or ``job.out`` is something else or was made with other settings.
        RunError: the disk is full or cannot be written.
    """
    out = Path(job.out).expanduser()
    state, total = None, None
    if not isinstance(job.data, HubData):
        stats = {name: path.stat() for name, path in source_files(job.data).items()}
        state = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
        total = sum(stat.st_size for stat in stats.values())
    tokenizer = ready(job.tokenizer)
    wanted = settings(job.data, tokenizer, digest(state)) | {"shard_tokens": job.shard_tokens}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.parent / f".{out.name}.lock", timeout=0):
            meta = read_meta(out)
            if meta is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"out={out} cannot be used: it exists and holds no token shards; choose a new folder")
            differing = [key for key in wanted if meta and meta["settings"].get(key) != wanted[key]]
            if differing:
                raise UserError(f"out={out} cannot be used: it was made with another {differing[0]}; choose a new folder or delete it")
            if meta is None or not meta["complete"]:
                workers = job.workers or os.cpu_count() or 1
                build(out, lambda: documents(job.data), job.data, tokenizer, wanted, int(job.shard_tokens), workers, total, progress)
    except Timeout as error:
        raise UserError(f"out={out} cannot be used: another process is writing it") from error
    except OSError as error:
        raise RunError(f"out={out} cannot be written: {reason(error)}") from error
    return out


def ready(tokenizer: TokenizerConfig | Tokenizer) -> BpeTokenizer | Tokenizer:
    """Make the tokenizer unless it has yet to be trained, so that what it is, not what it is called, decides about a cache."""
    if isinstance(tokenizer, BpeTokenizer | FastTokenizer | TiktokenEncoding):
        return tokenizer
    return make_tokenizer(tokenizer, ())


def settings(data: DataConfig, tokenizer: BpeTokenizer | Tokenizer, contents: str) -> dict[str, Any]:
    """Everything that decides what the shards of a corpus hold, by the names that a message shows."""
    chosen = {f"data.{key}": value for key, value in asdict(data).items() if key not in ("path", "val_tokens", "shuffle_buffer")}
    made = asdict(tokenizer) if isinstance(tokenizer, BpeTokenizer) else {"fingerprint": tokenizer.fingerprint}
    return chosen | {f"tokenizer.{key}": value for key, value in made.items()} | {"state of the files": contents}


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def build(
    folder: Path,
    source: Callable[[], Iterable[Document]],
    data: DataConfig,
    tokenizer: BpeTokenizer | Tokenizer,
    settings: dict[str, Any],
    shard_tokens: int,
    workers: int = 1,
    total: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a folder of shards, or finish it; ``source`` gives the same documents each time it is called."""
    report = progress or (lambda stage, done, total: None)
    meta = read_meta(folder)
    if meta is None:
        threshold = holdout_threshold(source(), data)
        if isinstance(tokenizer, BpeTokenizer):
            tokenizer = make_tokenizer(tokenizer, _training_texts(source(), data, threshold, report))
        meta = _empty_meta(tokenizer, threshold, getattr(data, "prompt_key", None) is not None, settings)
        start = folder.with_name(f".{folder.name}.{os.getpid()}")  # renamed, so that the folder never lacks its meta.json
        tokenizer.save(start / "tokenizer")
        write_meta(start, meta)
        os.replace(start, folder)
    writer = ShardWriter(folder, meta, shard_tokens)
    read = 0
    rest = itertools.islice(source(), meta["train"]["documents"] + meta["val"]["documents"], None)
    try:
        for group in _tokenize(rest, folder / "tokenizer", workers):
            for document, tokens, n_prompt in group:
                writer.add(document, tokens, n_prompt)
                read = document.read or read + document.n_bytes
            report("tokenizing", read, total)
        writer.finish()
    finally:
        writer.close()


def holdout_threshold(documents: Iterable[Document], data: DataConfig) -> int:
    """The highest key that is held out: ``data.val_fraction`` of all keys, but in a small corpus at least one document, and not all.

    Reads no further than it has to, which is a few dozen documents.

    Raises:
        UserError: the corpus holds no text, or no two different documents.
    """
    wanted, low, high = int(data.val_fraction * 2**64), 2**64, -1
    for document in documents:
        low, high = min(low, document.key), max(high, document.key)
        if low <= wanted < high:
            return wanted
    if high < 0:
        raise UserError(f"{label(data)} cannot be used: it holds no text")
    if low == high:
        raise UserError(f"{label(data)} cannot be used: it holds one document, and one more has to be held out")
    return low


def encode_documents(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> list[tuple[np.ndarray, int]]:
    """Tokenize (prompt, text) pairs: end of text, prompt and text in one array, and the number of prompt tokens."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    bodies = tokenizer.encode_batch([text for _, text in texts])
    prompts = tokenizer.encode_batch([prompt for prompt, _ in texts]) if any(prompt for prompt, _ in texts) else [[]] * len(texts)
    return [(np.array([tokenizer.eot_id, *prompt, *body], dtype), len(prompt)) for prompt, body in zip(prompts, bodies, strict=True)]


def _empty_meta(tokenizer: Tokenizer, threshold: int, masked: bool, settings: dict[str, Any]) -> dict[str, Any]:
    names = ("kind", "vocab_size", "eot_id", "fingerprint")
    return {
        "format": FORMAT,
        "complete": False,
        "settings": settings,
        "tokenizer": {name: getattr(tokenizer, name) for name in names},
        "dtype": "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
        "masked": masked,
        "threshold": threshold,
        "sha256": "",
        "shards": 0,
        "files": {},
        "train": {"documents": 0, "tokens": 0, "bytes": 0},
        "val": {"documents": 0, "tokens": 0, "bytes": 0},
    }


def _training_texts(documents: Iterable[Document], data: DataConfig, threshold: int, report: Progress) -> Iterator[str]:
    if isinstance(data, HubData):
        documents = itertools.islice(documents, data.tokenizer_documents)
    done = 0
    for document in documents:
        if document.key > threshold:
            yield document.prompt + document.text
            done += document.n_bytes
            report("training the tokenizer", done, None)
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
    if group:
        yield group


def _tokenize(documents: Iterable[Document], folder: Path, workers: int) -> Iterator[list[tuple[Document, np.ndarray, int]]]:
    """Tokenize documents in their order, a group at a time, with a few groups a process in flight."""
    if workers == 1:
        tokenizer = load_tokenizer(folder)
        for group in _groups(documents):
            pairs = [(document.prompt, document.text) for document in group]
            yield [(d, *result) for d, result in zip(group, encode_documents(tokenizer, pairs), strict=True)]
        return
    # A forked process would inherit locked threads of the libraries, so each starts afresh.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (folder,))
    flight: deque[tuple[list[Document], Future]] = deque()
    try:
        for group in itertools.chain(_groups(documents), itertools.repeat([], 2 * workers)):  # the empty ones drain the flight
            pairs = [(document.prompt, document.text) for document in group]
            flight.append((group, pool.submit(_encode_in_worker, pairs)))
            if len(flight) > 2 * workers:
                finished, future = flight.popleft()
                yield [(d, *result) for d, result in zip(finished, future.result(), strict=True)]
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer


def _start_worker(folder: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = load_tokenizer(folder)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()  # else a killed parent leaves its workers behind


def _encode_in_worker(texts: list[tuple[str, str]]) -> list[tuple[np.ndarray, int]]:
    return encode_documents(_worker_tokenizer, texts)
