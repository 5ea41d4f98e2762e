"""What it costs to remove each index, if everything that read it is refitted: the optimal brain surgeon, a group at a time.

For every layer that sums over an axis, the Gram matrix of its inputs on calibration images says how well the indices that stay can stand in
for one that goes. Indices go one after the other, the cheapest first, each time with the layer's other weights refitted; where several
layers read the axis, their errors add up, each relative to its response. How much such an error matters differs from axis to axis, so it is
measured: the model's outputs, with the refitted weights in place, on images that were not fitted to. No labels are needed.
Hassibi and Stork, Second Order Derivatives for Network Pruning, NIPS 1992; for groups and layer by layer: Frantar and Alistarh, Optimal
Brain Compression, NeurIPS 2022; Kurtic et al., ZipLM, NeurIPS 2023.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coppice.axes import Axis, atoms
from coppice.coupling import Coupling, Mask, PrunableAxis, keep_mask
from coppice.graph import Kind
from coppice.mending import TEMPERATURE
from coppice.saliency import per_index
from coppice.torch.layers import Layer, find_layers
from coppice.torch.program import Program, coupled_on, is_held_out, of_one_shape
from coppice.torch.trees import named_tensors

RIDGE = 1e-3  # relative to the mean of the Gram matrix's diagonal
SCARCITY = 0.1  # and as much more as there are features for a sample
SAMPLES_A_FEATURE = 16
MOST_SAMPLES = 16384
LARGEST = 4608  # features whose Gram matrix is kept whole; of more, diagonal blocks
BLOCKS = 96  # groups that go at a time are a BLOCKSth of all: beyond that the path hardly changes and the time does
LEVELS = (0.25, 0.5, 0.75)  # shares of an axis removed at which the loss is measured
JUDGING = 128  # images, at most, that losses are measured on: every axis and level is one more pass of them all

Array = NDArray[np.float64]
Tensors = Mapping[str, Tensor]


@dataclass(slots=True)
class Removal:
    """An axis on its way down: ``order`` of the indices as they go, the error ``added`` by each; what a level's model has in other tensors.

    ``first`` is the first op that reads one of those tensors.
    """

    first: int
    order: list[int]
    added: list[float]
    edits: dict[int, dict[str, Tensor]]


@dataclass(slots=True)
class _Reader:
    """A layer that sums over an axis: Gram matrix (G, F, F), means (G, F) and weight (G, O, F), in double precision.

    ``energy`` is its response's variance; ``places[g][index]`` are the features of group ``g`` that go with an index of the axis.
    """

    layer: Layer
    gram: Tensor
    mean: Tensor
    weight: Tensor
    energy: float
    places: list[list[Tensor]]


def removal_losses(
    model: nn.Module, coupling: Coupling, batches: Iterable[Tensor], seed: int = 0, orders: Mapping[int, Sequence[int]] | None = None
) -> dict[int, Array]:
    """Axis id -> for each index the loss that its removal adds, along the axis's path: a divergence from the model's own outputs.

    ``batches`` are model inputs; ``orders`` are paths that some other criterion has chosen (axis id -> indices, the first to go first).
    CoppiceError where there are no batches.
    """
    same = of_one_shape(batches)
    judge = [batch for k, batch in enumerate(same) if is_held_out(k)] or same
    judge = judge[: max(1, JUDGING // len(same[0]))]
    fit = [batch for k, batch in enumerate(same) if not is_held_out(k)]
    here = coupled_on(model, coupling, same[0])
    ids = {axis.name: axis.id for axis in here.prunable}
    given = None if orders is None else {ids[axis.name]: orders[axis.id] for axis in coupling.prunable}
    losses = _measure(model, removal_paths(model, here, fit, seed, given), judge)
    return {axis.id: losses[ids[axis.name]] for axis in coupling.prunable}


def removal_paths(
    model: nn.Module, coupling: Coupling, batches: Sequence[Tensor], seed: int = 0, orders: Mapping[int, Sequence[int]] | None = None
) -> dict[int, Removal]:
    """The path of every prunable axis by axis id; of one that no layer with a weight sums over, by the norm of its weights.

    ``coupling`` is of a recording on such batches (:func:`coupled_on`).
    """
    program = Program(model, batches)
    readers = _find_readers(program, coupling, seed)
    tensors = named_tensors(model)
    unread = [axis for axis in coupling.prunable if not readers[axis.atom]]
    norms = per_index(coupling, {name: t.detach().square().numpy() for name, t in model.named_parameters()}) if unread else {}
    return {
        axis.id: _remove_all(axis.width, readers[axis.atom], tensors, (orders or {}).get(axis.id))
        if readers[axis.atom]
        else _zero_all(axis, coupling, program, norms[axis.id], (orders or {}).get(axis.id))
        for axis in coupling.prunable
    }


def _find_readers(program: Program, coupling: Coupling, seed: int) -> dict[Axis, list[_Reader]]:
    """The layers that sum over each prunable atom; a layer that sums over several has one Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    readers: dict[Axis, list[_Reader]] = {axis.atom: [] for axis in coupling.prunable}
    for layer in find_layers(program):
        read = [a for a in _summed(layer, coupling) if a in readers]
        if read:
            program.advance(layer.index)
            gram, mean, energy, weight = _gram(program, layer, generator)
            for atom in read:
                readers[atom].append(_Reader(layer, gram, mean, weight, energy, _places(layer, coupling, atom, gram.shape[:2])))
    return readers


