"""Compare a recorded run of the pruned model with the plan, op by op: the first place where the user's code disagrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coppice.axes import Axis
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.graph import Op
from coppice.torch.aten import base_name

# Whether PyTorch copies depends on strides, so on sizes; a copy changes nothing that is compared here.
COPIES = {"clone", "alias", "detach", "_to_copy", "contiguous", "lift_fresh", "copy", "empty"}
VIEWS = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}


@dataclass(frozen=True, slots=True)
class Step:
    """An op that is compared: its index in its own recording, its name, and its results' shapes."""

    index: int
    name: str
    shapes: tuple[tuple[int, ...], ...]


def steps(ops: Sequence[Op], shapes: Mapping[int, tuple[int, ...]] | Sequence[tuple[int, ...]]) -> list[Step]:
    """The ops of a recording that say something, with the shapes of their results."""
    found = []
    for k, op in enumerate(ops):
        name = base_name(op.call.func)
        if name not in COPIES:
            found.append(Step(k, VIEWS.get(name, name), tuple(tuple(shapes[v]) for v in op.outputs[:1])))
    return found


def planned_shapes(coupling: Coupling, widths: Mapping[Axis, int]) -> list[tuple[int, ...]]:
    """The shape of every value of the graph at the given widths."""
    return [tuple(width(axis, widths) for axis in dims) for dims in coupling.dims]


def first_difference(dense: list[Step], pruned: list[Step], finished: bool) -> int | None:
    """The position in ``dense`` where ``pruned`` first disagrees; where it stopped, if it did not finish; None if all agrees."""
    for k, (want, have) in enumerate(zip(dense, pruned, strict=False)):
        if want.name != have.name or want.shapes != have.shapes:
            return k
    if finished and len(dense) == len(pruned):
        return None
    return min(len(pruned), len(dense) - 1)
