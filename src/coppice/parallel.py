"""Several processes, one run: started by `torchrun`, they train, evaluate and decide as one.

All of them go through the same code. What is random or deterministic each does for itself; what a clock, a disk or a long search decides,
the first process does alone, and tells the others (`World.first`). Only it writes and speaks. Who takes part is the world of the moment
(`current`): without torchrun, and inside `alone`, it is one process, and nothing here needs PyTorch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
_LOST = "another process of the run has ended or can't be reached"


class World(Protocol):
    """The processes that work together, of which this one is number `rank` of `size`. Everything here is asked of all of them, in order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which does it alone; what fails there is a CoppiceError everywhere."""

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each process, by rank; it must ask nothing of the world. What fails in one is an error in all."""

    def numbers(self, own: Sequence[float]) -> list[list[float]]:
        """As many numbers of each process, by rank: cheap enough for every step."""

    def part(self, count: int) -> slice:
        """Which of so many in a row are this process's."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with gradients averaged over the processes; its parameters become the first process's."""


class _One:
    """A world of one process."""

    rank, size = 0, 1

    def first(self, work: Callable[[], T]) -> T:
        return work()

    def together(self, work: Callable[[], T]) -> list[T]:
        return [work()]

    def numbers(self, own: Sequence[float]) -> list[list[float]]:
        return [list(own)]

    def part(self, count: int) -> slice:
        return slice(0, count)

    def wrap(self, module: nn.Module) -> nn.Module:
        return module


_ONE = _One()
_current: World | None = None


def current() -> World:
    """The processes that work together at the moment."""
    return _ONE if _current is None else _current


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A block that this process does by itself."""
    with _in(_ONE):
        yield


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """A block that all processes which torchrun started do together, on `device` ("cpu", "cuda" or "auto"); without torchrun one process.

    Inside another such block, or inside `alone`, it changes nothing. Raises CoppiceError if the processes can't work together.
    """
    if _current is not None or not launched():
        yield current()
        return
    from coppice.torch.processes import start

    with _in(start(device)):
        yield current()


@contextlib.contextmanager
def _in(world: World) -> Iterator[None]:
    global _current
    before, _current = _current, world
    try:
        yield
    finally:
        _current = before


def meet() -> None:
    """Wait for the other processes: who ends first ends them all, if it is with an exit status of its own."""
    if launched():
        from coppice.torch.processes import meet

        meet()


def share(count: int, rank: int, size: int) -> slice:
    """Part `rank` of `size` parts in a row, which differ by one at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


# --- before there is a world, and after it broke --------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun started several processes, of which this is one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this process speaks for all."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def local_processes() -> int:
    """How many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def says_it() -> bool:
    """Whether it is for this process to say what ended it: true in the first that asks. What ends one mostly ends all."""
    if not launched():
        return True
    try:
        from coppice.torch.processes import count_failure

        return count_failure() == 1
    except Exception:  # no PyTorch, or nobody there to count
        return leads()


def explained(error: Exception) -> Exception:
    """`error`, or what it means where it came of a lost connection to another process."""
    if launched() and isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed")):
        return CoppiceError(f"{_LOST}: go on with the same command, or with --resume")
    return error


def not_shared(what: str) -> None:
    """Raise CoppiceError where several processes were started for what one does."""
    if launched():
        raise CoppiceError(f"{what} does not share its work over processes: start it without torchrun")
