"""Token shards: the format on disk of the cache and of ``diffx data prepare``.

A folder holds ``meta.json``, ``tokenizer/`` and, for shard 0 (1, 2 …):

    train-00000.bin     tokens, little-endian uint16 or uint32; end-of-text before each document
    val-00000.bin       the same for held-out documents
    val-00000.docs.bin  three uint64 a held-out document: key, tokens, bytes that are scored
    *.mask.bin          uint8 a token, 1 where it carries loss; only if there are prompts

``meta.json`` is rewritten atomically after each finished shard, with ``"complete": true`` after the
last. It holds the SHA-256 of each file, the tokenizer's fingerprint, and a ``checksum`` over its
other keys, which older folders lack.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from diffx.config import UserError
from diffx.data.sources import Document
from diffx.data.tokenizers import load_tokenizer
from diffx.files import json_checksum, read_json, sha256, write_json

ProgressCallback = Callable[[str, int, int | None], None]
"""Takes a stage (``verifying``, ``tokenizing`` …), bytes done, and bytes in all if known."""

FORMAT = 1
_DTYPES = ("<u2", "<u4")
_SUFFIXES = {"train": [".bin"], "val": [".bin", ".docs.bin"]}
_COUNTS = {"documents": int, "tokens": int, "bytes": int}
_META = {
    "complete": bool,
    "settings": dict,
    "threshold": int,
    "tokenizer": {"fingerprint": str, "vocab_size": int, "eot_id": int},
    "dtype": _DTYPES,  # numpy would map a type of objects, which are pointers
    "masked": bool,
    "sha256": str,
    "shards": int,
    "files": dict,
    "train": _COUNTS,
    "val": _COUNTS,
}
_log = logging.getLogger(__name__)


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Report nothing."""


