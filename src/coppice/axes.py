"""Axes: which tensor dims are one and the same thing, found by unification with refinement.

A tensor's dim is an *axis*. An axis is an atom, or it has been found to be a sum (concat, split, slice, zero padding) or a
product (reshape, groups, heads) of smaller axes; sums and products nest. ``unify`` says that two axes are the same: union-find,
and where the two are cut differently, the coarser one is refined until the cuts agree. Parts are strictly smaller than the whole,
so there are no cycles, and every refinement adds a node: the work is linear in the number of ops, up to the inverse Ackermann factor.

A third compound, the choice, is for dims whose indices differ by place: where a reshape gives q, k and v a dim of their own and the code
picks them apart, what a head holds is one dim of that tensor, and yet several axes of one width.

Axes of size 1 are never cut and are left out of products. What can't be made to agree is pinned, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from enum import Enum


class Form(Enum):
    ATOM = "atom"
    SUM = "sum"
    PRODUCT = "product"
    CHOICE = "choice"  # one of the parts, by the index along another dim


class Axis:
    """A node of the union-find forest. Identity matters, equality does not: always go through :func:`find`."""

    __slots__ = ("chooser", "form", "mixed", "parts", "pinned", "same_as", "size")

    def __init__(self, size: int, pinned: str | None = None) -> None:
        self.size = size
        self.form = Form.ATOM
        self.parts: tuple[Axis, ...] = ()
        self.pinned = pinned
        self.mixed = False
        self.same_as: Axis | None = None
        self.chooser: Axis | None = None  # of a choice: the axis whose index chooses

    def __repr__(self) -> str:
        root = find(self)
        if root.form is Form.ATOM:
            return f"{'=' if root.pinned else ''}{root.size}"
        sign = {Form.SUM: " + ", Form.PRODUCT: " ", Form.CHOICE: " | "}[root.form]
        return "(" + sign.join(map(repr, root.parts)) + ")"


def find(axis: Axis) -> Axis:
    """The representative of ``axis`` (with path halving)."""
    while axis.same_as is not None:
        if axis.same_as.same_as is not None:
            axis.same_as = axis.same_as.same_as
        axis = axis.same_as
    return axis


def terms(axis: Axis) -> list[Axis]:
    """``axis`` as a sum: its parts in order, nested sums opened; an axis that is no sum is its own only term."""
    return _open(axis, Form.SUM)


def factors(axis: Axis) -> list[Axis]:
    """``axis`` as a product: its factors, major first, nested products opened."""
    return _open(axis, Form.PRODUCT)


def _open(axis: Axis, form: Form) -> list[Axis]:
    axis = find(axis)
    if axis.form is not form:
        return [axis]
    return [leaf for part in axis.parts for leaf in _open(part, form)]


def atoms(axis: Axis) -> Iterator[Axis]:
    """Every atom below ``axis``; one that occurs twice is given twice."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        yield axis
    for part in axis.parts:
        yield from atoms(part)


def pin(axis: Axis, reason: str) -> None:
    """Forbid any cut of ``axis``. The first reason given stays."""
    axis = find(axis)
    if axis.pinned is None:
        axis.pinned = reason
        for part in axis.parts:
            pin(part, reason)


def mix(axis: Axis) -> None:
    """Note that some op mixes along ``axis`` (its result at one index depends on which other indices are there)."""
    for atom in atoms(axis):
        atom.mixed = True


def sum_of(parts: Sequence[Axis]) -> Axis:
    """The axis that lays ``parts`` end to end."""
    return _compose([p for p in parts if find(p).size > 0], Form.SUM, sum(find(p).size for p in parts))


def product_of(parts: Sequence[Axis]) -> Axis:
    """The axis that runs through ``parts`` in row-major order."""
    return _compose([p for p in parts if find(p).size != 1], Form.PRODUCT, math.prod(find(p).size for p in parts))


