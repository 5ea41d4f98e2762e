"""Saliency of an index: what is known of single elements, put together over everything that goes with the index.

An axis lies on many tensors (filters, norms, consumers), and below sums and products in their dims; ``per_index`` goes over all of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.axes import Axis, Form, atoms, find
from coppice.coupling import Coupling, PrunableAxis, keep_mask
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


BLOCK = 2**16  # elements


def per_index(
    coupling: Coupling, elements: Mapping[str, Array], aggregation: str = "sum", saliency: Callable[[Array], Array] | None = None
) -> ByAxis:
    """From element saliencies (parameter name -> array of its shape) to those of each index of each prunable axis.

    Over everything that an index touches (rows of filters, norms, columns of consumers) by one of ``AGGREGATIONS``. With ``saliency``,
    ``elements`` are what that works the saliencies out from, a piece at a time.
    """
    ids = {axis.atom: axis.id for axis in coupling.prunable}
    parts: dict[int, list[Array]] = {axis.id: [np.zeros(axis.width)] if aggregation == "sum" else [] for axis in coupling.prunable}
    for value in coupling.graph.weights():
        array = elements.get(value.names[0]) if value.kind is Kind.PARAMETER else None
        if array is None:
            continue
        wanted = {dim: axis for dim, axis in enumerate(coupling.dims[value.id]) if find(axis).pinned is None}
        for dim, sums in _sums(array, list(wanted), saliency or np.asarray).items():
            here: ByAxis = defaultdict(_nought)
            share_out(wanted[dim], sums, ids, here)
            if aggregation == "mean":
                counts: ByAxis = defaultdict(_nought)
                share_out(wanted[dim], np.full(len(sums), array.size / len(sums)), ids, counts)
                here = {axis: found / counts[axis] for axis, found in here.items()}
            for axis, found in here.items():
                parts[axis].append(found)
    fold = AGGREGATIONS[aggregation]
    return {axis.id: fold(np.stack(parts[axis.id])) if parts[axis.id] else np.zeros(axis.width) for axis in coupling.prunable}


def _nought() -> Array:
    return np.zeros(())


AGGREGATIONS: dict[str, Callable[[Array], Array]] = {
    "sum": lambda parts: parts.sum(0),  # of all elements: what a first-order estimate of a loss adds up to
    "mean": lambda parts: parts.mean(0),  # over the tensors, of the mean over a tensor's elements: large tensors don't drown small ones
    "max": lambda parts: parts.max(0),  # of the tensors' sums: an index matters if one of its tensors says so
}


def isomorphic(coupling: Coupling) -> list[list[PrunableAxis]]:
    """The prunable axes in groups of those that lie alike: the same dims of the operands of the same ops, whatever the widths.

    Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024.
    """
    places: dict[Axis, list[str]] = {axis.atom: [] for axis in coupling.prunable}
    weights = {value.id: value for value in coupling.graph.weights()}
    for op in coupling.graph.ops:
        for k, operand in enumerate(op.inputs):
            if operand is None or operand not in weights:
                continue
            kernel = weights[operand].shape[2:]
            for dim, axis in enumerate(coupling.dims[operand]):
                for atom in dict.fromkeys(atoms(axis)):
                    if atom in places:
                        places[atom].append(f"{op.rule} {k} {dim} {kernel}")
    groups: dict[tuple[str, ...], list[PrunableAxis]] = defaultdict(list)
    for prunable in coupling.prunable:
        groups[tuple(sorted(places[prunable.atom]))].append(prunable)
    return list(groups.values())


def _sums(array: Array, dims: list[int], saliency: Callable[[Array], Array]) -> dict[int, Array]:
    """For each of ``dims``, the sum over all the others, in double precision; one pass, a block that fits a cache at a time."""
    if not dims or array.ndim < 2:
        return {dim: saliency(array).astype(np.float64) for dim in dims}
    table = array.reshape(len(array), math.prod(array.shape[1:]))
    rows, columns = np.empty(len(table)), np.zeros(table.shape[1])
    step = max(1, BLOCK // max(1, table.shape[1]))
    for start in range(0, len(table), step):
        block = saliency(table[start : start + step]).astype(np.float64)
        rows[start : start + step] = block.sum(axis=1)
        columns += block.sum(axis=0)
    rest = columns.reshape(array.shape[1:])
    others = {dim: tuple(k for k in range(rest.ndim) if k != dim - 1) for dim in dims}
    return {dim: rest.sum(axis=others[dim]) if dim else rows for dim in dims}


def share_out(axis: Axis, sums: Array, ids: Mapping[Axis, int], scores: ByAxis) -> None:
    """Add the per-index sums of a dim to the atoms below its axis (``ids``: of those that count)."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        if axis in ids:
            scores[ids[axis]] = scores[ids[axis]] + sums
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
