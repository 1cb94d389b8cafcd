"""The ways in which a command ends early. The command line turns each into one line and an exit code."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten


class UserError(ValueError):
    """Input that cannot be used: the message names the value, the reason and what would be accepted (exit code 2)."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot go on though its input was good: a full disk, a loss that is not finite (exit code 1)."""

    exit_code = 1


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM asked a run to stop, and it saved a checkpoint first: a clean end (exit code 0)."""

    exit_code = 0


def reason(error: BaseException) -> str:
    """Describe an exception of another library in one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shorten(text, 200, placeholder=" …").rstrip(".: ")


_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def storage_failure(error: BaseException) -> str | None:
    """Describe a failure of the file system in one line: a full disk, a folder that cannot be written, a quota.

    Args:
        error: any exception.

    Returns:
        The line, or ``None`` if the exception is something else.
    """
    if isinstance(error, OSError) and error.errno in _STORAGE:
        reason = _reason(error)
    elif "No space left on device" in str(
        error
    ):  # safetensors and pyarrow tell a full disk by the text of their own exceptions
        reason = "No space left on device"
    else:
        return None
    return f"{reason}; files that were finished are intact, and the same command goes on once this is mended"


def _reason(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a failure of the file system into a ``RunError`` whose line begins with ``what``."""
    try:
        yield
    except Exception as error:
        failure = storage_failure(error)
        if (
            failure is None and isinstance(error, OSError) and error.strerror
        ):  # such as a folder that was deleted meanwhile
            failure = _reason(error)
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
        return f"out of memory{f': {reason}' if reason else ''}; a smaller model, batch or length takes less"
    return None


def path_failure(error: BaseException) -> str | None:
    """Describe a path that no system has: a name that is too long, or ``~name`` of no user; ``None`` if it is something else."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename or 'a path'} cannot be used: {error.strerror}"
    if isinstance(error, RuntimeError) and "determine home directory" in str(error):  # pathlib
        return "a path that begins with ~ cannot be used: it names no user of this machine"
    return None


def describe(error: BaseException) -> tuple[int, str] | None:
    """Give the exit code and the line of an exception that is no defect of diffx; ``None`` for any other."""
    if isinstance(error, UserError | RunError | Stopped):
        return error.exit_code, str(error)
    if (line := path_failure(error)) is not None:
        return UserError.exit_code, line
    line = storage_failure(error) or memory_failure(error)
    return None if line is None else (RunError.exit_code, line)


def one_line(text: str) -> str:
    """Escape what would break a message into lines or could not be printed, such as half of a surrogate pair."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
