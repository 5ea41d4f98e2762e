"""Shape rules: the ops whose effect on dims depends on sizes or positions, each a function of the operands' axes.

Every function takes ``(operands, shapes, attrs)``: the axes of each operand's dims, the shapes of the results, and the op's
attributes; it unifies, refines or pins, and returns the axes of each result. ``SHAPE_RULES`` is the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from coppice.axes import Axis, choice_of, chosen, find, mix, pin, product_of, split, sum_of, unify

Dims = tuple[Axis, ...]
Shapes = Sequence[tuple[int, ...]]
FIXED = "a size that the op fixes"
PICKED = "one index is picked by its number"


def fixed(shape: Sequence[int], reason: str = FIXED) -> Dims:
    """New axes that can't be cut."""
    return tuple(Axis(size, reason) for size in shape)


def pointwise(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """NumPy broadcasting: dims align from the right; a dim of size 1 says nothing about its partner."""
    return [broadcast(operands, shape) for shape in shapes]


def broadcast(operands: list[Dims], shape: tuple[int, ...]) -> Dims:
    out: list[Axis] = []
    for back in range(len(shape), 0, -1):
        meeting = [o[-back] for o in operands if len(o) >= back and find(o[-back]).size != 1]
        for other in meeting[1:]:
            unify(meeting[0], other)
        out.append(meeting[0] if meeting else Axis(shape[-back]))
    return tuple(out)


def view(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Reshape: the shortest runs of dims with equal products are one product. ``apart``: the dim that the code then picks apart."""
    source, target = list(operands[0])[::-1], list(shapes[0])[::-1]
    if math.prod(shapes[0]) == 0:
        return _refuse(operands, shapes, "an empty tensor is reshaped")
    out: list[Axis] = []
    while source or target:
        if source and find(source[-1]).size == 1:
            source.pop()
        elif target and target[-1] == 1:
            target.pop()
            out.append(Axis(1))
        else:
            out.extend(_run(source, target, attrs.get("apart", math.inf) - len(out)))
    return [tuple(out)]


def _run(source: list[Axis], target: list[int], apart: float) -> list[Axis]:
    old, new = [source.pop()], [target.pop()]
    have, want = find(old[0]).size, new[0]
    while have != want:
        if have < want:
            old.append(source.pop())
            have *= find(old[-1]).size
        else:
            new.append(target.pop())
            want *= new[-1]
    if len(old) == len(new) == 1:
        return old
    whole = product_of(old)
    if whole.pinned:
        return list(fixed(new, whole.pinned))
    if 0 <= apart < len(new) - 1:
        return _run_apart(whole, new, int(apart))
    axes = [Axis(size) for size in new]
    unify(whole, product_of(axes))
    return axes


def _run_apart(whole: Axis, new: list[int], apart: int) -> list[Axis]:
    """A run of which dim ``apart`` will be picked apart: for each of its indices, axes of their own lie behind it."""
    before = [Axis(size) for size in new[:apart]]
    pieces = [[Axis(size) for size in new[apart + 1 :]] for _ in range(new[apart])]
    unify(whole, product_of([*before, sum_of([product_of(piece) for piece in pieces])]))
    chooser = Axis(new[apart], PICKED)
    return [*before, chooser, *(choice_of(parts, chooser) for parts in zip(*pieces, strict=True))]


def permute(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    return [tuple(operands[0][k] for k in attrs["order"])]


def expand(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Broadcast to a given shape: a new or stretched dim is one value repeated, an axis of its own."""
    (dims,), shape = operands, shapes[0]
    padded = (Axis(1),) * (len(shape) - len(dims)) + dims
    return [tuple(a if find(a).size == size else Axis(size) for a, size in zip(padded, shape, strict=True))]


def repeat(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Copies laid end to end: copy by copy, each of them the whole axis. A dim of size 1 is stretched, as ``expand`` does it."""
    dims = (Axis(1),) * (len(shapes[0]) - len(operands[0])) + operands[0]
    return [tuple(_copies(axis, size) for axis, size in zip(dims, shapes[0], strict=True))]


def _copies(axis: Axis, size: int) -> Axis:
    once = find(axis).size
    return axis if once == size else Axis(size) if once == 1 else product_of([Axis(size // once, "copies made by the code"), axis])


def concat(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    dim, rank = attrs["dim"], len(shapes[0])
    parts = [o for o in operands if len(o) == rank]
    for other in parts[1:]:
        for k in range(rank):
            if k != dim:
                unify(parts[0][k], other[k])
    return [(*parts[0][:dim], sum_of([p[dim] for p in parts]), *parts[0][dim + 1 :])]


def stack(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    dim = attrs["dim"]
    rest = broadcast(operands, shapes[0][:dim] + shapes[0][dim + 1 :])
    return [(*rest[:dim], Axis(shapes[0][dim], "tensors stacked by the code"), *rest[dim:])]


def take_apart(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Split and slice: the results are the pieces of one dim from ``start`` on, each of its own width."""
    dims, dim, start = operands[0], attrs["dim"], attrs.get("start", 0)
    if attrs.get("step", 1) != 1:
        pin(dims[dim], "sliced with a step")
        return [(*dims[:dim], Axis(s[dim], "sliced with a step"), *dims[dim + 1 :]) for s in shapes]
    pieces = []
    rest: Axis = dims[dim]
    if start and find(rest).size > start:
        rest = cut(rest, start)[1]
    for shape in shapes:
        piece, rest = cut(rest, shape[dim])
        pieces.append((*dims[:dim], piece, *dims[dim + 1 :]))
    return pieces


def cut(axis: Axis, at: int) -> tuple[Axis, Axis]:
    """The first ``at`` indices of ``axis`` and the rest, as axes; where it can't be cut there, it is pinned."""
    size, pinned = find(axis).size, find(axis).pinned
    if at in (0, size):
        return (axis, Axis(0)) if at else (Axis(0), axis)
    if pinned:
        return Axis(at, pinned), Axis(size - at, pinned)
    halves = split(axis, at)
    if halves is None:
        pin(axis, "split inside a row of a product")
        return Axis(at, "split inside a row of a product"), Axis(size - at, "split inside a row of a product")
    return halves


def halves(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """One half of a dim gates the other, index by index."""
    dims, dim = operands[0], attrs["dim"]
    value, gate = cut(dims[dim], find(dims[dim]).size // 2)
    unify(value, gate)
    return [(*dims[:dim], value, *dims[dim + 1 :])]


def pad(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Constant padding: a fixed part, the axis, a fixed part; a negative amount cuts off as many, whatever the width."""
    out: list[Axis] = []
    for axis, (before, after) in zip(operands[0], attrs["pads"], strict=True):
        if before < 0:
            gone, axis = cut(axis, -before)
            pin(gone, "cut off by a negative padding")
        if after < 0:
            axis, gone = cut(axis, find(axis).size + after)
            pin(gone, "cut off by a negative padding")
        out.append(sum_of([*fixed([max(before, 0)], "zero padding"), axis, *fixed([max(after, 0)], "zero padding")]))
    return [tuple(out)]


def along(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Ops that leave some dims alone (``map``: for each result dim, the operand's dim or None), mix some, and sum some away.

    ``picked``: the results are single indices of the dim that is left out.
    """
    dims, mapping = operands[0], attrs["map"]
    kept = set(mapping) | set(attrs.get("summed", ()))
    for dim in attrs.get("mixed", ()):
        mix(dims[dim])
    for k, axis in enumerate(dims):
        if k not in kept and k not in attrs.get("mixed", ()):
            pin(axis, attrs.get("reason", FIXED))
    if "picked" in attrs:
        return [tuple(chosen(dims[k], index) for k in mapping) for index in attrs["picked"]]
    out = tuple(Axis(size, FIXED) if k is None else dims[k] for k, size in zip(mapping, shapes[0], strict=True))
    return [out if len(shape) == len(out) else fixed(shape) for shape in shapes]


def put(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Values written where index tensors say: dims that are not indexed are those of the values; ``map`` is that of reading there."""
    (dims, values), mapping = operands, attrs["map"]
    for k, axis in enumerate(dims):
        if k not in mapping:
            pin(axis, "written to by an index tensor")
    for k, value in zip(mapping[::-1], values[::-1], strict=False):
        if k is None:
            pin(value, "written to by an index tensor")
        elif find(value).size != 1:
            unify(dims[k], value)
    return [dims]


def filled(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """The same number everywhere: the size may be any that the code asks for, and all indices are alike."""
    return [tuple(Axis(size) for size in shape) for shape in shapes]


def gather(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Picked along one dim by an index of the result's shape; other dims are the operand's, where the index goes through all of them."""
    (dims, index), dim = operands, attrs["dim"]
    pin(dims[dim], "picked from by an index tensor")
    pin(index[dim], "an index tensor's own dim")
    for k, (axis, other) in enumerate(zip(dims, index, strict=True)):
        if k != dim:
            if find(axis).size == find(other).size:
                unify(axis, other)
            else:
                pin(axis, "picked from by an index tensor")
                pin(other, "an index tensor's own dim")
    return [index]


def fresh(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    """Numbers made by the code, each other than the next (arange): its size is one that no plan changes."""
    return [fixed(shape, "made by the code with a fixed size") for shape in shapes]


def unknown(operands: list[Dims], shapes: Shapes, attrs: dict[str, Any]) -> list[Dims]:
    return _refuse(operands, shapes, attrs["reason"])


def _refuse(operands: list[Dims], shapes: Shapes, reason: str) -> list[Dims]:
    for axis in (a for dims in operands for a in dims):
        pin(axis, reason)
    return [fixed(shape, reason) for shape in shapes]


SHAPE_RULES: dict[str, Callable[[list[Dims], Shapes, dict[str, Any]], list[Dims]]] = {
    "pointwise": pointwise,
    "view": view,
    "permute": permute,
    "expand": expand,
    "repeat": repeat,
    "concat": concat,
    "stack": stack,
    "take_apart": take_apart,
    "halves": halves,
    "pad": pad,
    "along": along,
    "put": put,
    "filled": filled,
    "gather": gather,
    "fresh": fresh,
    "unknown": unknown,
}
