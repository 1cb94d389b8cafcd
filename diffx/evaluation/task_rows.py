"""Rows of the tasks of a suite, and one line for what cannot be used."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.errors import reason
from diffx.files import open_text, parse_json


def read_rows(path: Path, key: str = "suite.tasks") -> list[tuple[int, Any]]:
    """Number and value of each line of JSON in a file that ``key`` names, compressed or not.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open_text(path) as file:
            return [(n, parse_json(line)) for n, line in enumerate(file, 1) if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        accepted = "it must be UTF-8 JSON lines, or those in .gz"
        raise UserError(f"{key}={path} cannot be used: {reason(error)}; {accepted}") from error


@contextmanager
def refusing(setting: str, problem: str, advice: str = "") -> Iterator[None]:
    """Turn any exception, of libraries or code of the user, into ``UserError`` with its reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = f"{problem}: {reason(error)}{advice and f'; {advice}'}"
        raise UserError(f"{setting} cannot be used: {text}") from error


def short_name(path: Path) -> str:
    """The name of a task whose rows are in a file."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def check_names(tasks: list[str], names: list[str]) -> None:
    """Raise ``UserError`` if two tasks have one name."""
    for name in names:
        reason = f"two tasks would be called {name}; rename a file"
        refuse(names.count(name) > 1, f"suite.tasks={','.join(tasks)}", reason)
