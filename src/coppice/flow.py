"""Who computes what from what in a recorded program, and what is computed for nothing once a value is replaced by another.

A recording writes some values in place, so a *version* is a value as one op left it: written once, by op ``made_by`` (None: it was there
before the first op). A substitution says that a version be another version, or a constant; ops that then serve no output are dead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from coppice.graph import Graph, Kind


class Constant(Enum):
    """What a version may be replaced by besides another version. ``NOTHING``: its part of a concat is left out."""

    ZERO = "zero"
    ONE = "one"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Strided:
    """Every so many-th place of a version, in each of its last dims."""

    version: int
    steps: tuple[int, ...]


Source = int | Constant | Strided


class Flow:
    """The versions of a graph: ``reads[k]`` and ``writes[k]`` are those of op ``k``, ``uses[v]`` the ops that read version ``v``."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.value: list[int] = []
        self.made_by: list[int | None] = []
        self.reads: list[tuple[int, ...]] = []
        self.writes: list[tuple[int, ...]] = []
        self.uses: defaultdict[int, list[int]] = defaultdict(list)
        self._versions: defaultdict[int, list[int]] = defaultdict(list)
        self._since: defaultdict[int, list[int]] = defaultdict(list)
        for value in graph.values:
            if value.kind is not Kind.INTERMEDIATE:
                self._new(value.id, None)
        for k, op in enumerate(graph.ops):
            read = [v for v in dict.fromkeys((*op.inputs, *op.others)) if v is not None]
            self.reads.append(tuple(self._last(v) for v in read))
            for version in self.reads[-1]:
                self.uses[version].append(k)
            self.writes.append(tuple(self._new(v, k) for v in op.outputs))
        self.outputs = tuple(self._last(v) for v in graph.outputs)
        self._everything = self.live({})

    def _new(self, value: int, op: int | None) -> int:
        self.value.append(value)
        self.made_by.append(op)
        self._versions[value].append(len(self.value) - 1)
        self._since[value].append(-1 if op is None else op)
        return len(self.value) - 1

    def _last(self, value: int) -> int:
        return self._versions[value][-1] if self._versions[value] else self._new(value, None)

    def at(self, value: int | None, op: int) -> int | None:
        """The version of ``value`` that op ``op`` would read; None where it is not there yet."""
        if value is None:
            return None
        k = bisect_left(self._since[value], op)
        return self._versions[value][k - 1] if k else None

    def shape(self, version: int) -> tuple[int, ...]:
        return self.graph.shape(self.value[version])

    def live(self, substitutes: Mapping[int, Source]) -> frozenset[int]:
        """The ops that some output of the model needs where versions are replaced."""
        needed = {found for v in self.outputs for found in self._sources(v, substitutes)}
        live = set()
        for k in range(len(self.graph.ops) - 1, -1, -1):
            if not needed.isdisjoint(self.writes[k]):
                live.add(k)
                needed.update(found for v in self.reads[k] for found in self._sources(v, substitutes))
        return frozenset(live)

    @staticmethod
    def _sources(version: int, substitutes: Mapping[int, Source]) -> tuple[int, ...]:
        while version in substitutes:
            source = substitutes[version]
            if isinstance(source, Constant):
                return ()
            version = source.version if isinstance(source, Strided) else source
        return (version,)

    def dead(self, substitutes: Mapping[int, Source]) -> frozenset[int]:
        """The ops that nothing needs any more where versions are replaced."""
        return self._everything - self.live(substitutes)

    def only_use(self, version: int) -> int | None:
        """The one op that reads ``version``; None where there are others, or it is an output."""
        uses = self.uses[version]
        return uses[0] if len(uses) == 1 and version not in self.outputs else None

    def entries(self, ops: frozenset[int]) -> frozenset[int]:
        """The versions that come into ``ops`` from outside, weights left out."""
        made = {v for k in ops for v in self.writes[k]}
        read = {v for k in ops for v in self.reads[k]} - made
        weights = (Kind.PARAMETER, Kind.BUFFER, Kind.CONSTANT)
        return frozenset(v for v in read if self.graph.values[self.value[v]].kind not in weights)

    def weights_of(self, ops: frozenset[int]) -> frozenset[int]:
        """The parameters and buffers (value ids) that only ``ops`` read."""
        weights = (Kind.PARAMETER, Kind.BUFFER)
        inside = {self.value[v] for k in ops for v in self.reads[k]}
        outside = {self.value[v] for k in self._everything - ops for v in self.reads[k]}
        return frozenset(v for v in inside - outside if self.graph.values[v].kind in weights)
