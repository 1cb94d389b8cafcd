"""SIGINT and SIGTERM during training: recorded, for the loop to save a checkpoint and stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Stop:
    """The ``name`` of the signal that was received, such as ``SIGTERM``."""

    name: str | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Record SIGINT and SIGTERM for the loop to act on; a second one kills."""
    stop, main = Stop(), threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()  # other threads cannot set handlers
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        stop.name = signal.Signals(number).name
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        restore()
