"""SIGINT and SIGTERM during training: recorded, for the loop to save a checkpoint and stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """The signal that was received, if any.

    Attributes:
        name: such as ``SIGTERM``.
    """

    name: str | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Record SIGINT and SIGTERM for the loop to act on; a second one kills."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        stop.name = signal.Signals(number).name
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
