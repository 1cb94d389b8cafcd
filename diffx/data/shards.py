"""Token shards: the format on disk of the cache and of ``diffx data prepare``.

A folder holds ``meta.json``, ``tokenizer/`` and, for shard 0 (1, 2 …):

    train-00000.bin     tokens, little-endian uint16 or uint32; end-of-text before each document
    val-00000.bin       the same for held-out documents
    val-00000.docs.bin  three uint64 a held-out document: key, tokens, bytes that are scored
    *.mask.bin          uint8 a token, 1 where it carries loss; only if there are prompts

``meta.json`` is rewritten after each finished shard and says ``"complete": true`` after the last.
It holds the SHA-256 of each file and, but in older folders, a ``checksum`` over its other keys.
"""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.data.sources import Document, file_hashes
from diffx.data.tokenizers import load_tokenizer
from diffx.files import json_checksum, read_json, sha256, write_json

ProgressCallback = Callable[[str, int, int | None], None]
"""Takes a stage such as ``verifying``, bytes done, and bytes in all if known."""

Row = tuple[np.ndarray, np.ndarray | None]
"""Tokens and their loss mask; ``None`` if all carry loss."""

FORMAT = 1
_DTYPES = ("<u2", "<u4")
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
    """Several arrays of tokens as one; their masks have 1 where a token carries loss."""

    def __init__(
        self, parts: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
    ) -> None:
        self._parts, self._masks = parts, masks
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Row:
        """Return tokens ``start`` to ``stop`` and their loss mask."""
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
        n_bytes: their UTF-8 bytes (none for end of text).
        keys: the keys of the documents.
    """

    def __init__(
        self, tokens: np.ndarray, mask: np.ndarray | None, n_bytes: int, keys: np.ndarray
    ) -> None:
        super().__init__([tokens], None if mask is None else [mask])
        self.n_tokens = len(tokens) - 1 if mask is None else int(mask[1:].sum())
        self.n_bytes, self.keys = n_bytes, keys


class Shards:
    """An opened folder of finished shards, verified unless it was before.

    Attributes:
        folder: the folder.
        meta: the content of ``meta.json``.
        tokenizer: made the tokens.
        train: the training tokens.

    Raises:
        UserError: the folder holds no shards, unfinished ones, or a damaged file.
    """

    def __init__(self, folder: Path, progress: ProgressCallback = no_progress) -> None:
        meta, setting = read_meta(folder) or {}, f"data.path={folder}"
        why = "is not finished" if meta else "holds no token shards"
        why = f"it {why}; `diffx data prepare` writes or finishes it"
        refuse(not meta.get("complete"), setting, why)
        _verify(folder, meta["files"], progress)
        self.folder, self.meta = folder, meta
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        other = self.tokenizer.fingerprint != meta["tokenizer"]["fingerprint"]
        refuse(other, setting, "the fingerprint of its tokenizer differs from meta.json's")
        self.train = self._tokens("train")

    def held_out(self, limit: int | None = None, like: HeldOut | None = None) -> HeldOut:
        """Gather held-out documents in the order of their keys, which are hashes.

        Args:
            limit: tokens in all, at most. If no document has as few, the beginning of the shortest
                is taken, unless it has a loss mask.
            like: take the text of these, which another tokenizer made, instead.
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
        present = [self.folder / name for name in names if self.meta["files"][name]["bytes"]]
        maps: list[np.ndarray] = [np.memmap(path, dtype, "r") for path in present]
        return maps or [np.empty(0, dtype)]


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
    damage = ""
    if meta.get("checksum", json_checksum(meta)) != json_checksum(meta):
        damage = "content does not have its checksum"
    elif not (wrong := _wrong_key(meta, _META)):
        files = meta["files"]
        shards = range(min(meta["shards"], len(files) + 1))
        names = {name for n in shards for name in _shard_names(n, meta["masked"])}
        if other := sorted(names ^ files.keys()):
            damage = f"{other[0]!r} is missing, or is no name of a file of {meta['shards']} shards"
        wrong = _wrong_key(files, {name: {"bytes": int, "sha256": str} for name in files})
    if damage or wrong:
        damage = damage or f"{wrong!r} is missing or cannot be used"
        raise UserError(f"{path} is damaged: its {damage}")
    return meta


