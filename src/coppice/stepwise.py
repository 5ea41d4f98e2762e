"""Run a recorded forward pass op by op over several batches at once, stopping anywhere: what repair needs, with bounded memory.

A model called from outside shows one layer a pass; here the ops are walked through once, and whatever a later op reads is there.
Weights are read from the model when their op runs, so a layer that was mended is mended for everything after it.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from coppice.errors import CoppiceError
from coppice.graph import Kind, Op, Value

_HELD_OUT = 4  # one calibration batch in so many judges, the others are fitted to
MEMORY = 3 * 2**30  # bytes of intermediate values that are held at a time


class Stepwise(ABC):
    """A recording run on ``batches`` (inputs of one shape) in step; ``at`` is the next op.

    Early on, where maps are large, only as many batches run as fit in ``memory`` bytes; more join in as the maps get smaller. ``active``
    is how many there are now.
    """

    def __init__(
        self, ops: list[Op], values: list[Value], outputs: list[int], entry: int, batches: Sequence[Any], memory: int = MEMORY
    ) -> None:
        self.ops, self.values, self.outputs = ops, values, outputs
        self.at = 0
        self._input = entry
        self._batches = batches
        self._env: list[dict[int, Any]] = []
        self._ends = self._lifetimes()
        self._room = self._batches_that_fit(memory)

    @abstractmethod
    def _reads(self, op: Op) -> Iterable[int]:
        """The values that an op reads."""

    @abstractmethod
    def _results(self, op: Op, read: Callable[[int], Any]) -> Sequence[Any]:
        """What an op gives for what it reads."""

    @abstractmethod
    def _fixed(self, value: int) -> Any:
        """A weight as it is now, or a constant; None for what ops make."""

    def _copy(self, tensor: Any) -> Any:
        """For ops that write in place."""
        return tensor

    def _running(self) -> AbstractContextManager[Any]:
        """What the ops run in."""
        return nullcontext()

    @property
    def active(self) -> int:
        return len(self._env)

    def room(self, at: int) -> int:
        """How many batches may be active before op ``at``."""
        return self._room[min(at, len(self._room) - 1)]

    def _lifetimes(self) -> dict[int, list[int]]:
        """Op -> the intermediate values that nothing reads after it."""
        last: dict[int, int] = {}
        for k, op in enumerate(self.ops):
            last.update(dict.fromkeys((*self._reads(op), *op.outputs), k))
        ends: dict[int, list[int]] = {}
        for value, k in last.items():
            if value not in self.outputs and self.values[value].kind is Kind.INTERMEDIATE:
                ends.setdefault(k, []).append(value)
        return ends

    def _batches_that_fit(self, memory: int) -> list[int]:
        """For each op, the batches whose live values fit in ``memory`` from there to the end; at least one to fit to, one to judge by."""
        size = {v.id: math.prod(v.shape) * v.itemsize for v in self.values}
        live, held = [], {self._input: size[self._input]}
        for k, op in enumerate(self.ops):
            held.update({v: size[v] for v in op.outputs})
            live.append(sum(held.values()))
            for value in self._ends.get(k, ()):
                held.pop(value, None)
        peaks = list(itertools.accumulate(reversed(live), max))[::-1]
        return [min(len(self._batches), max(2, memory // peak)) for peak in peaks] or [len(self._batches)]

    def advance(self, upto: int, active: int | None = None) -> None:
        """Run the ops before ``upto``, and forget what no later op reads. ``active``: how many batches take part (None: all that fit)."""
        want = self.room(upto) if active is None else active
        with self._running():
            for env in self._env:
                self._run(env, self.at, upto)
            for k in range(len(self._env), want):
                self._env.append({self._input: self._batches[k]})
                self._run(self._env[-1], 0, upto)
        self.at = upto

    def finish(self) -> list[Any]:
        """The model's first output for every active batch, with the weights as they are now; the program stays where it is."""
        found = []
        with self._running():
            for env in self._env:
                ahead = {value: self._copy(tensor) for value, tensor in env.items()}
                self._run(ahead, self.at, len(self.ops))
                found.append(self._read(self.outputs[0], ahead))
        return found

    def _run(self, env: dict[int, Any], start: int, stop: int) -> None:
        def read(value: int) -> Any:
            return self._read(value, env)

        for k in range(start, stop):
            op = self.ops[k]
            env.update(zip(op.outputs, self._results(op, read), strict=True))
            for value in self._ends.get(k, ()):
                env.pop(value, None)

    def _read(self, value: int, env: dict[int, Any]) -> Any:
        found = self._fixed(value)
        return env[value] if found is None else found

    def value(self, value: int, batch: int) -> Any:
        """What ``value`` is now for one of the active batches."""
        return self._read(value, self._env[batch])


def is_held_out(batch: int) -> bool:
    """Whether the calibration batch of this number (from 0) judges what was fitted to the others. The second of two does."""
    return batch % _HELD_OUT == 1


def of_one_shape(batches: Iterable[Any]) -> list[Any]:
    """The batches that have the first one's shape: a program runs all in step. CoppiceError where there is none."""
    found = list(batches)
    if not found:
        raise CoppiceError("there are no calibration batches; give at least one image")
    return [batch for batch in found if batch.shape == found[0].shape]