def cache_folder() -> Path:
    """Return ``$DIFFX_CACHE``, or ``~/.cache/diffx``."""
    return Path(os.environ.get("DIFFX_CACHE") or "~/.cache/diffx").expanduser()


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest type that holds every token."""
    return _DTYPES[vocab_size > 1 << 16]


class TokenArray:
    """A sequence of tokens that consists of several arrays.

    Args:
        parts: the tokens, mapped from files or in memory.
        masks: for each part, 1 where a token carries loss; by default all do.
    """

    def __init__(
        self, parts: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
    ) -> None:
        self._parts, self._masks = parts, masks
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return tokens ``start`` to ``stop`` and their loss mask (``None`` if all carry loss)."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        spans = [slice(max(start - begin, 0), stop - begin) for begin in self._starts[first:last]]

        def gather(parts: Sequence[np.ndarray]) -> np.ndarray:
            pieces = [part[span] for part, span in zip(parts[first:last], spans, strict=False)]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [parts[0][:0]])

        return gather(self._parts), None if self._masks is None else gather(self._masks)


class HeldOut(TokenArray):
    """Held-out documents in memory, with an end-of-text token at the end.

    Attributes:
        n_tokens: number of targets that are scored.
        n_bytes: their UTF-8 bytes (none for end of text): bits per byte are nats / n_bytes / ln 2.
        keys: the keys of the documents.
    """

    def __init__(
        self, tokens: np.ndarray, mask: np.ndarray | None, n_bytes: int, keys: np.ndarray
    ) -> None:
        super().__init__([tokens], None if mask is None else [mask])
        self.n_tokens = len(tokens) - 1 if mask is None else int(mask[1:].sum())
        self.n_bytes, self.keys = n_bytes, keys


class Shards:
    """An opened folder of finished shards. Files that were not verified before are verified.

    Args:
        folder: holds ``meta.json``.
        progress: called as files are hashed.

    Attributes:
        folder: as given.
        meta: the content of ``meta.json``.
        tokenizer: the tokenizer that made the tokens.
        train: the training tokens.

    Raises:
        UserError: the folder holds no shards, unfinished ones, or a damaged file.
    """

    def __init__(self, folder: Path, progress: ProgressCallback = no_progress) -> None:
        self.folder, refused = folder, f"data.path={folder} cannot be used"
        meta = read_meta(folder)
        if meta is None or not meta["complete"]:
            why = "holds no token shards" if meta is None else "is not finished"
            raise UserError(f"{refused}: it {why}; `diffx data prepare` writes or finishes it")
        _verify(folder, meta["files"], progress)
        self.meta = meta
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        if self.tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise UserError(f"{refused}: the fingerprint of its tokenizer differs from meta.json's")
        self.train = self._tokens("train")

    def held_out(self, limit: int | None = None, like: HeldOut | None = None) -> HeldOut:
        """Gather held-out documents in the order of their keys, which are hashes.

        Args:
            limit: take each document that keeps the total at or under this many tokens. If none
                does, take the beginning of the shortest, unless it has a loss mask.
            like: take the same text, tokenized by another tokenizer, instead.
        """
        documents = self._tokens("val")
        index = np.concatenate(self._arrays("val", ".docs.bin", "<u8")).reshape(-1, 3)
        keys, lengths = index[:, 0], index[:, 1].tolist()
        starts = np.cumsum([0, *lengths]).tolist()
        order = np.argsort(keys, kind="stable")
        if like is not None:
            order = order[np.isin(keys[order], like.keys)]
        chosen, total = [], 0
        for i in order.tolist():
            if limit is None or total + lengths[i] <= limit:
                chosen.append(i)
                total += lengths[i]
        none_fits = not chosen
        chosen = chosen or [int(np.argmin(lengths))]
        pieces = [documents.read(starts[i], starts[i + 1]) for i in chosen]
        tokens, n_bytes = np.concatenate([part for part, _ in pieces]), int(index[chosen, 2].sum())
        masks = [mask for _, mask in pieces if mask is not None]
        if not masks and (none_fits or (like is not None and like.n_bytes < n_bytes)):
            text = self.tokenizer.decode(tokens[1 : max(2, limit) if limit else None].tolist())
            text = text.encode()[: like.n_bytes if like else None].decode(errors="ignore")
            while len(text) > 1 and text.endswith("\N{REPLACEMENT CHARACTER}"):  # a cut character
                text = text[:-1]
            encoded = [self.tokenizer.eot_id, *self.tokenizer.encode(text)]
            tokens, n_bytes = np.array(encoded, tokens.dtype), len(text.encode())
        tokens = np.append(tokens, np.array(self.tokenizer.eot_id, tokens.dtype))
        mask = np.append(np.concatenate(masks), np.uint8(1)) if masks else None
        return HeldOut(tokens, mask, n_bytes, keys[chosen])

    def _tokens(self, split: str) -> TokenArray:
        masks = self._arrays(split, ".mask.bin", "u1") if self.meta["masked"] else None
        return TokenArray(self._arrays(split, ".bin", self.meta["dtype"]), masks)

    def _arrays(self, split: str, suffix: str, dtype: str) -> list[np.ndarray]:
        names = [_shard_name(split, shard, suffix) for shard in range(self.meta["shards"])]
        # An empty file cannot be mapped.
        present = [name for name in names if self.meta["files"][name]["bytes"]]
        return [np.memmap(self.folder / name, dtype, "r") for name in present] or [
            np.empty(0, dtype)
        ]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Read ``meta.json``; ``None`` if there is none.

    Raises:
        UserError: it is damaged, or has another format.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    meta = read_json(path, {"format": int})
    if meta["format"] != FORMAT:
        raise UserError(f"{path} has the format {meta['format']}; this version reads {FORMAT}")
    if meta.get("checksum", json_checksum(meta)) != json_checksum(meta):
        raise UserError(f"{path} is damaged: its content does not have its checksum")
    wrong = _wrong_key(meta, _META)
    if wrong is None:
        files = meta["files"]
        shards = range(min(meta["shards"], len(files) + 1))
        names = {name for shard in shards for name in _shard_names(shard, meta["masked"])}
        if other := sorted(names ^ files.keys()):
            raise UserError(
                f"{path} is damaged: {other[0]!r} is no name of a file of {meta['shards']} shards, "
                "or is missing"
            )
        wrong = _wrong_key(files, {name: {"bytes": int, "sha256": str} for name in files})
    if wrong is not None:
        raise UserError(f"{path} is damaged: its {wrong!r} is missing or cannot be used")
    return meta


def _wrong_key(value: Any, schema: dict[str, Any]) -> str | None:
    """Return a key that is missing, of another type than in ``schema``, or a negative number."""
    for key, kind in schema.items():
        item = value.get(key)
        if isinstance(kind, tuple):
            good = item in kind
        elif isinstance(kind, dict):
            good = isinstance(item, dict) and _wrong_key(item, kind) is None
        else:
            good = isinstance(item, kind) and (kind is not int or item >= 0)
        if not good:
            return key
    return None


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta.json`` atomically, with its checksum."""
    write_json(folder / "meta.json", meta | {"checksum": json_checksum(meta)})


