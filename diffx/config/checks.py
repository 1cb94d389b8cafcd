"""Checks that the config dataclasses share; each raises one line that names the key, the value and what is accepted."""

import re
from typing import Any

from diffx.errors import UserError

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def require(condition: bool, key: str, value: Any, accepted: str) -> None:
    """Raise ``UserError`` unless ``condition`` holds.

    Args:
        condition: what must be true.
        key: the config key, as a user would type it (``model.num_heads``).
        value: the value it has.
        accepted: what would be accepted instead.
    """
    if not condition:
        raise UserError(f"{key}={value} cannot be used: it must be {accepted}")


def path_name(key: str, value: str) -> None:
    """Raise ``UserError`` unless a value can name a file or folder: no separator, no ``..``, nothing hidden."""
    accepted = "a name of 1 to 100 letters, digits, '-', '_' and '.' that does not start with '.'"
    require(re.fullmatch(r"[\w-][\w.-]{0,99}", value) is not None, key, value, accepted)


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
    require(number >= 1 and number == int(number), key, value, "a positive whole number such as 4096, 100M or 1.5B")
    return int(number)
