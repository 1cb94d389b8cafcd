"""Checks that the config dataclasses share; each raises one line that names the key, the value and what is accepted."""

import math
import re
from pathlib import Path
from typing import Any

from diffx.errors import UserError

MOST = 2**63  # whole numbers stay below it, so that every library can hold them
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def require(condition: bool, key: str, value: Any, accepted: str) -> None:
    """Raise ``UserError`` unless ``condition`` holds.

    Args:
        condition: must be true.
        key: the config key, as a user would type it (``model.num_heads``).
        value: the value it has.
        accepted: the values that would be accepted.
    """
    if not condition:
        raise UserError(f"{key}={value} cannot be used: it must be {accepted}")


def path_name(key: str, value: str) -> None:
    """Raise ``UserError`` unless a value can name a file or folder: no separator, no ``..``, nothing hidden."""
    accepted = "a name of 1 to 100 characters that does not start with '.' and has no '/', '\\', '=', ',' or control character"
    require(
        re.fullmatch(r"(?!\.)[^/\\=,\x00-\x1f\x7f]{1,100}", value) is not None, key, value, accepted
    )


def count(key: str, value: int | str) -> int:
    """Read a count such as ``4096``, ``100M`` or ``1.5B`` (decimal suffixes K, M, B, T).

    Raises:
        UserError: the text is not a count, or the count is not a positive whole number.
    """
    text = str(value).strip().replace("_", "")
    scale = _SUFFIXES.get(text[-1:].upper(), 1)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = 0.0
    whole = 1 <= number < MOST and number == int(number)
    require(whole, key, value, "a positive whole number such as 4096, 100M or 1.5B, below 2^63")
    return int(number)


def check_seed(key: str, value: int) -> None:
    """Refuse a seed that not every random generator takes: NumPy's global one, which lm-eval seeds, holds 32 bits.

    Raises:
        UserError: the seed is negative, or 2^32 or more.
    """
    require(0 <= value < 2**32, key, value, "a whole number from 0 to 4294967295")


def new_path(key: str, value: str | Path) -> Path:
    """Expand a path to write to, and refuse one below a file.

    Raises:
        UserError: a parent of the path exists and is no folder, a name in it is too long, or ``~name`` is no user.
    """
    try:
        path = Path(value).expanduser()
        parent = next(
            (place for place in (path, *path.parents) if place.exists() and place != path), None
        )
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key}={value} cannot be used: {reason}") from error
    if parent is not None and not parent.is_dir():
        raise UserError(
            f"{key}={value} cannot be used: {parent} is no folder; choose another place"
        )
    return path


def plain(key: str, value: Any) -> None:
    """Refuse values that no option can take: numbers beyond all ranges and text that is not UTF-8.

    Args:
        key: the config key.
        value: a value of a config, lists and mappings included.

    Raises:
        UserError: it holds a number that is not finite, a whole number of more than 64 bits, a null character or half of a
            surrogate pair.
    """
    if isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            plain(key, part)
    elif isinstance(value, float):
        require(math.isfinite(value), key, value, "a finite number")
    elif isinstance(value, int):
        require(
            -MOST < value < MOST,
            key,
            value if abs(value) < 10**30 else "(a long number)",
            "below 2^63",
        )
    elif isinstance(value, str):
        shown = ascii(value if len(value) <= 80 else value[:80] + "…")
        require(_is_text(value), key, shown, "UTF-8 text without null characters")


def _is_text(value: str) -> bool:
    try:
        return b"\0" not in value.encode()
    except UnicodeEncodeError:
        return False
