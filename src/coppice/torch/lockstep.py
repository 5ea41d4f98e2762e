"""Compare a recorded run of the pruned model with the plan, op by op: the first place where the user's code disagrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coppice.axes import Axis, find
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.graph import Op
from coppice.movement import Dims
from coppice.torch.aten import base_name

# Whether PyTorch copies depends on strides, so on sizes; a copy changes nothing that is compared here.
COPIES = {"clone", "alias", "detach", "_to_copy", "contiguous", "lift_fresh", "copy", "empty"}
VIEWS = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """An op that is compared: its index in its recording, its name, its results' shapes, and the sizes it was told that no shape shows."""

    index: int
    name: str
    shapes: tuple[Shape, ...]
    told: tuple[int, ...]

    def agrees(self, other: Step) -> bool:
        return (self.name, self.shapes, self.told) == (other.name, other.shapes, other.told)


def step(index: int, op: Op, shapes: Sequence[Shape]) -> Step | None:
    """``op`` of a run, with its results' ``shapes``; None where it says nothing."""
    name = base_name(op.call.func)
    if name in COPIES:
        return None
    return Step(index, VIEWS.get(name, name), _compared(op, shapes), told_sizes(op.attrs))


def told_sizes(attrs: Mapping[str, Any]) -> tuple[int, ...]:
    """The sizes that an op is told and that no shape of its results shows."""
    told = [attrs["start"]] if "start" in attrs else []
    told += attrs.get("sizes", {}).values()
    told += [n for pair in attrs.get("pads", ()) for n in pair]
    return tuple(told)


@dataclass(slots=True)
class Planned:
    """An op of the dense recording that says something, at any widths: ``at`` is the step that it must be."""

    index: int
    name: str
    module: str
    dims: tuple[Dims, ...]  # of the results that are compared
    told: tuple[Axis | int, ...]

    def at(self, sizes: Sizes) -> Step:
        return Step(self.index, self.name, tuple([sizes.shape(dims) for dims in self.dims]), self.told_at(sizes))

    def told_at(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple([t if isinstance(t, int) else sizes[t] for t in self.told])


class Sizes(dict[Axis, int]):
    """The width of every axis where those of some are given; worked out when first asked for."""

    def __init__(self, widths: Mapping[Axis, int]) -> None:
        super().__init__()
        self._widths = widths
        self._shapes: dict[Dims, Shape] = {}

    def __missing__(self, axis: Axis) -> int:
        found = self[axis] = width(axis, self._widths)
        return found

    def shape(self, dims: Dims) -> Shape:
        found = self._shapes.get(dims)
        if found is None:
            found = self._shapes[dims] = tuple([self[a] for a in dims])
        return found


def plannable(coupling: Coupling) -> list[Planned]:
    """The ops of the dense recording that say something."""
    found = []
    for k, (op, info) in enumerate(zip(coupling.graph.ops, coupling.ops, strict=True)):
        name = base_name(op.call.func)
        if name not in COPIES:
            letters = ["start"] * ("start" in op.attrs) + list(op.attrs.get("sizes", ()))
            dense = told_sizes(op.attrs)
            told = [info.letters.get(x, n) for x, n in zip(letters, dense, strict=False)]
            dims = tuple([found_dims(coupling.dims[v]) for v in _compared(op, op.outputs)])
            found.append(Planned(k, VIEWS.get(name, name), op.module, dims, (*told, *dense[len(letters) :])))
    return found


def found_dims(dims: Dims) -> Dims:
    """The same axes, each as the one that stands for all that it was found to be, so that there are few to work out."""
    return tuple(map(find, dims))


def planned(coupling: Coupling, widths: Mapping[Axis, int]) -> list[Step]:
    """The ops of the dense recording that say something, as they must be at the given widths."""
    sizes = Sizes(widths)
    return [op.at(sizes) for op in plannable(coupling)]


def _compared(op: Op, results: Sequence[Any]) -> tuple[Any, ...]:
    """All pieces of a tensor that is taken apart; else the first result (the others are statistics for the backward pass)."""
    return tuple(results) if op.rule in ("take_apart", "along") else tuple(results[:1])


def first_difference(want: Sequence[Step], have: Sequence[Step]) -> int | None:
    """The position in ``want`` where ``have`` first disagrees or ends; None if all agrees."""
    for k, (a, b) in enumerate(zip(want, have, strict=False)):
        if not a.agrees(b):
            return k
    return None if len(want) == len(have) else min(len(have), len(want) - 1)


def inside(path: str, around: str) -> bool:
    """Whether the module at ``path`` is the one at ``around`` or in it."""
    return not around or path == around or path.startswith(around + ".")
