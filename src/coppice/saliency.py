"""Saliency of an index: what is known of single elements, summed over everything that goes with the index.

An axis lies on many tensors (filters, norms, consumers), and below sums and products in their dims; ``per_index`` adds up over all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.axes import Axis, Form, atoms, find
from coppice.coupling import Coupling, keep_mask
from coppice.graph import Kind

Array = NDArray[Any]
ByAxis = dict[int, Array]


@dataclass(frozen=True, slots=True)
class Scores:
    """The score of every index, by axis id. ``additive``: all axes' scores are in one unit (loss), so they may be weighed against cost."""

    by_axis: Mapping[int, Array]
    additive: bool

    def __getitem__(self, axis: int) -> Array:
        return self.by_axis[axis]


def per_index(coupling: Coupling, elements: Mapping[str, Array]) -> ByAxis:
    """Sum element saliencies (parameter name -> array of its shape) over everything that each index of each prunable axis touches."""
    ids = {axis.atom: axis.id for axis in coupling.prunable}
    scores: ByAxis = {axis.id: np.zeros(axis.width) for axis in coupling.prunable}
    for value in coupling.graph.weights():
        array = elements.get(value.names[0]) if value.kind is Kind.PARAMETER else None
        if array is None:
            continue
        for dim, axis in enumerate(coupling.dims[value.id]):
            if find(axis).pinned is None:
                others = tuple(k for k in range(array.ndim) if k != dim)
                share_out(axis, array.sum(axis=others, dtype=np.float64), ids, scores)
    return scores


def share_out(axis: Axis, sums: Array, ids: Mapping[Axis, int], scores: ByAxis) -> None:
    """Add the per-index sums of a dim to the atoms below its axis (``ids``: of those that count)."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        if axis in ids:
            scores[ids[axis]] += sums
    elif axis.form is Form.SUM:
        ends = np.cumsum([find(p).size for p in axis.parts])
        for part, piece in zip(axis.parts, np.split(sums, ends[:-1]), strict=True):
            share_out(part, piece, ids, scores)
    else:
        grid = sums.reshape([find(p).size for p in axis.parts])
        for k, part in enumerate(axis.parts):
            share_out(part, grid.sum(axis=tuple(j for j in range(grid.ndim) if j != k)), ids, scores)


def slices(coupling: Coupling, parameters: Mapping[str, Array]) -> Iterator[tuple[int, Array]]:
    """For each prunable axis (id) and each dim of a parameter that it lies on: what goes with each index, as (width, elements)."""
    for axis in coupling.prunable:
        for value in coupling.graph.weights():
            array = parameters.get(value.names[0])
            if array is None:
                continue
            for dim, below in enumerate(coupling.dims[value.id]):
                if axis.atom in atoms(below):
                    rows = [np.flatnonzero(~keep_mask(below, {axis.atom: np.arange(axis.width) != k})) for k in range(axis.width)]
                    yield axis.id, np.stack([array.take(row, axis=dim).ravel() for row in rows])
