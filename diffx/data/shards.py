"""Token shards: the one format on disk, of the cache and of ``diffx data prepare``.

A folder holds ``meta.json``, ``tokenizer/`` and, for shard 0 (1, 2 …):

    train-00000.bin        tokens, little-endian uint16 or uint32: each document behind an end-of-text token
    val-00000.bin          the same for held-out documents
    val-00000.docs.bin     three uint64 a held-out document: its key, tokens (end of text included), bytes that are scored
    *.mask.bin             uint8 a token, 1 where it carries loss; only where there are prompts

``meta.json`` is rewritten, atomically, after each finished shard, and says ``"complete": true`` after the last one. It holds the
SHA-256 of each of these files, the tokenizer's fingerprint, and as ``checksum`` the SHA-256 of all of its other keys. Folders that were
written before there was a checksum lack it, and are read without.
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

Progress = Callable[[str, int, int | None], None]
"""Called with a stage (``verifying``, ``training the tokenizer``, ``tokenizing``), bytes done, and bytes in all (``None``: unknown)."""

FORMAT = 1
_DTYPES = ("<u2", "<u4")
_SUFFIXES = {"train": [".bin"], "val": [".bin", ".docs.bin"]}
_FIELDS = {"format": int, "complete": bool, "settings": dict, "threshold": int, "tokenizer": dict, "dtype": str, "masked": bool}
_FIELDS |= {"sha256": str, "shards": int, "files": dict, "train": dict, "val": dict}
_log = logging.getLogger(__name__)


def no_progress(stage: str, done: int, total: int | None) -> None:
    """Report nothing."""


def cache_folder() -> Path:
    """``$DIFFX_CACHE``, or ``~/.cache/diffx``."""
    return Path(os.environ.get("DIFFX_CACHE") or "~/.cache/diffx").expanduser()


def token_dtype(vocab_size: int) -> str:
    """The narrowest type that holds every token."""
    return _DTYPES[vocab_size > 1 << 16]


class TokenArray:
    """A long row of tokens that lies in several arrays, mapped from files or in memory.

    Args:
        parts: the tokens.
        masks: for each part, 1 where a token carries loss; left out, all of them do.
    """

    def __init__(self, parts: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None) -> None:
        self._parts, self._masks = parts, masks
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens ``start`` to ``stop`` and their loss mask (``None`` if all carry loss)."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = min(int(np.searchsorted(self._starts, stop, side="left")), len(self._parts))
        spans = [(part, slice(max(start - self._starts[part], 0), stop - self._starts[part])) for part in range(first, last)]
        return _gather(self._parts, spans), None if self._masks is None else _gather(self._masks, spans)


def _gather(parts: Sequence[np.ndarray], spans: list[tuple[int, slice]]) -> np.ndarray:
    pieces = [parts[part][span] for part, span in spans]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.uint16)])


class HeldOut(TokenArray):
    """The held-out documents that are measured, in memory, with an end-of-text token at the end.

    Attributes:
        n_tokens: targets that are scored.
        n_bytes: UTF-8 bytes that they spell (end of text counts as none), so that bits per byte are nats / n_bytes / ln 2.
        keys: the documents' keys.
    """

    def __init__(self, tokens: np.ndarray, mask: np.ndarray | None, n_bytes: int, keys: np.ndarray) -> None:
        super().__init__([tokens], None if mask is None else [mask])
        self.n_tokens = len(tokens) - 1 if mask is None else int(mask[1:].sum())
        self.n_bytes, self.keys = n_bytes, keys


class Shards:
    """An opened folder of finished shards.

    Attributes:
        folder: where it lies.
        meta: its ``meta.json``.
        tokenizer: what made them.
        train: the training tokens.
    """

    def __init__(self, folder: Path, progress: Progress = no_progress) -> None:
        """Open a folder, and verify each file that was not verified before.

        Args:
            folder: holds ``meta.json``.
            progress: called as files are hashed.

        Raises:
            UserError: it holds no shards, unfinished ones, or a damaged file.
        """
        self.folder = folder
        meta = read_meta(folder)
        if meta is None:
            raise UserError(f"data.path={folder} cannot be used: it holds no token shards; `diffx data prepare` writes them")
        if not meta["complete"]:
            raise UserError(f"data.path={folder} cannot be used: it is not finished; run the same `diffx data prepare` again to go on")
        _verify(folder, meta["files"], progress)
        self.meta = meta
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        if self.tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]:
            raise UserError(f"data.path={folder} cannot be used: its tokenizer is not the one that made its tokens (fingerprint differs)")
        self.train = self._tokens("train")

    def held_out(self, limit: int | None = None, like: HeldOut | None = None) -> HeldOut:
        """Gather held-out documents in the order of their keys, which is as good as random.

        Args:
            limit: take each document that leaves the total at or under this many tokens; if none does, the beginning of the shortest.
                One with a loss mask is not cut.
            like: take the text of these instead, which another tokenizer made.
        """
        every = self._tokens("val")
        index = np.concatenate([np.array(part).reshape(-1, 3) for part in self._arrays("val", ".docs.bin", "<u8")])
        starts = np.cumsum([0, *index[:, 1].tolist()])
        wanted = np.isin(index[:, 0], index[:, 0] if like is None else like.keys)
        chosen, total = [], 0
        for i in np.argsort(index[:, 0], kind="stable").tolist():
            if wanted[i] and (limit is None or total + int(index[i, 1]) <= limit):
                chosen.append(i)
                total += int(index[i, 1])
        none_fits = not chosen
        chosen = chosen or [int(np.argmin(index[:, 1]))]
        pieces = [every.read(int(starts[i]), int(starts[i + 1])) for i in chosen]
        tokens, n_bytes = np.concatenate([tokens for tokens, _ in pieces]), int(index[chosen, 2].sum())
        masks = [mask for _, mask in pieces if mask is not None]
        if not masks and (none_fits or (like is not None and like.n_bytes < n_bytes)):
            text = self.tokenizer.decode(tokens[1 : max(2, limit) if limit else None].tolist())
            text = text.encode()[: like.n_bytes if like else None].decode(errors="ignore")
            while len(text) > 1 and text.endswith("\N{REPLACEMENT CHARACTER}"):  # the cut went through a character
                text = text[:-1]
            encoded = self.tokenizer.encode(text)
            tokens, n_bytes = np.array([self.tokenizer.eot_id, *encoded], tokens.dtype), len(text.encode())
        tokens = np.append(tokens, np.array(self.tokenizer.eot_id, tokens.dtype))
        mask = np.append(np.concatenate(masks), np.uint8(1)) if masks else None
        return HeldOut(tokens, mask, n_bytes, index[chosen, 0])

    def _tokens(self, split: str) -> TokenArray:
        masks = self._arrays(split, ".mask.bin", "u1") if self.meta["masked"] else None
        return TokenArray(self._arrays(split, ".bin", self.meta["dtype"]), masks)

    def _arrays(self, split: str, suffix: str, dtype: str) -> list[np.ndarray]:
        names = [_shard_name(split, shard, suffix) for shard in range(self.meta["shards"])]
        present = [name for name in names if self.meta["files"][name]["bytes"]]  # an empty file cannot be mapped
        return [np.memmap(self.folder / name, dtype, "r") for name in present] or [np.empty(0, dtype)]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Read a folder's ``meta.json``; ``None`` if it has none.

    Raises:
        UserError: it is damaged, or of another format.
    """
    path = folder / "meta.json"
    if not path.is_file():
        return None
    meta = read_json(path, _FIELDS)
    if meta["format"] != FORMAT:
        raise UserError(f"{path} cannot be used: its format is {meta['format']}, and this version reads format {FORMAT}")
    if meta.get("checksum", json_checksum(meta)) != json_checksum(meta):
        raise UserError(f"{path} is damaged: its content does not have its checksum")
    numbers = [(meta["tokenizer"], "vocab_size"), (meta["tokenizer"], "eot_id"), (meta, "shards")]
    numbers += [(meta[split], key) for split in _SUFFIXES for key in ("documents", "tokens", "bytes")]
    numbers += [(file if isinstance(file, dict) else {}, "bytes") for file in meta["files"].values()]
    wrong = [key for values, key in numbers if not isinstance(values.get(key), int) or values[key] < 0]
    wrong += ["fingerprint"] if not isinstance(meta["tokenizer"].get("fingerprint"), str) else []
    wrong += ["sha256" for file in meta["files"].values() if not isinstance(file.get("sha256"), str)] if not wrong else []
    if meta["dtype"] not in _DTYPES:  # numpy maps other types too: of objects, the file would give the pointers
        wrong.append("dtype")
    if wrong:
        raise UserError(f"{path} is damaged: its {wrong[0]!r} cannot be used")
    shards = range(min(meta["shards"], len(meta["files"]) + 1))
    names = {name for shard in shards for name in _shard_names(shard, meta["masked"])}
    if other := sorted(names ^ meta["files"].keys()):
        raise UserError(f"{path} is damaged: {other[0]!r} is no name of a file of {meta['shards']} shards, or is missing")
    return meta


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta.json`` atomically, with its checksum."""
    write_json(folder / "meta.json", meta | {"checksum": json_checksum(meta)})


def _verify(folder: Path, files: dict[str, dict[str, Any]], progress: Progress) -> None:
    """Compare the size and the SHA-256 of each file with those of ``meta.json``.

    A file is hashed once: what was hashed is remembered in the cache folder, by its size, its times of change (of content and of the
    inode) and its inode, and is not read again while these stay as they are. What changes a file without changing them is not noticed: a
    disk that loses bits, a change of the clock, a write to the disk below the file system, or a second write within the same tick of the
    file system's clock. Where the cache folder cannot be written, everything is hashed each time.

    Raises:
        UserError: a file is missing, or is not the one that was written.
    """
    state = {}
    for name, file in files.items():
        path = folder / name
        status = path.stat() if path.is_file() else None
        if status is None:
            raise UserError(f"data.path={folder} cannot be used: {name} is missing")
        if status.st_size != file["bytes"]:
            raise UserError(f"data.path={folder} cannot be used: {name} has {status.st_size} bytes in place of {file['bytes']}")
        state[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, file["sha256"]]
    stamp = cache_folder() / "verified" / f"{sha256(str(folder.resolve()))[:32]}.json"
    with ExitStack() as stack:
        try:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{stamp}.lock"))  # of several processes that start together, one hashes
            known = read_json(stamp)
        except (OSError, UserError):  # a cache that cannot be written; no stamp yet, or a damaged one
            known = {}
        names = [name for name in files if known.get(name) != state[name]]
        done, total = 0, sum(files[name]["bytes"] for name in names)
        with ThreadPoolExecutor() as pool:
            for name, digest in zip(names, pool.map(_hash, [folder / name for name in names]), strict=True):
                if digest != files[name]["sha256"]:
                    raise UserError(f"data.path={folder} cannot be used: {name} is damaged: its content does not have its SHA-256")
                done += files[name]["bytes"]
                progress("verifying", done, total)
        if names:
            try:
                write_json(stamp, state)
            except OSError as error:
                _log.warning("%s is hashed again at the next start: %s cannot be written: %s", folder, stamp, error.strerror)


def _hash(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"data.path={path.parent} cannot be used: {path.name} cannot be read: {error.strerror}") from error


class ShardWriter:
    """Appends documents to a folder's shards, behind its last finished one.

    Args:
        folder: where to write.
        meta: the folder's ``meta.json``; kept up to date.
        shard_tokens: a shard is finished by the document that brings it to this many training tokens.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], shard_tokens: int) -> None:
        self._folder, self._meta, self._shard_tokens = folder, meta, shard_tokens
        self._open: dict[str, tuple[BinaryIO, Any]] = {}
        for path in folder.glob("*.bin"):
            if path.name not in meta["files"]:
                path.unlink()  # of a shard that was not finished
        self._start_shard()

    def add(self, document: Document, tokens: np.ndarray, mask: np.ndarray | None) -> None:
        """Append a document's tokens, end of text in front, and their loss mask if the folder has one."""
        meta = self._meta
        split = "val" if document.key <= meta["threshold"] else "train"
        self._append(split, tokens, mask)
        if split == "val":
            self._write("val", ".docs.bin", np.array([document.key, len(tokens), document.n_bytes], "<u8"))
        else:
            self._in_shard += len(tokens)
        for key, more in (("documents", 1), ("tokens", len(tokens)), ("bytes", document.n_bytes)):
            meta[split][key] += more
        meta["sha256"] = sha256(bytes.fromhex(meta["sha256"]), document.digest)
        if self._in_shard >= self._shard_tokens:
            self._finish_shard()
            self._start_shard()

    def finish(self) -> None:
        """Write the last shard, with an end-of-text token behind the last training document."""
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
        file, digest = self._open[_shard_name(split, self._meta["shards"], suffix)]
        content = array.tobytes()
        file.write(content)
        digest.update(content)

    def _start_shard(self) -> None:
        self._in_shard = 0
        for name in _shard_names(self._meta["shards"], self._meta["masked"]):
            self._open[name] = ((self._folder / name).open("wb"), hashlib.sha256())

    def _finish_shard(self) -> None:
        for name, (file, digest) in self._open.items():
            file.flush()
            os.fsync(file.fileno())
            self._meta["files"][name] = {"bytes": file.tell(), "sha256": digest.hexdigest()}
        self.close()
        self._meta["shards"] += 1
        write_meta(self._folder, self._meta)


def _shard_name(split: str, shard: int, suffix: str) -> str:
    return f"{split}-{shard:05d}{suffix}"


def _shard_names(shard: int, masked: bool) -> list[str]:
    masks = [".mask.bin"] if masked else []
    return [_shard_name(split, shard, suffix) for split, suffixes in _SUFFIXES.items() for suffix in [*suffixes, *masks]]
