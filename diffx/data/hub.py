"""Requests to the Hugging Face hub: none where its address is unknown, no messages of retries."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging


@contextmanager
def asking_hub(spec: str) -> Iterator[None]:
    """Let a library load ``spec``, a name of the hub or a folder; without network, from the cache.

    Raises:
        ConnectionError: it is not in the cache and the hub cannot be asked.
    """
    verbosity, offline = logging.get_verbosity(), constants.HF_HUB_OFFLINE
    refused = "" if Path(spec).exists() else _refused()
    logging.set_verbosity_error()
    constants.HF_HUB_OFFLINE = offline or bool(refused)
    try:
        yield
    except Exception as error:
        # huggingface_hub's OfflineModeIsEnabled is a ConnectionError.
        cause: BaseException | None = error
        while cause and not isinstance(cause, ConnectionError | LocalEntryNotFoundError):
            cause = cause.__cause__ or cause.__context__
        if refused and cause:
            raise ConnectionError(refused) from error
        raise
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)


def _refused() -> str:
    """Why the hub cannot be asked; empty if it can."""
    if constants.is_offline_mode():
        return "offline mode is on (HF_HUB_OFFLINE) and it is not in the cache"
    hub = urlsplit(constants.ENDPOINT)
    if getproxies().keys() & {hub.scheme, "all"}:  # a proxy resolves names itself
        return ""
    try:
        socket.getaddrinfo(hub.hostname, None)
    except OSError as error:
        return f"{hub.hostname} cannot be reached ({error.strerror or error})"
    return ""