class Refitter:
    """Refits of what reads an axis, for any choice of what stays of it, from one Gram matrix a layer on ``batches`` (model inputs).

    ``coupling`` is of a recording on such batches (:func:`coupled_on`).
    """

    def __init__(self, model: nn.Module, coupling: Coupling, batches: Sequence[Tensor], seed: int = 0) -> None:
        self._coupling, self._tensors = coupling, named_tensors(model)
        self._readers = _find_readers(Program(model, batches), coupling, seed)

    def refitted(self, keep: Mapping[str, Mask]) -> dict[str, Tensor]:
        """The dense model's tensors that change where the axes of these names keep these indices: zero where what goes was read."""
        masks = {axis.atom: keep[axis.name] for axis in self._coupling.prunable if axis.name in keep}
        found: dict[str, Tensor] = {}
        for reader in {r.layer.index: r for atom in masks for r in self._readers[atom]}.values():
            shape = reader.gram.shape[:2]
            gone = ~_features(reader.layer, self._coupling, masks).reshape(shape[0], -1)
            at_once = replace(reader, places=[[torch.from_numpy(np.flatnonzero(part))] for part in gone])
            states = [_State(at_once, group) for group in range(shape[0])]
            for state in states:
                state.remove([0])
            found.update(_edits([at_once], states, self._tensors))
        return found


def _measure(model: nn.Module, paths: Mapping[int, Removal], batches: Sequence[Tensor]) -> dict[int, Array]:
    """The loss that each index adds along its path: measured at each level for each axis alone, between them as the path's errors go."""
    model = copy.deepcopy(model).eval()
    tensors = named_tensors(model)
    program = Program(model, batches)
    program.advance(0)
    dense = torch.cat(program.finish())
    found = {}
    for axis, path in sorted(paths.items(), key=lambda item: item[1].first):
        program.advance(path.first, program.active)
        measured = {}
        for level, edits in path.edits.items():
            before = {name: tensors[name].detach().clone() for name in edits}
            _write(tensors, edits)
            measured[level] = float(divergence(torch.cat(program.finish()), dense))
            _write(tensors, before)
        found[axis] = _losses(path, measured)
    return found


def divergence(outputs: Tensor, dense: Tensor) -> Tensor:
    """How far ``outputs`` are from the dense ones: KL of softened class probabilities for rows of scores, else relative squared error."""
    if dense.dim() != 2:
        return (outputs - dense).square().mean() / dense.var().clamp_min(1e-12)
    p, q = ((z.double() / TEMPERATURE).log_softmax(1) for z in (dense, outputs))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean") * TEMPERATURE**2


@torch.no_grad()
def _write(tensors: Tensors, values: Tensors) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


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


def _zero_all(axis: PrunableAxis, coupling: Coupling, program: Program, norms: Array, given: Sequence[int] | None) -> Removal:
    """The path of an axis that only products of activations sum over (queries with keys): the lowest norms go first, set to zero."""
    order = np.argsort(norms, kind="stable") if given is None else np.asarray(given)
    tensors = named_tensors(program.model)
    values = {v.names[0]: v for v in coupling.graph.weights() if v.kind is Kind.PARAMETER}
    edits: dict[int, dict[str, Tensor]] = {}
    for level in _levels(axis.width):
        stays = np.ones(axis.width, bool)
        stays[order[:level]] = False
        edits[level] = {}
        for name, dim in axis.sites:
            if name in values:
                gone = torch.from_numpy(np.flatnonzero(~keep_mask(coupling.dims[values[name].id][dim], {axis.atom: stays})))
                edits[level][name] = edits[level].get(name, tensors[name].detach()).index_fill(dim, gone, 0)
    touched = {v.id for v in program.values if {name for name, _ in axis.sites} & set(v.names)}
    first = next((k for k, op in enumerate(program.ops) if touched & {*op.inputs, *op.others}), 0)
    return Removal(first, order.tolist(), np.maximum.accumulate(norms[order]).tolist(), edits)


def _levels(width: int) -> list[int]:
    return sorted({max(1, round(width * share)) for share in LEVELS})


def _summed(layer: Layer, coupling: Coupling) -> list[Axis]:
    """The atoms that the layer sums over (the groups of a convolution are none)."""
    letter = coupling.ops[layer.index].letters.get("i" if layer.kernel else "b")
    return [] if letter is None else list(dict.fromkeys(atoms(letter)))


def _places(layer: Layer, coupling: Coupling, atom: Axis, shape: Sequence[int]) -> list[list[Tensor]]:
    """The features of each group of the Gram matrix (groups, features, ...) that go with each index of ``atom``."""
    found: list[list[Tensor]] = [[] for _ in range(shape[0])]
    for index in range(atom.size):
        mask = np.ones(atom.size, bool)
        mask[index] = False
        gone = ~_features(layer, coupling, {atom: mask})
        for g, part in enumerate(gone.reshape(shape[0], -1)):
            found[g].append(torch.from_numpy(np.flatnonzero(part)))
    return found


