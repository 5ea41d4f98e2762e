"""Compare a recorded run of the pruned model with the plan, op by op: the first place where the user's code disagrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coppice.axes import Axis, find
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.graph import Op
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
    told = [op.attrs["start"]] if "start" in op.attrs else []
    told += op.attrs.get("sizes", {}).values()
    told += [n for pair in op.attrs.get("pads", ()) for n in pair]
    return Step(index, VIEWS.get(name, name), _compared(op, shapes), tuple(told))


def planned(coupling: Coupling, widths: Mapping[Axis, int], shapes: Sequence[Shape] | None = None) -> list[Step]:
    """The ops of the dense recording that say something, as they must be at the given widths (``shapes``: of all values, where known)."""
    shapes = planned_shapes(coupling, widths) if shapes is None else shapes
    found = []
    for k, (op, info) in enumerate(zip(coupling.graph.ops, coupling.ops, strict=True)):
        dense = step(k, op, [shapes[v] for v in op.outputs])
        if dense is not None:
            letters = ["start"] * ("start" in op.attrs) + list(op.attrs.get("sizes", ()))
            told = [width(info.letters[x], widths) if x in info.letters else n for x, n in zip(letters, dense.told, strict=False)]
            found.append(Step(k, dense.name, dense.shapes, (*told, *dense.told[len(letters) :])))
    return found


def _compared(op: Op, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """All pieces of a tensor that is taken apart; else the first result (the others are statistics for the backward pass)."""
    return tuple(shapes) if op.rule in ("take_apart", "along") else tuple(shapes[:1])


def planned_shapes(coupling: Coupling, widths: Mapping[Axis, int]) -> list[Shape]:
    """The shape of every value of the graph at the given widths."""
    known: dict[Axis, int] = {}

    def size(axis: Axis) -> int:
        axis = find(axis)
        if axis not in known:
            known[axis] = width(axis, widths)
        return known[axis]

    return [tuple(map(size, dims)) for dims in coupling.dims]


def first_difference(want: Sequence[Step], have: Sequence[Step]) -> int | None:
    """The position in ``want`` where ``have`` first disagrees or ends; None if all agrees."""
    for k, (a, b) in enumerate(zip(want, have, strict=False)):
        if not a.agrees(b):
            return k
    return None if len(want) == len(have) else min(len(have), len(want) - 1)


def inside(path: str, around: str) -> bool:
    """Whether the module at ``path`` is the one at ``around`` or in it."""
    return not around or path == around or path.startswith(around + ".")
