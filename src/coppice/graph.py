"""The recorded program that every front-end hands to the core: values, ops, and nothing of any framework.

A front-end (one per framework) records the concrete ops of one forward pass and writes each of them in the vocabulary of
``coppice.rules``: a rule's name, the operands in the rule's order, and the few sizes the rule needs. The core never looks at
``Op.call`` or ``Graph.origin``; they are the front-end's own handles, for replaying the ops and for reaching the user's model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Kind(Enum):
    """Where a value comes from."""

    INPUT = "input"
    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    INTERMEDIATE = "intermediate"


@dataclass(slots=True)
class Value:
    """One tensor of the recorded program. ``names`` holds every name that a parameter or buffer goes by (tied weights have several)."""

    id: int
    shape: tuple[int, ...]
    kind: Kind
    itemsize: int
    names: tuple[str, ...] = ()


@dataclass(slots=True)
class Op:
    """One op: ``rule`` picks the line of ``coppice.rules``; ``inputs`` are value ids in that rule's order (None: operand not given).

    ``others`` are tensors that the op reads but its rule says nothing about (an index): they are pinned.
    """

    rule: str
    name: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    module: str
    attrs: dict[str, Any] = field(default_factory=dict)
    others: tuple[int, ...] = ()
    call: Any = None


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a user's module: ops ``first`` to ``last`` - 1 ran in it.

    ``inputs``: the positional arguments, value ids of tensors (None: no tensor); ``outputs``: what it returned, alike; ``bare``: one tensor
    and no collection of them.
    """

    path: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    bare: bool
    first: int
    last: int


@dataclass(slots=True)
class Graph:
    """A forward pass, in execution order. ``inputs`` and ``outputs`` are value ids; ``batch`` is the batch size it was recorded with.

    ``training`` and ``training_outputs``: the pass in training mode, recorded where it reads parameters that evaluation does not (auxiliary
    heads). It couples axes; it counts, and is replayed, nowhere. ``calls``: the modules that ran in ``ops``, innermost first.
    """

    values: list[Value]
    ops: list[Op]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: int = 1
    origin: Any = None
    training: list[Op] = field(default_factory=list)
    training_outputs: tuple[int, ...] = ()
    calls: list[ModuleCall] = field(default_factory=list)

    def shape(self, value: int) -> tuple[int, ...]:
        return self.values[value].shape

    def weights(self) -> list[Value]:
        """Parameters and buffers, in the order of their first use."""
        return [v for v in self.values if v.kind in (Kind.PARAMETER, Kind.BUFFER)]