def _verify(folder: Path, files: dict[str, dict[str, Any]], progress: ProgressCallback) -> None:
    """Compare the size and the SHA-256 of each file with those in ``meta.json``.

    The cache folder records the size, times of change and inode of the files that were hashed; a
    file is hashed again when one of these differs. A change that alters none of them, such as a
    fault of the disk, is not noticed. If the cache folder cannot be written, every call hashes.

    Raises:
        UserError: a file is missing or was altered.
    """
    state, refused = {}, f"data.path={folder} cannot be used"
    for name, file in files.items():
        if not (folder / name).is_file():
            raise UserError(f"{refused}: {name} is missing")
        status = (folder / name).stat()
        if status.st_size != file["bytes"]:
            raise UserError(f"{refused}: {name} has {status.st_size} bytes, not {file['bytes']}")
        times = [status.st_mtime_ns, status.st_ctime_ns]
        state[name] = [status.st_size, *times, status.st_ino, file["sha256"]]
    record = cache_folder() / "verified" / f"{sha256(str(folder.resolve()))[:32]}.json"
    with ExitStack() as stack:
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            # Of several processes that start together, one hashes.
            stack.enter_context(FileLock(f"{record}.lock"))
            verified = read_json(record)
        except (OSError, UserError):  # the cache cannot be written; no record yet, or a damaged one
            verified = {}
        names = [name for name in files if verified.get(name) != state[name]]
        done, total = 0, sum(files[name]["bytes"] for name in names)
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(_hash, [folder / name for name in names])
            for name, digest in zip(names, hashes, strict=True):
                if digest != files[name]["sha256"]:
                    raise UserError(f"{refused}: {name} is damaged: its SHA-256 differs")
                done += files[name]["bytes"]
                progress("verifying", done, total)
        if names:
            try:
                write_json(record, state)
            except OSError as error:
                told = f"{folder} is hashed again at the next start"
                _log.warning("%s: %s cannot be written: %s", told, record, error.strerror)


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        refused = f"data.path={path.parent} cannot be used"
        raise UserError(f"{refused}: {path.name} cannot be read: {error.strerror}") from error


class ShardWriter:
    """Appends documents to a folder, after its last finished shard.

    Args:
        folder: where to write.
        meta: the content of the folder's ``meta.json``; updated in place.
        shard_tokens: training tokens at which a shard is finished, after a whole document.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], shard_tokens: int) -> None:
        self._folder, self._meta, self._shard_tokens = folder, meta, shard_tokens
        self._open: dict[str, tuple[BinaryIO, Any]] = {}
        for path in folder.glob("*.bin"):
            if path.name not in meta["files"]:
                path.unlink()  # of an unfinished shard
        self._start_shard()

    def add(self, document: Document, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        """Append a document's tokens, with end of text first, and their loss mask if any."""
        meta, n_tokens, n_bytes = self._meta, len(tokens), document.n_bytes
        split = "val" if document.key <= meta["threshold"] else "train"
        self._append(split, tokens, mask)
        if split == "val":
            self._write("val", ".docs.bin", np.array([document.key, n_tokens, n_bytes], "<u8"))
        else:
            self._in_shard += n_tokens
        for key, count in {"documents": 1, "tokens": n_tokens, "bytes": n_bytes}.items():
            meta[split][key] += count
        meta["sha256"] = sha256(bytes.fromhex(meta["sha256"]), document.digest)
        if self._in_shard >= self._shard_tokens:
            self._finish_shard()
            self._start_shard()

    def finish(self) -> None:
        """Write the last shard, with an end-of-text token after the last training document."""
        end = np.array([self._meta["tokenizer"]["eot_id"]], self._meta["dtype"])
        self._append("train", end, np.ones(1, np.uint8) if self._meta["masked"] else None)
        self._meta["train"]["tokens"] += 1
        self._meta["complete"] = True
        self._finish_shard()

    def close(self) -> None:
        """Close the files of an unfinished shard."""
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    def _append(self, split: str, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        self._write(split, ".bin", tokens)
        if mask is not None:
            self._write(split, ".mask.bin", mask)

    def _write(self, split: str, suffix: str, array: np.ndarray) -> None:
        file, hasher = self._open[_shard_name(split, self._meta["shards"], suffix)]
        content = array.tobytes()
        file.write(content)
        hasher.update(content)

    def _start_shard(self) -> None:
        self._in_shard = 0
        for name in _shard_names(self._meta["shards"], self._meta["masked"]):
            self._open[name] = ((self._folder / name).open("wb"), hashlib.sha256())

    def _finish_shard(self) -> None:
        for name, (file, hasher) in self._open.items():
            file.flush()
            os.fsync(file.fileno())
            self._meta["files"][name] = {"bytes": file.tell(), "sha256": hasher.hexdigest()}
        self.close()
        self._meta["shards"] += 1
        write_meta(self._folder, self._meta)


def _shard_name(split: str, shard: int, suffix: str) -> str:
    return f"{split}-{shard:05d}{suffix}"


def _shard_names(shard: int, masked: bool) -> list[str]:
    return [
        _shard_name(split, shard, suffix)
        for split, suffixes in _SUFFIXES.items()
        for suffix in suffixes + [".mask.bin"] * masked
    ]
