"""Ctrl-C that something on the way swallows."""

import contextlib
import os
import signal

import pytest

from coppice.interrupts import check, heeded
from coppice.progress import Terminal


def test_what_was_swallowed_is_raised_at_the_next_report() -> None:
    def work() -> None:
        with heeded(), Terminal().bar("work") as advance:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            advance(1, 2)

    with pytest.raises(KeyboardInterrupt):
        work()
    check()  # the block is over, and with it what was heard
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGINT)
        check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
