"""What it costs to remove each index, if everything that read it is refitted: the optimal brain surgeon, a group at a time.

For every layer that sums over an axis, the Gram matrix of its inputs on calibration images says how well the indices that stay can stand in
for one that goes. Indices go one after the other, the cheapest first, each time with the layer's other weights refitted; where several
layers read the axis, their errors add up, each relative to its response. How much such an error matters differs from axis to axis, so it is
measured: the model's outputs, with the refitted weights in place, on images that were not fitted to. No labels are needed.
Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; for groups and layer by layer: Frantar and Alistarh, Optimal
Brain Compression, NeurIPS 2022; Kurtic et al., ZipLM, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.axes import Axis, atoms
from coppice.coupling import Coupling, Mask, PrunableAxis, keep_mask
from coppice.graph import Kind
from coppice.linear import Array, Linear, Model
from coppice.mending import divergence
from coppice.saliency import per_index
from coppice.stepwise import is_held_out

RIDGE = 1e-3  # relative to the mean of the Gram matrix's diagonal
SCARCITY = 0.1  # and as much more as there are features for a sample
SAMPLES_A_FEATURE = 16
MOST_SAMPLES = 16384
LARGEST = 4608  # features whose Gram matrix is kept whole; of more, diagonal blocks
BLOCKS = 96  # groups that go at a time are a BLOCKSth of all: beyond that the path hardly changes and the time does
LEVELS = (0.25, 0.5, 0.75)  # shares of an axis removed at which the loss is measured
JUDGING = 128  # images, at most, that losses are measured on: every axis and level is one more pass of them all

Edits = dict[str, Array]
Draw = Callable[[int], NDArray[np.intp]]
"""So many numbers from 0 on, in an order drawn at random: by the framework's own generator, so that its results can be had again."""


@dataclass(slots=True)
class Removal:
    """An axis on its way down: ``order`` of the indices as they go, the error ``added`` by each; what a level's model has in other tensors.

    ``first`` is the first op that reads one of those tensors.
    """

    first: int
    order: list[int]
    added: list[float]
    edits: dict[int, Edits]


@dataclass(slots=True)
class _Reader:
    """A layer that sums over an axis: Gram matrix (G, F, F), means (G, F) and weight (G, O, F), in double precision.

    ``energy`` is its response's variance; ``places[g][index]`` are the features of group ``g`` that go with an index of the axis.
    """

    layer: Linear
    gram: Array
    mean: Array
    weight: Array
    energy: float
    places: list[list[NDArray[np.intp]]]


