"""Small files, written whole or not at all; a damaged one is named in one line."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from diffx.errors import UserError

_log = logging.getLogger(__name__)
_CHECKSUM = b', "checksum": "'  # in a line of JSON; within a text its quotes would be escaped


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes the place of ``path`` at the end, and is deleted after an exception.

    The temporary file is named after ``path`` alone, so that a killed writer leaves at most one and the next writer replaces it.

    Args:
        path: the file to write.
        suffix: ends the temporary name, for a library that takes the format from it.
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
    """Give a new folder beside ``folder``; it is renamed to ``folder`` at the end, and deleted after an exception.

    Its name depends on ``folder`` alone, as that of ``replacing`` does. ``folder`` must be absent or empty by then.
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
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs; a killed process gives it up too.

    Args:
        path: the lock file, in a folder that exists.
        what: names what the lock protects, in the message.

    Raises:
        UserError: another process holds it.
    """
    from filelock import FileLock, Timeout  # not needed by commands that only read

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{what} cannot be used: another process is writing it; wait for it to end, or stop it") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file, and the folder may be gone
            os.unlink(path)
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is no JSON, no UTF-8, or nested too deeply to read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        fields: keys that it must have, each with the type of its value (as ``isinstance`` takes it).

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it must hold a JSON object")
    for key, kind in (fields or {}).items():
        if key not in value or not isinstance(value[key], kind):
            raise UserError(f"{path} is damaged: its {key!r} is missing or of the wrong type")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file, one a line; a missing file has none.

    A last line without its newline was torn by a kill and is left out.

    Raises:
        UserError: the file cannot be read, or another line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path} is damaged: line {number} is no JSON object")
        rows.append(row)
    return rows


def json_checksum(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object without its key ``checksum``."""
    rest = {key: item for key, item in value.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def append_lines(path: Path) -> TextIO:
    """Open a file of lines to append to; a last line that was torn by a kill or a full disk is ended first."""
    torn = path.exists() and path.stat().st_size > 0 and not _ends_with_newline(path)
    file = path.open("a", encoding="utf-8")
    file.write("\n" if torn else "")
    return file


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def checked_line(row: Mapping[str, Any]) -> str:
    """Write a JSON object as a line whose last key is the ``checksum`` of the rest, for ``read_checked_lines``."""
    text = json.dumps(row)
    return f'{text[:-1]}{_CHECKSUM.decode()}{_line_checksum(text.encode())}"}}\n'


def read_checked_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects that ``checked_line`` wrote; a missing file has none.

    A damaged line is left out with a warning: what it held is computed again. A line without a checksum is taken as it is.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error
    rows, damaged = [], 0
    for line in filter(None, lines):
        head, mark, checksum = line.rpartition(_CHECKSUM)
        text = head + b"}" if mark else line
        try:
            row = parse_json(text)
        except ValueError:
            row = None
        if isinstance(row, dict) and (not mark or checksum == f'{_line_checksum(text)}"}}'.encode()):
            rows.append(row)
        else:
            damaged += 1
    if damaged:
        _log.warning("%s: %d damaged lines are left out", path, damaged)
    return rows


def _line_checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Hash a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split()) or type(error).__name__
