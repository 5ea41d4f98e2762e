"""What a model costs, as exact polynomials in the widths of its axes.

Every MAC, parameter and byte is a product of axis widths (a :class:`Term`), because the rule table says which axes an op runs over.
So the cost of any plan is evaluated, not traced again, and equals counting the sliced model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from coppice.axes import Axis, Form, atoms, find


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one sample: multiply-accumulates, parameters, and bytes of parameters and buffers.

    ``latency``: seconds, measured where a target asks for them (None: it does not).
    """

    macs: int
    params: int
    bytes: int
    latency: float | None = None

    def to_dict(self) -> dict[str, float]:
        """Without what was not asked for."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Priced(Protocol):
    """A part of a cost, as a function of the widths of ``axes``; ``kind`` is a field of :class:`Cost`."""

    @property
    def kind(self) -> str: ...

    @property
    def axes(self) -> tuple[Axis, ...]: ...

    def within(self, moving: Collection[Axis]) -> Priced:
        """The same where only the atoms ``moving`` change their width."""

    def evaluate(self, widths: Mapping[Axis, int]) -> float: ...


@dataclass(frozen=True, slots=True)
class Term:
    """``scale / divisor`` times the product of the widths of ``axes``; ``kind`` is a field of :class:`Cost`."""

    kind: str
    axes: tuple[Axis, ...]
    scale: int
    divisor: int

    def within(self, moving: Collection[Axis]) -> Term:
        """The same where only the atoms ``moving`` change their width: what stands still is multiplied out."""
        still, axes = 1, []
        for axis in map(find, self.axes):
            if any(atom in moving for atom in atoms(axis)):
                axes.append(axis)
            else:
                still *= axis.size
        return Term(self.kind, tuple(axes), self.scale * still, self.divisor)

    def evaluate(self, widths: Mapping[Axis, int]) -> int:
        product = self.scale
        for axis in self.axes:
            given = widths.get(axis)
            product *= width(axis, widths) if given is None else given
        return product // self.divisor


def width(axis: Axis, widths: Mapping[Axis, int]) -> int:
    """The width of ``axis`` where its atoms have the given widths (missing: their full size)."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        return widths.get(axis, axis.size)
    if axis.form is Form.CHOICE:
        return width(axis.parts[0], widths)  # all keep one width
    parts = (width(p, widths) for p in axis.parts)
    return sum(parts) if axis.form is Form.SUM else math.prod(parts)
