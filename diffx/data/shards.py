"""Token shards: the one format on disk, of the cache and of ``diffx data prepare``.

A folder holds ``meta.json``, ``tokenizer/`` and, for shard 0 (1, 2 …):

    train-00000.bin        tokens, little-endian uint16 or uint32: each document behind an end-of-text token
    val-00000.bin          the same for held-out documents
    val-00000.docs.bin     three uint64 a held-out document: its key, tokens (end of text included), bytes that are scored
    *.mask.bin             uint8 a token, 1 where it carries loss; only where there are prompts

``meta.json`` is rewritten, atomically, after each finished shard, and says ``"complete": true`` after the last one.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffx.config import UserError
from diffx.data.sources import Document
from diffx.data.tokenizers import load_tokenizer

FORMAT = 1


def token_dtype(vocab_size: int) -> str:
    """The narrowest type that holds every token."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


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

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            UserError: it holds no shards, unfinished ones, or a damaged file.
        """
        self.folder = folder
        meta = read_meta(folder)
        if meta is None:
            raise UserError(f"data.path={folder} cannot be used: it holds no token shards; `diffx data prepare` writes them")
        if not meta["complete"]:
            raise UserError(f"data.path={folder} cannot be used: it is not finished; run the same `diffx data prepare` again to go on")
        if meta["dtype"] not in ("<u2", "<u4"):  # mapped as a type of numpy: objects would be pointers that the file gives
            raise UserError(f"data.path={folder} cannot be used: its dtype is {meta['dtype']!r}, not <u2 or <u4")
        for name, file in meta["files"].items():
            if Path(name).name != name:
                raise UserError(f"data.path={folder} cannot be used: {name!r} is no name of a file in it")
            path = folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size != file["bytes"]:
                raise UserError(f"data.path={folder} cannot be used: {name} has {size} bytes in place of {file['bytes']}")
        self.meta = meta
        self.tokenizer = load_tokenizer(folder / "tokenizer")
        self.train = self._tokens("train")

    def held_out(self, limit: int | None = None, keys: np.ndarray | None = None) -> HeldOut:
        """Gather held-out documents in the order of their keys, which is as good as random.

        Args:
            limit: take each document that leaves the total at or under this many tokens; at least the shortest.
            keys: take only documents with these keys.
        """
        every = self._tokens("val")
        index = np.concatenate([np.array(part).reshape(-1, 3) for part in self._arrays("val", ".docs.bin", "<u8")])
        starts = np.cumsum([0, *index[:, 1].tolist()])
        wanted = np.isin(index[:, 0], index[:, 0] if keys is None else keys)
        chosen, total = [], 0
        for i in np.argsort(index[:, 0], kind="stable").tolist():
            if wanted[i] and (limit is None or total + int(index[i, 1]) <= limit):
                chosen.append(i)
                total += int(index[i, 1])
        chosen = chosen or [int(np.argmin(index[:, 1]))]
        pieces = [every.read(int(starts[i]), int(starts[i + 1])) for i in chosen]
        tokens = np.concatenate([*(tokens for tokens, _ in pieces), np.array([self.tokenizer.eot_id], pieces[0][0].dtype)])
        masks = [mask for _, mask in pieces if mask is not None]
        mask = np.concatenate([*masks, np.ones(1, np.uint8)]) if masks else None
        return HeldOut(tokens, mask, int(index[chosen, 2].sum()), index[chosen, 0])

    def _tokens(self, split: str) -> TokenArray:
        masks = self._arrays(split, ".mask.bin", "u1") if self.meta["masked"] else None
        return TokenArray(self._arrays(split, ".bin", self.meta["dtype"]), masks)

    def _arrays(self, split: str, suffix: str, dtype: str) -> list[np.ndarray]:
        names = [_shard_name(split, shard, suffix) for shard in range(self.meta["shards"])]
        present = [name for name in names if self.meta["files"][name]["bytes"]]  # an empty file cannot be mapped
        return [np.memmap(self.folder / name, dtype, "r") for name in present] or [np.empty(0, dtype)]


def read_meta(folder: Path) -> dict[str, Any] | None:
    """Read a folder's ``meta.json``; ``None`` if it has none that is ours."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and meta.get("format") == FORMAT else None


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta.json`` atomically."""
    temporary = folder / "meta.json.tmp"
    temporary.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "meta.json")


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
        meta["sha256"] = hashlib.sha256(bytes.fromhex(meta["sha256"]) + document.digest).hexdigest()
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
        suffixes = {"train": [".bin"], "val": [".bin", ".docs.bin"]}
        for split, names in suffixes.items():
            for suffix in [*names, ".mask.bin"] if self._meta["masked"] else names:
                name = _shard_name(split, self._meta["shards"], suffix)
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