def _compose(parts: list[Axis], form: Form, size: int) -> Axis:
    parts = [leaf for part in parts for leaf in _open(part, form)]  # kept flat, so that deep concats don't nest
    if len(parts) == 1:
        return parts[0]
    axis = Axis(size)
    if parts and size:
        axis.form, axis.parts = form, tuple(parts)
        if all(find(p).pinned for p in parts):
            axis.pinned = find(parts[0]).pinned
    return axis


def choice_of(parts: Sequence[Axis], chooser: Axis) -> Axis:
    """The axis that is ``parts[k]`` at index ``k`` of the dim ``chooser``; all have one size, and must keep one width."""
    axis = Axis(find(parts[0]).size)
    axis.form, axis.parts, axis.chooser = Form.CHOICE, tuple(parts), chooser
    return axis


def chosen(axis: Axis, index: int) -> Axis:
    """What ``axis`` is at ``index`` of the dim that chooses."""
    axis = find(axis)
    return axis.parts[index] if axis.form is Form.CHOICE else axis


def in_proportion(axes: Sequence[Axis]) -> list[tuple[Axis, ...]] | None:
    """Which atoms must keep one width for ``axes``, of one size, to keep one; None where they are not made up alike."""
    axes = list(dict.fromkeys(map(find, axes)))
    forms = {axis.form for axis in axes}
    if len(axes) == 1:
        return []
    if forms == {Form.ATOM}:
        return [tuple(axes)]
    parts = [_open(axis, axis.form) for axis in axes]
    if len(forms) > 1 or len({tuple(find(p).size for p in own) for own in parts}) > 1:
        return None
    found = [in_proportion(place) for place in zip(*parts, strict=True)]
    return None if None in found else [tie for ties in found for tie in ties or ()]


def decided(axis: Axis) -> Axis:
    """``find``, with the parts of a choice made one axis: something treats them alike."""
    axis = find(axis)
    if axis.form is Form.CHOICE:
        first, *others = axis.parts
        for other in others:
            unify(first, other)
        axis.form, axis.parts, axis.same_as = Form.ATOM, (), find(first)
        axis = find(axis)
    return axis


