"""Checks of the config dataclasses; each raises one line with the key, the value and the reason."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffx.errors import UserError, reason

MOST = 2**63  # whole numbers stay below it, so that every library can hold them
POSITIVE = "a positive whole number"
_RULES: dict[str, Callable[[Any], bool]] = {
    POSITIVE: lambda value: value >= 1,
    "positive": lambda value: value > 0,
    "zero or more": lambda value: value >= 0,
    "2 or more": lambda value: value >= 2,
    "5 or more": lambda value: value >= 5,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "between 0 and 1": lambda value: 0 < value < 1,
    "from 1 to 18": lambda value: 1 <= value <= 18,
    "from 2 to 100": lambda value: 2 <= value <= 100,
    "a whole number from 1 to 1,000,000": lambda value: 1 <= value <= 10**6,
}
_SCALES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def require(condition: bool, key: str, value: Any, accepted: str) -> None:
    """Raise ``UserError`` unless ``condition`` holds; ``accepted`` follows "it must be"."""
    refuse(not condition, f"{key}={value}", f"it must be {accepted}")


def refuse(condition: bool, setting: str, reason: str, other: str = "") -> None:
    """Raise ``UserError`` if ``condition`` holds.

    Args:
        condition: must be false.
        setting: the key and its value (``suite=speed``).
        reason: why it cannot be used, and what is accepted.
        other: another setting that excludes it.
    """
    if condition:
        raise UserError(f"{setting} cannot be used{other and f' with {other}'}: {reason}")


@contextmanager
def refusing(
    setting: str,
    errors: type[Exception] | tuple[type[Exception], ...],
    before: str = "",
    accepted: str = "",
) -> Iterator[None]:
    """Turn exceptions of a library into a ``UserError``: ``before``, the reason, ``accepted``."""
    try:
        yield
    except errors as error:
        why = f"{before}{reason(error)}{accepted and f'; {accepted}'}"
        raise UserError(f"{setting} cannot be used: {why}") from error


def check_fields(
    config: Any, group: str, names: str, accepted: str, good: Callable[[Any], bool] | None = None
) -> None:
    """Raise ``UserError`` for a field of a dataclass that is neither ``None`` nor accepted.

    ``group`` is the config group (``train``), empty for a job; ``names`` are the fields, with
    spaces between them; ``accepted`` is a key of ``_RULES``, or a text for the function ``good``.
    """
    good = good or _RULES[accepted]
    for name in names.split():
        value = getattr(config, name)
        require(value is None or good(value), f"{group}.{name}".lstrip("."), value, accepted)


def path_name(key: str, value: str) -> None:
    """Raise ``UserError`` unless a value can name a file or folder that is not hidden."""
    accepted = "a name of 1 to 100 characters that does not start with '.' and has no '/', '\\', "
    good = re.fullmatch(r"(?!\.)[^/\\=,\x00-\x1f\x7f]{1,100}", value) is not None
    require(good, key, value, accepted + "'=', ',' or control character")


def count(key: str, value: int | str) -> int:
    """Read a count such as ``4096``, ``100M`` or ``1.5B`` (decimal suffixes K, M, B, T).

    Raises:
        UserError: the text is not a positive whole number.
    """
    text = str(value).strip().replace("_", "")
    scale = _SCALES.get(text[-1:].upper(), 1)
    try:
        number = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        number = 0.0
    whole = 1 <= number < MOST and number == int(number)
    require(whole, key, value, f"{POSITIVE} such as 4096, 100M or 1.5B, below 2^63")
    return int(number)


def count_fields(config: Any, group: str, names: str) -> None:
    """Read the named fields of a dataclass with ``count``, except those that are ``None``."""
    for name in names.split():
        if (value := getattr(config, name)) is not None:
            setattr(config, name, count(f"{group}.{name}".lstrip("."), value))


def listed(key: str, value: Any) -> list[Any]:
    """Return a list as it is and another value as a list; raise ``UserError`` for an empty one."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    refuse(not items, f"{key}={value}", "it must have one entry at least")
    return items


def shares(key: str, value: Any) -> list[float]:
    """Read one or more different numbers from 0 to 1; raise ``UserError`` for others."""
    items = listed(key, value)
    good = all(isinstance(item, int | float) and 0 <= item <= 1 for item in items)
    good = good and len(set(items)) == len(items)
    require(good, key, value, "different numbers from 0 to 1")
    return [float(item) for item in items]


def texts(key: str, value: Any) -> list[str]:
    """Read one or more texts that are not empty; raise ``UserError`` for others."""
    items = listed(key, value)
    good = all(isinstance(item, str) and item for item in items)
    require(good, key, value, "a name or a list of names")
    return items


def check_seed(key: str, value: int) -> None:
    """Raise ``UserError`` unless a seed has 32 bits, as NumPy's global generator requires."""
    require(0 <= value < 2**32, key, value, "a whole number from 0 to 4294967295")


def new_path(key: str, value: str | Path) -> Path:
    """Expand a path to write to.

    Raises:
        UserError: a parent of the path is a file, a name is too long, or ``~name`` is no user.
    """
    try:
        path = Path(value).expanduser()
        path.exists()  # raises for a name that is too long
        parent = next(filter(Path.exists, path.parents), Path())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{key}={value} cannot be used: {reason(error)}") from error
    refuse(not parent.is_dir(), f"{key}={value}", f"{parent} is no folder; choose another place")
    return path


def plain(key: str, value: Any) -> None:
    """Raise ``UserError`` if a value, or a part of a list or mapping, cannot be saved.

    Such are numbers that are not finite or have more than 64 bits, and text that is not UTF-8 or
    has a null character.
    """
    if isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            plain(key, part)
    elif isinstance(value, float):
        require(math.isfinite(value), key, value, "a finite number")
    elif isinstance(value, int):
        shown = value if abs(value) < 10**30 else "(a long number)"
        require(abs(value) < MOST, key, shown, "below 2^63")
    elif isinstance(value, str):
        good = "\0" not in value and value.encode(errors="ignore").decode() == value
        shown = ascii(value if len(value) <= 80 else value[:80] + "…")
        require(good, key, shown, "UTF-8 text without null characters")
