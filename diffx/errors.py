"""The ways in which a command ends early; each becomes one line and an exit code."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten


class UserError(ValueError):
    """Input that cannot be used; the message names value, reason and what is accepted (code 2)."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot go on with good input: a full disk, an infinite loss (code 1)."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped a run, and it saved a checkpoint first (code 0)."""

    exit_code = 0


def reason(error: BaseException) -> str:
    """Describe an exception of another library in one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shorten(text, 200, placeholder=" …").rstrip(".: ")


_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# torch's exceptions are told by name and text, so that this module needs no torch.
_MEMORY = ("can't allocate memory", "calculation overflowed", "multiplication overflow")


def _file_reason(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)


def _storage_failure(error: BaseException) -> str | None:
    """Describe a failure of the file system."""
    if isinstance(error, OSError) and error.errno in _STORAGE:
        line = _file_reason(error)
    elif (line := "No space left on device") not in str(error):  # of safetensors and pyarrow
        return None
    intact = "files that were finished are intact"
    return f"{line}; {intact}, and the same command goes on once this is mended"


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a failure of the file system into a ``RunError`` whose line begins with ``what``."""
    try:
        yield
    except Exception as error:
        failure = _storage_failure(error)
        if failure is None and isinstance(error, OSError) and error.strerror:
            failure = _file_reason(error)  # such as a folder that was deleted meanwhile
        if failure is None:
            raise
        raise RunError(f"{what}: {failure}") from error


def _memory_failure(error: BaseException) -> str | None:
    """Describe a failed allocation."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not named and not any(text in str(error) for text in _MEMORY):
        return None
    line = str(error).strip().partition("\n")[0].partition(". GPU ")[0]
    return f"out of memory{line and f': {line}'}; a smaller model, batch or length takes less"


def _path_failure(error: BaseException) -> str | None:
    """Describe an impossible path: too long a name, or ``~name`` of no user."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename or 'a path'} cannot be used: {error.strerror}"
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):  # pathlib
        return "a path that begins with ~ cannot be used: it names no user of this machine"
    return None


def describe(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line of an exception that is no defect of diffx; else ``None``."""
    if isinstance(error, UserError | RunError | Stopped):
        return error.exit_code, str(error)
    if line := _path_failure(error):
        return UserError.exit_code, line
    line = _storage_failure(error) or _memory_failure(error)
    return (RunError.exit_code, line) if line else None


def describe_any(error: Exception) -> tuple[int, str]:
    """As ``describe``; the traceback of a defect is printed, and its exit code is 1."""
    if described := describe(error):
        return described
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {error}"


def one_line(text: str) -> str:
    """Escape characters that cannot be printed or would break a message into lines."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