def split(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Refine ``axis`` so that it is the sum of its first ``at`` indices and the rest; None where a part of it can't be cut there."""
    axis = decided(axis)
    if axis.form is Form.SUM:
        return _split_sum(axis, at)
    if axis.form is Form.ATOM:
        halves = (Axis(at, axis.pinned), Axis(axis.size - at, axis.pinned))
        for half in halves:
            half.mixed = axis.mixed
    else:
        parts = _split_product(axis, at)
        if parts is None:
            return None
        halves = parts
    axis.form, axis.parts = Form.SUM, halves
    return halves


def _split_product(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    """Whole rows, then, where the cut falls inside a row, that row by itself, cut in two, then whole rows again."""
    major, *minor = factors(axis)
    row = product_of(minor)
    above, inside = divmod(at, find(row).size)
    top = split(major, above) if above else (Axis(0), major)
    if top is None or not inside:
        return top and (product_of([top[0], row]), product_of([top[1], row]))
    rest = split(top[1], 1) if find(top[1]).size > 1 else (top[1], Axis(0))
    cut = split(row, inside)
    if rest is None or cut is None:
        return None
    pin(rest[0], "one row that is cut across")
    left, right = [product_of([top[0], row])] if above else [], [product_of([rest[1], row])] if find(rest[1]).size else []
    return sum_of([*left, cut[0]]), sum_of([cut[1], *right])


def _split_sum(axis: Axis, at: int) -> tuple[Axis, Axis] | None:
    left: list[Axis] = []
    right = terms(axis)
    while at:
        part = right.pop(0)
        if part.size > at:
            cut = split(part, at)
            if cut is None:
                return None
            part, rest = cut
            right.insert(0, rest)
        left.append(part)
        at -= find(part).size
    return sum_of(left), sum_of(right)


def factor(axis: Axis, major: int) -> tuple[Axis, Axis] | None:
    """Refine ``axis`` so that it is a product of ``major`` rows of equal length; None where it can't be one."""
    axis = decided(axis)
    row, remainder = divmod(axis.size, major)
    if remainder:
        return None
    if 1 in (major, row):
        return (Axis(1), axis) if major == 1 else (axis, Axis(1))
    if axis.form is Form.PRODUCT:
        return _factor_product(axis, major)
    if axis.form is Form.ATOM:
        rows, columns = Axis(major, axis.pinned), Axis(row, axis.pinned)
        rows.mixed = columns.mixed = axis.mixed
    else:
        pieces = [factor(t, t.size // row) for t in terms(axis)] if all(t.size % row == 0 for t in terms(axis)) else _rows(axis, major, row)
        if pieces is None or any(p is None for p in pieces):
            return None
        rows = sum_of([p[0] for p in pieces if p])
        columns = pieces[0][1]  # type: ignore[index]
        for piece in pieces[1:]:
            unify(columns, piece[1])  # type: ignore[index]
    axis.form, axis.parts = Form.PRODUCT, (rows, columns)
    return rows, columns


def _rows(axis: Axis, major: int, row: int) -> list[tuple[Axis, Axis] | None] | None:
    """A sum cut into rows across its terms: each row by itself, none of which can go alone."""
    pieces: list[tuple[Axis, Axis] | None] = []
    rest = axis
    for _ in range(major - 1):
        cut = split(rest, row)
        if cut is None:
            return None
        pieces.append((Axis(1, "one row that is cut across"), cut[0]))
        rest = cut[1]
    return [*pieces, (Axis(1, "one row that is cut across"), rest)]


def _factor_product(axis: Axis, major: int) -> tuple[Axis, Axis] | None:
    high: list[Axis] = []
    low = factors(axis)
    while major > 1:
        part = low.pop(0)
        if part.size > major:
            cut = factor(part, major)
            if cut is None:
                return None
            part, rest = cut
            low.insert(0, rest)
        if major % find(part).size:
            return None
        high.append(part)
        major //= find(part).size
    return product_of(high), product_of(low)


def unify(a: Axis, b: Axis) -> bool:
    """Make ``a`` and ``b`` one axis. Where no common refinement exists both are pinned and the answer is False."""
    a, b = find(a), find(b)
    if a is b:
        return True
    a, b = decided(a), decided(b)
    if a is b:
        return True
    if a.size != b.size:
        return _conflict(a, b, f"meets an axis of another size ({a.size} and {b.size})")
    if a.pinned or b.pinned:  # nothing is ever cut there, so how the two are composed does not matter
        pin(a, str(b.pinned))
        pin(b, str(a.pinned))
        return True
    if a.form is not Form.ATOM and b.form is Form.ATOM:
        a, b = b, a
    if a.form is not Form.ATOM:
        products = a.form is b.form is Form.PRODUCT
        if not (_align(factors(a), factors(b), factor) if products else _align(terms(a), terms(b), split)):
            return _conflict(a, b, "is cut in two ways that share no refinement")
        a, b = find(a), find(b)
        if a is b:
            return True
    _merge(a, b)
    return True


def _merge(a: Axis, b: Axis) -> None:
    """Point ``a`` at ``b``; what was known of ``a`` holds for ``b``."""
    a.same_as = b
    if a.mixed:
        mix(b)


def _align(left: list[Axis], right: list[Axis], cut: Callable[[Axis, int], tuple[Axis, Axis] | None]) -> bool:
    """Unify two lists of terms (cut: split) or of factors (cut: factor) of the same whole, cutting the larger head where sizes differ."""
    left, right = left[::-1], right[::-1]
    while left and right:
        x, y = find(left.pop()), find(right.pop())
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        if x.size > y.size:
            halves = cut(x, y.size)
            if halves is None:
                return False
            x = find(halves[0])
            left.append(halves[1])
        if not unify(x, y):
            return False
    return True


def _conflict(a: Axis, b: Axis, reason: str) -> bool:
    pin(a, reason)
    pin(b, reason)
    return False