def removal_losses(
    recorded: Callable[[Sequence[Any]], Model],
    here: Coupling,
    coupling: Coupling,
    batches: Sequence[Any],
    draw: Draw,
    orders: Mapping[int, Sequence[int]] | None = None,
) -> dict[int, Array]:
    """Axis id -> for each index the loss that its removal adds, along the axis's path: a divergence from the model's own outputs.

    ``recorded`` runs the model on some of ``batches`` (inputs of one shape); it is written to, and put back. ``here`` is its coupling on
    such batches, ``coupling`` the one whose ids count. ``orders`` are paths that some other criterion has chosen (axis id -> indices, the
    first to go first).
    """
    judge = [batch for k, batch in enumerate(batches) if is_held_out(k)] or batches
    judge = judge[: max(1, JUDGING // len(batches[0]))]
    fit = [batch for k, batch in enumerate(batches) if not is_held_out(k)]
    ids = {axis.name: axis.id for axis in here.prunable}
    given = None if orders is None else {ids[axis.name]: orders[axis.id] for axis in coupling.prunable}
    losses = _measure(recorded(judge), removal_paths(recorded(fit), here, draw, given))
    return {axis.id: losses[ids[axis.name]] for axis in coupling.prunable}


def removal_paths(model: Model, coupling: Coupling, draw: Draw, orders: Mapping[int, Sequence[int]] | None = None) -> dict[int, Removal]:
    """The path of every prunable axis by axis id; of one that no layer with a weight sums over, by the norm of its weights."""
    readers = _find_readers(model, coupling, draw)
    unread = [axis for axis in coupling.prunable if not readers[axis.atom]]
    parameters = {v.names[0] for v in coupling.graph.weights() if v.kind is Kind.PARAMETER and unread}
    norms = per_index(coupling, {name: model.tensor(name) for name in parameters}, saliency=np.square)
    return {
        axis.id: _remove_all(axis.width, readers[axis.atom], (orders or {}).get(axis.id))
        if readers[axis.atom]
        else _zero_all(axis, coupling, model, norms[axis.id], (orders or {}).get(axis.id))
        for axis in coupling.prunable
    }


def _find_readers(model: Model, coupling: Coupling, draw: Draw) -> dict[Axis, list[_Reader]]:
    """The layers that sum over each prunable atom; a layer that sums over several has one Gram matrix."""
    readers: dict[Axis, list[_Reader]] = {axis.atom: [] for axis in coupling.prunable}
    for layer in model.layers:
        read = [a for a in _summed(layer, coupling) if a in readers]
        if read:
            model.program.advance(layer.index)
            gram, mean, energy, weight = _gram(model, layer, draw)
            for atom in read:
                readers[atom].append(_Reader(layer, gram, mean, weight, energy, _places(layer, coupling, atom, gram.shape[:2])))
    return readers


class Refitter:
    """Refits of what reads an axis, for any choice of what stays of it, from one Gram matrix a layer."""

    def __init__(self, model: Model, coupling: Coupling, draw: Draw) -> None:
        self._coupling = coupling
        self._readers = _find_readers(model, coupling, draw)

    def refitted(self, keep: Mapping[str, Mask]) -> Edits:
        """The dense model's tensors that change where the axes of these names keep these indices: zero where what goes was read."""
        masks = {axis.atom: keep[axis.name] for axis in self._coupling.prunable if axis.name in keep}
        found: Edits = {}
        for reader in {r.layer.index: r for atom in masks for r in self._readers[atom]}.values():
            shape = reader.gram.shape[:2]
            gone = ~_features(reader.layer, self._coupling, masks, shape)
            at_once = replace(reader, places=[[np.flatnonzero(part)] for part in gone])
            states = [_State(at_once, group) for group in range(shape[0])]
            for state in states:
                state.remove([0])
            found.update(_edits([at_once], states))
        return found


def _measure(model: Model, paths: Mapping[int, Removal]) -> dict[int, Array]:
    """The loss that each index adds along its path: measured at each level for each axis alone, between them as the path's errors go."""
    program = model.program
    program.advance(0)
    dense = model.answers()
    found = {}
    for axis, path in sorted(paths.items(), key=lambda item: item[1].first):
        program.advance(path.first, program.active)
        measured = {}
        for level, edits in path.edits.items():
            before = {name: model.tensor(name) for name in edits}
            model.write(edits)
            measured[level] = divergence(model.answers(), dense)
            model.write(before)
        found[axis] = _losses(path, measured)
    return found


def _losses(path: Removal, measured: Mapping[int, float]) -> Array:
    """The loss that each index adds, by index; rising along the path. Between levels the loss is a power of the path's own error."""
    errors = np.log(np.maximum(np.cumsum(path.added), 1e-12))
    levels = sorted(measured)
    loss = np.log(np.maximum.accumulate([max(measured[level], 1e-9) for level in levels]))
    at = errors[[level - 1 for level in levels]]
    curve = np.interp(errors, at, loss) + np.minimum(errors - at[0], 0) + np.maximum(errors - at[-1], 0)  # outside: in proportion
    scores = np.zeros(len(path.order))
    rising = np.maximum.accumulate(np.diff(np.exp(curve), prepend=0.0))
    scores[path.order] = rising * (1 + 1e-6 * np.arange(len(rising))) + 1e-12 * np.arange(len(rising))  # no ties: sorting gives the path
    return scores


def _zero_all(axis: PrunableAxis, coupling: Coupling, model: Model, norms: Array, given: Sequence[int] | None) -> Removal:
    """The path of an axis that only products of activations sum over (queries with keys): the lowest norms go first, set to zero."""
    order = np.argsort(norms, kind="stable") if given is None else np.asarray(given)
    program = model.program
    values = {v.names[0]: v for v in coupling.graph.weights() if v.kind is Kind.PARAMETER}
    edits: dict[int, Edits] = {}
    for level in _levels(axis.width):
        stays = np.ones(axis.width, bool)
        stays[order[:level]] = False
        edits[level] = {}
        for name, dim in axis.sites:
            if name in values:
                array = edits[level].setdefault(name, model.tensor(name))
                array.swapaxes(0, dim)[~keep_mask(coupling.dims[values[name].id][dim], {axis.atom: stays})] = 0
    touched = {v.id for v in program.values if {name for name, _ in axis.sites} & set(v.names)}
    first = next((k for k, op in enumerate(program.ops) if touched & {*op.inputs, *op.others}), 0)
    return Removal(first, order.tolist(), np.maximum.accumulate(norms[order]).tolist(), edits)


def _levels(width: int) -> list[int]:
    return sorted({max(1, round(width * share)) for share in LEVELS})


def _summed(layer: Linear, coupling: Coupling) -> list[Axis]:
    """The atoms that the layer sums over (the groups of a convolution are none)."""
    weight = coupling.graph.ops[layer.index].inputs[1]
    assert weight is not None
    dims = [dim for operand, dim in coupling.ops[layer.index].contracted if operand == 1]
    return list(dict.fromkeys(atom for dim in dims for atom in atoms(coupling.dims[weight][dim])))


def _places(layer: Linear, coupling: Coupling, atom: Axis, shape: Sequence[int]) -> list[list[NDArray[np.intp]]]:
    """The features of each group of the Gram matrix (groups, features, ...) that go with each index of ``atom``."""
    found: list[list[NDArray[np.intp]]] = [[] for _ in range(shape[0])]
    for index in range(atom.size):
        mask = np.ones(atom.size, bool)
        mask[index] = False
        for g, stays in enumerate(_features(layer, coupling, {atom: mask}, shape)):
            found[g].append(np.flatnonzero(~stays))
    return found


def _features(layer: Linear, coupling: Coupling, keep: Mapping[Axis, Mask], shape: Sequence[int]) -> Mask:
    """Which features of the layer stay, in the shape (groups, features) of its Gram matrix."""
    dims = [keep_mask(coupling.dims[layer.input][dim], keep) for dim in layer.summed]
    stays = reduce(lambda a, b: np.logical_and.outer(a, b).reshape(-1), dims)
    return np.repeat(stays, shape[0] * shape[1] // len(stays)).reshape(shape)


def _gram(model: Model, layer: Linear, draw: Draw) -> tuple[Array, Array, float, Array]:
    program, weight = model.program, _in_blocks(layer.matrix()).astype(np.float64)
    groups, _, features = weight.shape
    total, mean, n = np.zeros((groups, features, features)), np.zeros((groups, features)), 0
    shape = program.values[layer.output].shape
    positions = layer.positions(shape)
    for k in range(program.active):
        x = model.array(layer.input, k)
        rows = min(SAMPLES_A_FEATURE * features, max(MOST_SAMPLES, 4 * features))
        at = draw(positions)[: max(1, -(-rows // (layer.samples(x) * program.active)))]
        f = _in_blocks(layer.features(x, at, shape))
        total += f.swapaxes(1, 2) @ f  # in the model's precision, sums over batches in double
        mean += f.sum(1, dtype=np.float64)
        n += f.shape[1]
    mean = mean / n if layer.can_shift else np.zeros_like(mean)
    gram = total / n - mean[:, :, None] * mean[:, None]
    energy = float((weight @ gram * weight).sum())
    ridge = (RIDGE + SCARCITY * features / n) * np.diagonal(gram, axis1=1, axis2=2).mean(1) + 1e-12
    return gram + ridge[:, None, None] * np.eye(features), mean, energy, weight


def _in_blocks(matrix: Array) -> Array:
    """(1, rows, features) with too many features as (blocks, rows, features a block): what correlates across blocks is not seen."""
    groups, rows, features = matrix.shape
    if groups > 1 or features <= LARGEST:
        return matrix
    blocks = next(b for b in range(2, features + 1) if features % b == 0 and features // b <= LARGEST)
    return np.asarray(matrix.reshape(rows, blocks, -1).swapaxes(0, 1))


def _remove_all(width: int, readers: list[_Reader], order: Sequence[int] | None) -> Removal:
    states = [_State(r, g) for r in readers for g in range(len(r.gram)) if any(len(p) for p in r.places[g])]
    path, left, floor = Removal(min(r.layer.index for r in readers), [], [], {}), np.ones(width, bool), 0.0
    step, levels = max(1, width // BLOCKS), _levels(width)
    while left.any():
        gone = len(path.order)
        where = np.flatnonzero(left) if order is None else np.asarray(order[gone : gone + step])
        added = np.sum([state.added(where) for state in states], axis=0)
        chosen = np.argsort(added, kind="stable")[:step] if order is None else np.arange(len(where))
        for k in chosen:
            floor = max(floor, float(added[k]))
            path.order.append(int(where[k]))
            path.added.append(floor)
            left[where[k]] = False
        for state in states:
            state.remove([int(where[k]) for k in chosen])
        if levels and len(path.order) >= levels[0]:
            levels = [level for level in levels if level > len(path.order)]
            path.edits[len(path.order)] = _edits(readers, states)
    return path


def _edits(readers: list[_Reader], states: list[_State]) -> Edits:
    """The readers' weights as refitted (zero where removed features were read), and the constants that their results need."""
    found: Edits = {}
    for reader in readers:
        layer, weight = reader.layer, reader.weight.copy()
        for state in states:
            if state.reader is reader:
                weight[state.group] = state.weight
        shift = ((reader.weight - weight) @ reader.mean[:, :, None])[:, :, 0]
        whole = layer.matrix().shape
        if len(weight) != whole[0]:  # blocks of one matrix
            weight, shift = weight.swapaxes(0, 1).reshape(whole), shift.sum(0)
        found.update(layer.changed(weight, shift.reshape(-1) if layer.can_shift else None))
    return found


class _State:
    """One group of a reader on its way down: the inverse Gram matrix and the refitted weight of what is left."""

    def __init__(self, reader: _Reader, group: int) -> None:
        self.reader, self.group = reader, group
        self.inverse: Array = np.linalg.inv(reader.gram[group])
        self.weight = reader.weight[group].copy()
        self.energy = reader.energy or 1.0
        self.places = reader.places[group]

    def added(self, indices: NDArray[np.intp]) -> Array:
        """The relative error that removing each of ``indices``, alone, would add."""
        found = np.zeros(len(indices))
        counts = np.array([len(self.places[k]) for k in indices])
        for count in set(counts.tolist()) - {0}:
            those = np.flatnonzero(counts == count)
            at = np.stack([self.places[indices[k]] for k in those])
            blocks = np.linalg.inv(self.inverse[at[:, :, None], at[:, None, :]])
            weights = self.weight[:, at].swapaxes(0, 1)  # indices, outputs, features
            found[those] = ((weights @ blocks) * weights).sum((1, 2)) / self.energy
        return found

    def remove(self, indices: Sequence[int]) -> None:
        at = np.concatenate([self.places[k] for k in indices])
        if len(at):
            rows = self.inverse[at]
            gain = np.linalg.solve(rows[:, at], rows)
            self.weight -= self.weight[:, at] @ gain
            self.inverse -= rows.T @ gain
            self.inverse[at, :] = 0
            self.inverse[:, at] = 0
            self.inverse[at, at] = 1
            self.weight[:, at] = 0
