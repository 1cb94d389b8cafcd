"""Small files: written atomically, read with a one-line error that names a damaged file."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from diffx.errors import UserError, reason

_log = logging.getLogger(__name__)
_CHECKSUM = b', "checksum": "'  # cannot occur within a JSON string, where quotes are escaped


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` at the end, or is deleted after an exception.

    ``suffix`` ends its name, for a library that derives the format from it. The name is always the
    same, so that a killed process leaves one file at most, which the next process replaces.
    """
    temporary = path.with_name(f".{path.name}.tmp{suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to ``folder`` at the end, or deleted after an exception.

    ``folder`` must be absent or empty when the block ends.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold a lock file in an existing folder; the system releases it if the process is killed.

    Raises:
        UserError: another process holds the lock.
    """
    from filelock import FileLock, Timeout  # not needed by commands that only read

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        writing = "another process is writing it; wait for it to end, or stop it"
        raise UserError(f"{name} cannot be used: {writing}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file, and the folder may be gone
            os.unlink(path)
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object, in which ``fields`` are required keys with their types.

    Raises:
        UserError: the file cannot be read, or is not such an object.
    """
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    for key, kind in (fields or {}).items():
        if key not in value or not isinstance(value[key], kind):
            raise UserError(f"{path} is damaged: its {key!r} is missing or of the wrong type")
    return value


def read_json_lines(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """Read a file of JSON objects, one a line; a missing file has none.

    A last line without a newline is left out: the process that wrote it was killed. The checksum
    of a line from ``checked_line`` is verified and removed. With ``skip_damaged``, for values that
    can be computed again, damaged lines are left out with a warning.

    Raises:
        UserError: the file cannot be read, or a line is damaged.
    """
    try:
        *lines, cut_off = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    rows = [_parse_line(line) for line in lines]
    if not skip_damaged and None in rows:
        raise UserError(f"{path} is damaged: line {rows.index(None) + 1} is no JSON object")
    if skip_damaged and (damaged := rows.count(None) + bool(cut_off)):
        _log.warning("%s: %d damaged lines are left out", path, damaged)
    return [row for row in rows if row is not None]


def _parse_line(line: bytes) -> dict[str, Any] | None:
    head, mark, checksum = line.rpartition(_CHECKSUM)
    text = head + b"}" if mark else line
    try:
        row = parse_json(text)
    except ValueError:
        return None
    intact = not mark or checksum == f'{sha256(text)[:16]}"}}'.encode()
    return row if intact and isinstance(row, dict) else None


def checked_line(row: Mapping[str, Any]) -> str:
    """Format a JSON object as a line whose last key is the ``checksum`` of the other keys."""
    text = json.dumps(row)
    return f'{text[:-1]}{_CHECKSUM.decode()}{sha256(text)[:16]}"}}\n'


def append_lines(path: Path) -> TextIO:
    """Open a file of lines to append to; a last line that was cut off is ended first."""
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
    return path.open("a", encoding="utf-8")


def open_text(path: Path) -> TextIO:
    """Open UTF-8 text to read it; a ``.gz`` or ``.zst`` file is decompressed."""
    module = {".gz": "gzip", ".zst": "zstandard"}.get(path.suffix, "io")
    return import_module(module).open(path, "rt", encoding="utf-8")


def sha256(*contents: Path | bytes | str) -> str:
    """Return the hexadecimal SHA-256 of files' contents (``Path``), bytes and UTF-8 text."""
    hasher = hashlib.sha256()
    for content in contents:
        if isinstance(content, Path):
            with content.open("rb") as file:
                while block := file.read(1 << 20):
                    hasher.update(block)
        else:
            hasher.update(content.encode() if isinstance(content, str) else content)
    return hasher.hexdigest()


def json_sha256(value: Any, sort_keys: bool = True) -> str:
    """Return the SHA-256 of a value's JSON."""
    return sha256(json.dumps(value, sort_keys=sort_keys))


def json_checksum(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object without its key ``checksum``."""
    return json_sha256({key: item for key, item in value.items() if key != "checksum"})