def _features(layer: Layer, coupling: Coupling, keep: Mapping[Axis, Mask]) -> Mask:
    """Which of the layer's features stay, group after group."""
    dims = coupling.dims[layer.input]
    return np.repeat(keep_mask(dims[1] if layer.kernel else dims[-1], keep), math.prod(layer.kernel))


def _gram(program: Program, layer: Layer, generator: torch.Generator) -> tuple[Tensor, Tensor, float, Tensor]:
    weight = _in_blocks(layer.matrix(named_tensors(program.model)[layer.weight].detach())).double()
    groups, _, features = weight.shape
    total, mean, n = torch.zeros(groups, features, features, dtype=torch.float64), torch.zeros(groups, features, dtype=torch.float64), 0
    shape = program.values[layer.output].shape
    positions = layer.positions(shape)
    for k in range(program.active):
        x = program.value(layer.input, k)
        samples = (x.shape[0] if layer.kernel else 1) * program.active
        rows = min(SAMPLES_A_FEATURE * features, max(MOST_SAMPLES, 4 * features))
        at = torch.randperm(positions, generator=generator)[: max(1, -(-rows // samples))]
        f = _in_blocks(layer.features(x, at, shape[2:]))
        total += f.transpose(1, 2) @ f
        mean += f.sum(1, dtype=torch.float64)
        n += f.shape[1]
    mean = mean / n if layer.can_shift else torch.zeros_like(mean)
    gram = total / n - mean[:, :, None] * mean[:, None]
    energy = float((weight @ gram * weight).sum())
    ridge = (RIDGE + SCARCITY * features / n) * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    return gram + ridge[:, None, None] * torch.eye(features, dtype=torch.float64), mean, energy, weight


def _in_blocks(matrix: Tensor) -> Tensor:
    """(1, rows, features) with too many features as (blocks, rows, features a block): what correlates across blocks is not seen."""
    groups, rows, features = matrix.shape
    if groups > 1 or features <= LARGEST:
        return matrix
    blocks = next(b for b in range(2, features + 1) if features % b == 0 and features // b <= LARGEST)
    return matrix.reshape(rows, blocks, -1).transpose(0, 1)


def _remove_all(width: int, readers: list[_Reader], tensors: Tensors, order: Sequence[int] | None) -> Removal:
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
            path.edits[len(path.order)] = _edits(readers, states, tensors)
    return path


@torch.no_grad()
def _edits(readers: list[_Reader], states: list[_State], tensors: Tensors) -> dict[str, Tensor]:
    """The readers' weights as refitted (zero where removed features were read), and the constants that their results need."""
    found: dict[str, Tensor] = {}
    for reader in readers:
        layer, weight = reader.layer, reader.weight.clone()
        for state in states:
            if state.reader is reader:
                weight[state.group] = state.weight
        shift = ((reader.weight - weight) @ reader.mean[:, :, None])[:, :, 0]
        whole = layer.matrix(tensors[layer.weight])
        if len(weight) != len(whole):  # blocks of one matrix
            weight, shift = weight.transpose(0, 1).reshape(whole.shape), shift.sum(0)
        found[layer.weight] = layer.weight_from(weight, tensors[layer.weight]).to(tensors[layer.weight].dtype)
        found.update(layer.shifted(tensors, shift.flatten()))
    return found


class _State:
    """One group of a reader on its way down: the inverse Gram matrix and the refitted weight of what is left."""

    def __init__(self, reader: _Reader, group: int) -> None:
        self.reader, self.group = reader, group
        self.inverse = torch.linalg.inv(reader.gram[group])
        self.weight = reader.weight[group].clone()
        self.energy = reader.energy or 1.0
        self.places = reader.places[group]

    def added(self, indices: NDArray[np.intp]) -> Array:
        """The relative error that removing each of ``indices``, alone, would add."""
        found = np.zeros(len(indices))
        counts = np.array([len(self.places[k]) for k in indices])
        for count in set(counts.tolist()) - {0}:
            those = np.flatnonzero(counts == count)
            at = torch.stack([self.places[indices[k]] for k in those])
            blocks = torch.linalg.inv(self.inverse[at[:, :, None], at[:, None, :]])
            weights = self.weight[:, at].transpose(0, 1)  # indices, outputs, features
            found[those] = ((weights @ blocks) * weights).sum((1, 2)).numpy() / self.energy
        return found

    def remove(self, indices: Sequence[int]) -> None:
        at = torch.cat([self.places[k] for k in indices])
        if len(at):
            rows = self.inverse[at]
            gain = torch.linalg.solve(rows[:, at], rows)
            self.weight -= self.weight[:, at] @ gain
            self.inverse -= rows.T @ gain
            self.inverse[at, :] = 0
            self.inverse[:, at] = 0
            self.inverse[at, at] = 1
            self.weight[:, at] = 0
