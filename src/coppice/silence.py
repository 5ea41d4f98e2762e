"""Libraries that write past Python, straight to the process's standard output and error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing that the block writes to the terminal is seen, of C++ code neither."""
    _flush()
    kept, nowhere = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}, os.open(os.devnull, os.O_WRONLY)
    for descriptor in kept:
        os.dup2(nowhere, descriptor)
    try:
        yield
    finally:
        _flush()
        for descriptor, was in kept.items():
            os.dup2(was, descriptor)
            os.close(was)
        os.close(nowhere)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
