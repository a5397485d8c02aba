"""Ctrl-C that stops work between its steps, never inside what puts things right again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False  # a Ctrl-C that waits for the next step


def step() -> None:
    """A place where nothing is half done: raises KeyboardInterrupt if one was held back."""
    global _asked
    if _asked:
        _asked = False
        raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[None]:
    """A Ctrl-C waits inside for the next step(), or the end; a second one does not.

    A program with a SIGINT handler of its own keeps it, and other threads than the main one never
    see the signal: nothing changes for them.
    """
    global _asked
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def hold(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked:
            signal.default_int_handler(number, frame)
        _asked = True

    _asked = False
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        step()
