"""Small files, written whole or not at all; a damaged one is named in one line."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffx.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes the place of ``path`` at the end, and is deleted after an exception.

    The temporary file is named after ``path`` alone, so that a killed writer leaves at most one and the next writer replaces it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
        if not isinstance(value.get(key), kind):
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


def sha256(path: Path) -> str:
    """Hash a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split()) or type(error).__name__
