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


def storage_failure(error: BaseException) -> str | None:
    """Describe a failure of the file system in one line; ``None`` for another exception."""
    if isinstance(error, OSError) and error.errno in _STORAGE:
        reason = _reason(error)
    elif (full := "No space left on device") in str(error):  # of safetensors and pyarrow
        reason = full
    else:
        return None
    intact = "files that were finished are intact"
    return f"{reason}; {intact}, and the same command goes on once this is mended"


def _reason(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a failure of the file system into a ``RunError`` whose line begins with ``what``."""
    try:
        yield
    except Exception as error:
        failure = storage_failure(error)
        if failure is None and isinstance(error, OSError) and error.strerror:
            failure = _reason(error)  # such as a folder that was deleted meanwhile
        if failure is None:
            raise
        raise RunError(f"{what}: {failure}") from error


def memory_failure(error: BaseException) -> str | None:
    """Describe a failed allocation in one line; ``None`` if the exception is something else."""
    # torch's exceptions are told by name and text, so that this module needs no torch.
    told = any(
        text in str(error)
        for text in ("can't allocate memory", "calculation overflowed", "multiplication overflow")
    )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or told:
        reason = str(error).strip().partition("\n")[0].partition(". GPU ")[0]
        reason = f": {reason}" if reason else ""
        return f"out of memory{reason}; a smaller model, batch or length takes less"
    return None


def path_failure(error: BaseException) -> str | None:
    """Describe an impossible path: too long a name, or ``~name`` of no user; else ``None``."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename or 'a path'} cannot be used: {error.strerror}"
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):  # pathlib
        return "a path that begins with ~ cannot be used: it names no user of this machine"
    return None


def describe(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the line of an exception that is no defect of diffx; else ``None``."""
    if isinstance(error, UserError | RunError | Stopped):
        return error.exit_code, str(error)
    if (line := path_failure(error)) is not None:
        return UserError.exit_code, line
    line = storage_failure(error) or memory_failure(error)
    return None if line is None else (RunError.exit_code, line)


def describe_any(error: Exception) -> tuple[int, str]:
    """As ``describe``; the traceback of a defect is printed, and its exit code is 1."""
    described = describe(error)
    if described is None:
        traceback.print_exception(error)
        described = 1, f"{type(error).__name__}: {error}"
    return described


def one_line(text: str) -> str:
    """Escape characters that cannot be printed or would break a message into lines."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