def _wrong_key(value: Any, schema: dict[str, Any]) -> str | None:
    """Return a key that is missing, of another type than in ``schema``, or a negative number."""

    def good(item: Any, kind: Any) -> bool:
        if isinstance(kind, tuple):
            return item in kind
        if isinstance(kind, dict):
            return isinstance(item, dict) and _wrong_key(item, kind) is None
        return isinstance(item, kind) and (kind is not int or item >= 0)

    return next((key for key, kind in schema.items() if not good(value.get(key), kind)), None)


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta.json`` atomically, with its checksum."""
    write_json(folder / "meta.json", meta | {"checksum": json_checksum(meta)})


def _verify(folder: Path, files: dict[str, dict[str, Any]], progress: ProgressCallback) -> None:
    """Refuse files that are missing or altered.

    The cache folder records size, times and inode of the files that were hashed, and only a file in
    which one of these differs is hashed again. If the cache cannot be written, every call hashes.
    """
    state, setting = {}, f"data.path={folder}"
    for name, file in files.items():
        refuse(not (folder / name).is_file(), setting, f"{name} is missing")
        status, size = (folder / name).stat(), file["bytes"]
        refuse(status.st_size != size, setting, f"{name} has {status.st_size} bytes, not {size}")
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
        paths = {name: folder / name for name in files if verified.get(name) != state[name]}
        done, total = 0, sum(files[name]["bytes"] for name in paths)
        for name, digest in file_hashes(paths):
            altered = digest != files[name]["sha256"]
            refuse(altered, setting, f"{name} is damaged: its SHA-256 differs")
            done += files[name]["bytes"]
            progress("verifying", done, total)
        try:
            if paths:
                write_json(record, state)
        except OSError as error:
            again = f"{folder} is hashed again at the next start"
            _log.warning("%s: %s cannot be written: %s", again, record, error.strerror)


def write_shards(
    folder: Path,
    meta: dict[str, Any],
    rows: Iterable[tuple[Document, Row]],
    shard_tokens: int,
) -> None:
    """Write documents after the last finished shard of a folder, and mark it as complete.

    ``meta`` is the content of ``meta.json``, updated in place. ``rows`` begin with end of text. A
    shard is finished after the document in which it reaches ``shard_tokens`` training tokens.
    """
    for path in folder.glob("*.bin"):
        if path.name not in meta["files"]:
            path.unlink()  # of an unfinished shard
    files: dict[str, BinaryIO] = {}

    def write(split: str, suffix: str, array: np.ndarray) -> None:
        files[_shard_name(split, meta["shards"], suffix)].write(array.tobytes())

    rows = iter(rows)
    while not meta["complete"]:
        start, names = meta["train"]["tokens"], _shard_names(meta["shards"], meta["masked"])
        with ExitStack() as stack:
            for name in names:
                files[name] = stack.enter_context((folder / name).open("wb"))
            for document, (tokens, mask) in rows:
                split = "val" if document.key <= meta["threshold"] else "train"
                counts = [1, len(tokens), document.n_bytes]
                for key, count in zip(_COUNTS, counts, strict=True):
                    meta[split][key] += count
                meta["sha256"] = sha256(bytes.fromhex(meta["sha256"]), document.digest)
                write(split, ".bin", tokens)
                if mask is not None:
                    write(split, ".mask.bin", mask)
                if split == "val":
                    write("val", ".docs.bin", np.array([document.key, *counts[1:]], "<u8"))
                if meta["train"]["tokens"] - start >= shard_tokens:
                    break
            else:  # end of text after the last training document
                write("train", ".bin", np.array([meta["tokenizer"]["eot_id"]], meta["dtype"]))
                if meta["masked"]:
                    write("train", ".mask.bin", np.ones(1, np.uint8))
                meta["train"]["tokens"] += 1
                meta["complete"] = True
            for name in names:
                files[name].flush()
                os.fsync(files[name].fileno())
                digest = sha256(folder / name)
                meta["files"][name] = {"bytes": files[name].tell(), "sha256": digest}
        meta["shards"] += 1
        write_meta(folder, meta)


def _shard_name(split: str, shard: int, suffix: str) -> str:
    return f"{split}-{shard:05d}{suffix}"


def _shard_names(shard: int, masked: bool) -> list[str]:
    kinds = [("train", ".bin"), ("val", ".bin"), ("val", ".docs.bin")]
    kinds += [("train", ".mask.bin"), ("val", ".mask.bin")] * masked
    return [_shard_name(split, shard, suffix) for split, suffix in kinds]
