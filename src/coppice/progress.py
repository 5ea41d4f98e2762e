"""What a run says while it works: one line a stage, and bars with the time left where a terminal can show them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int, int | None], None]
"""Called with (units done, units in all if that is known) as work goes on."""


class Progress(Protocol):
    """Where a run reports to."""

    def say(self, text: str) -> None:
        """Something finished or was found out."""

    def bar(self, title: str) -> AbstractContextManager[Advance]:
        """Work of known length, under way for as long as the context lasts."""


class Silent:
    """Says nothing: the default in Python."""

    def say(self, text: str) -> None:
        del text

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator[Advance]:
        del title
        yield lambda done, total: None


class Terminal:
    """Lines on stderr, with rich bars between them if it is a terminal; stdout stays free for results."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator[Advance]:
        if not self._console.is_terminal:
            yield lambda done, total: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(title, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)
