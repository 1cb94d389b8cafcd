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
_FIELDS = {"format": int, "complete": bool, "settings": dict, "threshold": int, "tokenizer": dict}
_FIELDS |= {"dtype": str, "masked": bool, "sha256": str, "shards": int, "files": dict}
_FIELDS |= {"train": dict, "val": dict}
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
        starts = self._starts
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = min(int(np.searchsorted(starts, stop, side="left")), len(self._parts))
        spans = [
            (part, slice(max(start - starts[part], 0), stop - starts[part]))
            for part in range(first, last)
        ]
        masks = None if self._masks is None else _gather(self._masks, spans)
        return _gather(self._parts, spans), masks


def _gather(parts: Sequence[np.ndarray], spans: list[tuple[int, slice]]) -> np.ndarray:
    pieces = [parts[part][span] for part, span in spans]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint16)])


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
        if meta is None:
            raise UserError(
                f"{refused}: it holds no token shards; `diffx data prepare` writes them"
            )
        if not meta["complete"]:
            raise UserError(
                f"{refused}: it is not finished; run the same `diffx data prepare` again to go on"
            )
        _verify(folder, meta["files"], progress)
        self.meta = meta
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        if self.tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise UserError(
                f"{refused}: its tokenizer is not the one that made its tokens (fingerprint "
                "differs)"
            )
        self.train = self._tokens("train")

    def held_out(self, limit: int | None = None, like: HeldOut | None = None) -> HeldOut:
        """Gather held-out documents in the order of their keys, which are hashes.

        Args:
            limit: take each document that keeps the total at or under this many tokens. If none
                does, take the beginning of the shortest, unless it has a loss mask.
            like: take the same text, tokenized by another tokenizer, instead.
        """
        documents = self._tokens("val")
        parts = self._arrays("val", ".docs.bin", "<u8")
        index = np.concatenate([np.array(part).reshape(-1, 3) for part in parts])
        starts = np.cumsum([0, *index[:, 1].tolist()])
        wanted = np.isin(index[:, 0], index[:, 0] if like is None else like.keys)
        chosen, total = [], 0
        for i in np.argsort(index[:, 0], kind="stable").tolist():
            if wanted[i] and (limit is None or total + int(index[i, 1]) <= limit):
                chosen.append(i)
                total += int(index[i, 1])
        none_fits = not chosen
        chosen = chosen or [int(np.argmin(index[:, 1]))]
        pieces = [documents.read(int(starts[i]), int(starts[i + 1])) for i in chosen]
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
        return HeldOut(tokens, mask, n_bytes, index[chosen, 0])

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
    meta = read_json(path, _FIELDS)
    if meta["format"] != FORMAT:
        raise UserError(
            f"{path} cannot be used: its format is {meta['format']}, and this version reads format "
            f"{FORMAT}"
        )
    if meta.get("checksum", json_checksum(meta)) != json_checksum(meta):
        raise UserError(f"{path} is damaged: its content does not have its checksum")
    tokenizer, files = meta["tokenizer"], list(meta["files"].values())
    numbers = [(tokenizer, "vocab_size"), (tokenizer, "eot_id"), (meta, "shards")]
    numbers += [
        (meta[split], key) for split in _SUFFIXES for key in ("documents", "tokens", "bytes")
    ]
    numbers += [(file if isinstance(file, dict) else {}, "bytes") for file in files]
    wrong = [
        key for values, key in numbers if not isinstance(values.get(key), int) or values[key] < 0
    ]
    if not isinstance(tokenizer.get("fingerprint"), str):
        wrong.append("fingerprint")
    if not wrong and not all(isinstance(file.get("sha256"), str) for file in files):
        wrong.append("sha256")
    if meta["dtype"] not in _DTYPES:  # numpy would map a type of objects, which are pointers
        wrong.append("dtype")
    if wrong:
        raise UserError(f"{path} is damaged: its {wrong[0]!r} cannot be used")
    shards = range(min(meta["shards"], len(files) + 1))
    names = {name for shard in shards for name in _shard_names(shard, meta["masked"])}
    if other := sorted(names ^ meta["files"].keys()):
        raise UserError(
            f"{path} is damaged: {other[0]!r} is no name of a file of {meta['shards']} shards, or "
            "is missing"
        )
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta.json`` atomically, with its checksum."""
    write_json(folder / "meta.json", meta | {"checksum": json_checksum(meta)})


def _verify(folder: Path, files: dict[str, dict[str, Any]], progress: ProgressCallback) -> None:
    """Compare the size and the SHA-256 of each file with those in ``meta.json``.

    The cache folder records which files were hashed, by size, times of change (of content and
    inode) and inode; a file is hashed again when one of these differs. A change that alters none of
    them is not noticed: a fault of the disk, a change of the clock, or a second write within one
    tick of the file system's clock. If the cache folder cannot be written, every call hashes.

    Raises:
        UserError: a file is missing or was altered.
    """
    state, refused = {}, f"data.path={folder} cannot be used"
    for name, file in files.items():
        path = folder / name
        status = path.stat() if path.is_file() else None
        if status is None:
            raise UserError(f"{refused}: {name} is missing")
        size = status.st_size
        if size != file["bytes"]:
            raise UserError(f"{refused}: {name} has {size} bytes in place of {file['bytes']}")
        times = [status.st_mtime_ns, status.st_ctime_ns]
        state[name] = [size, *times, status.st_ino, file["sha256"]]
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
                    raise UserError(
                        f"{refused}: {name} is damaged: its content does not have its SHA-256"
                    )
                done += files[name]["bytes"]
                progress("verifying", done, total)
        if names:
            try:
                write_json(record, state)
            except OSError as error:
                _log.warning(
                    "%s is hashed again at the next start: %s cannot be written: %s",
                    folder,
                    record,
                    error.strerror,
                )


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(
            f"data.path={path.parent} cannot be used: {path.name} cannot be read: {error.strerror}"
        ) from error


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
        meta = self._meta
        split = "val" if document.key <= meta["threshold"] else "train"
        self._append(split, tokens, mask)
        counts = {"documents": 1, "tokens": len(tokens), "bytes": document.n_bytes}
        if split == "val":
            row = [document.key, len(tokens), document.n_bytes]
            self._write("val", ".docs.bin", np.array(row, "<u8"))
        else:
            self._in_shard += len(tokens)
        for key, count in counts.items():
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
    masks = [".mask.bin"] if masked else []
    return [
        _shard_name(split, shard, suffix)
        for split, suffixes in _SUFFIXES.items()
        for suffix in [*suffixes, *masks]
    ]
