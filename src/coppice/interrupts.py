"""Ctrl-C, also where it is swallowed: Python drops what is raised within a finaliser or a callback, and the work would go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_heard = threading.Event()


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """A block in which Ctrl-C is raised, and again by `check` until the block has ended. A handler of the program's own stays as it is."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _heard.clear()


def _hear(number: int, frame: FrameType | None) -> None:
    _heard.set()
    raise KeyboardInterrupt


def check() -> None:
    """Raise the Ctrl-C that was heard and is not heeded yet."""
    if _heard.is_set():
        raise KeyboardInterrupt
