"""Repair without labels: refit every layer of the pruned model so that it gives what the dense model's layer gave, first to last.

Ridge least squares on calibration images: the inputs are those of the *pruned* model, repaired so far, so that each layer also mends what
its predecessors got wrong; the goal is the dense model's result at the indices that stay. Where the result goes (through BatchNorm) into a
sum with a shortcut, the goal is the dense *sum* less the pruned shortcut: the residual stream's error is corrected, not passed on.
Reconstruction by least squares: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017; layers one after the
other on the compressed inputs: Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import torch
from torch import Tensor, nn

from coppice.coupling import Coupling, Mask, keep_mask
from coppice.errors import CoppiceError
from coppice.graph import Op
from coppice.planning import Plan, masks_by_atom
from coppice.torch.apply import masks_of, sliced
from coppice.torch.aten import base_name
from coppice.torch.layers import Layer, Norm, find_layers, only_use
from coppice.torch.lockstep import COPIES
from coppice.torch.program import Program, coupled_on, is_held_out, of_one_shape
from coppice.torch.trees import named_tensors

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # tried on held-out images, relative to the mean of the Gram matrix's diagonal
SAMPLES_A_FEATURE = 24  # rows of the least-squares problem for each of its unknowns, where there are that many
LARGEST = 6144  # features of a layer whose normal equations are worth solving


@dataclass(frozen=True, slots=True)
class Refit:
    """What was done to one layer: held-out squared error relative to the response's variance, before and after (equal: left as it was)."""

    weight: str
    before: float
    after: float


@dataclass(slots=True)
class _Sums:
    """Running sums of a least-squares problem: n, sums, and second moments of features ``x`` and residuals ``d``, by group."""

    n: int
    x: Tensor
    d: Tensor
    xx: Tensor
    xd: Tensor
    dd: Tensor
    yy: Tensor

    @classmethod
    def empty(cls, groups: int, features: int, outputs: int) -> _Sums:
        shapes = ((features,), (outputs,), (features, features), (features, outputs), (outputs,), (outputs,))
        return cls(0, *(torch.zeros(groups, *shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: Tensor, d: Tensor, y: Tensor) -> None:
        self.n += x.shape[1]
        self.x += x.sum(1, dtype=torch.float64)
        self.d += d.sum(1, dtype=torch.float64)
        self.xx += x.transpose(1, 2) @ x  # products in the model's precision, sums over batches in double
        self.xd += x.transpose(1, 2) @ d
        self.dd += d.square().sum(1, dtype=torch.float64)
        self.yy += (y - y.mean(1, keepdim=True)).square().sum(1, dtype=torch.float64)

    def moments(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments xx, xd, dd a sample, about the means where ``centred``."""
        xx, xd, dd = self.xx / self.n, self.xd / self.n, self.dd / self.n
        if centred:
            x, d = self.x / self.n, self.d / self.n
            xx, xd, dd = xx - x[:, :, None] * x[:, None], xd - x[:, :, None] * d[:, None], dd - d.square()
        return xx, xd, dd


def repair(dense: nn.Module, pruned: nn.Module, coupling: Coupling, plan: Plan, batches: Iterable[Tensor], seed: int = 0) -> list[Refit]:
    """Refit the layers of ``pruned`` in place on ``batches`` (model inputs, no labels), each only where it helps on held-out batches.

    ``plan`` is what made ``pruned`` from ``dense``, ``coupling`` is ``dense``'s. A layer with more than LARGEST inputs, or a weight that is
    read twice, is left as it is. CoppiceError where there are no batches, or the two models don't run the same ops.
    """
    same = of_one_shape(batches)
    return _Repair(dense, pruned, coupling, plan, same, seed).run()


class _Repair:
    def __init__(self, dense: nn.Module, pruned: nn.Module, coupling: Coupling, plan: Plan, batches: Sequence[Tensor], seed: int) -> None:
        self.dense, self.pruned = Program(dense, batches), Program(pruned, batches)
        self.layers = find_layers(self.dense)
        self.sliced = {layer.weight: layer for layer in find_layers(self.pruned) if plan.stays(layer.weight)}
        if plan.removed is None and plan.then is None:
            coupling = coupled_on(dense, coupling, batches[0])
            keep = masks_by_atom(coupling, plan)
            kept = {layer: [keep_mask(axis, keep) for axis in coupling.dims[layer.output]] for layer in self.layers}
            self.twin = _twins(self.dense.ops, self.pruned.ops)
        else:
            changed = masks_of(dense, plan)
            kept = {layer: _of_results(layer, changed.get(layer.weight), self.dense.values[layer.output].shape) for layer in self.layers}
            self.twin = _likely_twins(self.dense.ops, self.pruned.ops)
        self.masks = kept
        self.tensors = named_tensors(pruned)
        self.generator = torch.Generator().manual_seed(seed)

    def run(self) -> list[Refit]:
        done = []
        for layer in self.layers:
            small = self.sliced.get(layer.weight)
            if small is not None and self._matches(layer, small) and math.prod(self.tensors[small.weight].shape[1:]) <= LARGEST:
                done.append(self._refit(layer, small))
        return done

    def _matches(self, layer: Layer, small: Layer) -> bool:
        """Whether the pruned layer gives what the dense one's kept results are: one whose stride grew does not."""
        shape = tuple(int(mask.sum()) for mask in self.masks[layer])
        return self.twin.get(layer.index) == small.index and shape == self.pruned.values[small.output].shape

    def _refit(self, layer: Layer, small: Layer) -> Refit:
        others = {other.index for other in self.layers}
        goal = _Goal.find(layer, self.dense, self.pruned, self.twin, others, self.masks[layer])
        self.dense.advance(goal.ready)
        self.pruned.advance(small.index, self.dense.active)
        fit, judge = self._sums(layer, small, goal)
        weight = self.tensors[small.weight]
        centred = small.can_shift
        step, before, after = _solve(fit, judge, centred)
        if step is not None:
            with torch.no_grad():
                matrix = small.matrix(weight.detach()).double() + step.transpose(1, 2)
                weight.copy_(small.weight_from(matrix, weight).to(weight.dtype))
                if centred:
                    shift = ((fit.d - (fit.x[:, None] @ step)[:, 0]) / fit.n).flatten()
                    for name, value in small.shifted(self.tensors, shift).items():
                        self.tensors[name].copy_(value)
        return Refit(layer.weight, before, after)

    def _sums(self, layer: Layer, small: Layer, goal: _Goal) -> tuple[_Sums, _Sums]:
        bias = None if small.bias is None else self.tensors[small.bias].detach()
        matrix = small.matrix(self.tensors[small.weight].detach())
        groups, outputs, features = matrix.shape
        sums = _Sums.empty(groups, features, outputs), _Sums.empty(groups, features, outputs)
        rows, count = SAMPLES_A_FEATURE * features, self.dense.active
        for k in range(count):
            x = self.pruned.value(small.input, k)
            goal_y = goal.of(self, k)
            positions = small.positions(goal_y.shape)
            samples = x.shape[0] if small.kernel else 1
            take = min(positions, max(1, -(-rows // (samples * count))))
            at = torch.randperm(positions, generator=self.generator)[:take]
            f = small.features(x, at, goal_y.shape[2:])
            y = small.responses(goal_y, at)
            now = f @ matrix.transpose(1, 2)
            if bias is not None:
                now = now + bias.view(groups, 1, outputs)
            sums[is_held_out(k)].add(f, y - now, y)
        return sums


def _solve(fit: _Sums, judge: _Sums, centred: bool) -> tuple[Tensor | None, float, float]:
    """The change of the weight (groups, features, outputs) that helps most on held-out images; None where none does."""
    judge = judge if judge.n else fit
    xx, xd, _ = fit.moments(centred)
    test_xx, test_xd, test_dd = judge.moments(centred)
    scale = float((judge.yy / judge.n).sum()) or 1.0
    unchanged = float(judge.dd.sum() / judge.n)  # not centred: a shift is part of the error that a refit mends
    best, chosen = unchanged, None
    mean = xx.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(xx.shape[1], dtype=xx.dtype)
    for ridge in RIDGES:
        step = torch.linalg.solve(xx + (ridge * mean + 1e-12)[:, None, None] * eye, xd)
        error = float((test_dd - 2 * (step * test_xd).sum(1) + (step * (test_xx @ step)).sum(1)).sum())
        if error < best:
            best, chosen = error, step
    return chosen, unchanged / scale, best / scale


@dataclass(frozen=True, slots=True)
class _Goal:
    """What a layer should give: the dense value ``value`` (known once op ``ready`` - 1 ran), undone back to the layer's own result.

    With ``other``, the pruned model's value that ``value`` is a sum with; ``norm`` is the BatchNorm right after the layer.
    """

    value: int
    ready: int
    norm: Norm | None
    other: int | None
    masks: list[Mask]  # which indices of each dim of ``value`` stay

    @classmethod
    def find(cls, layer: Layer, dense: Program, pruned: Program, twin: Mapping[int, int], layers: set[int], masks: list[Mask]) -> _Goal:
        """Follow the layer's result through BatchNorm into a sum, as long as nothing else reads it on the way."""
        plain = cls(layer.output, layer.index + 1, layer.norm, None, masks)
        value = layer.output if layer.norm is None else layer.norm.output
        use = only_use(dense, value, layer.index)
        if use is None or use not in twin or base_name(dense.ops[use].call.func) != "add" or any(layer.index < j <= use for j in layers):
            return plain
        op, small = dense.ops[use], pruned.ops[twin[use]]
        others = [k for k, v in enumerate(op.inputs) if v != value]
        if len(op.inputs) != 2 or len(others) != 1 or op.call.kwargs.get("alpha", 1) != 1 or len(op.call.args) > 2:
            return plain
        other = small.inputs[others[0]]
        shapes = {dense.values[v].shape for v in (*op.inputs, op.outputs[0]) if v is not None}
        known_before = other is not None and not any(other in o.outputs for o in pruned.ops[twin[layer.index] :])
        return cls(op.outputs[0], use + 1, layer.norm, other, masks) if known_before and len(shapes) == 1 else plain

    def of(self, work: _Repair, batch: int) -> Tensor:
        """The goal for one batch, of the shape of the pruned layer's result."""
        tensor = sliced(work.dense.value(self.value, batch), self.masks)
        if self.other is None:
            return tensor
        return self._before_norm(tensor - work.pruned.value(self.other, batch), work)

    def _before_norm(self, tensor: Tensor, work: _Repair) -> Tensor:
        if self.norm is None:
            return tensor
        shift, scale = self.norm.affine(work.tensors)
        shape = [1, -1] + [1] * (tensor.dim() - 2)
        return (tensor - shift.view(shape)) / scale.view(shape)


def _of_results(layer: Layer, weight: list[Mask] | None, shape: Sequence[int]) -> list[Mask]:
    """Which indices of each dim of a layer's results stay, given those of its weight."""
    masks = [np.ones(size, bool) for size in shape]
    if weight is not None:
        if layer.kernel:
            masks[1] = weight[0]
        else:
            masks[-1] = weight[0 if layer.transposed else 1]
    return masks


def _likely_twins(dense: Sequence[Op], pruned: Sequence[Op]) -> dict[int, int]:
    """The same where modules are gone: ops are paired in order, by the module that they run in; a wrong pair only makes a worse goal."""
    left, right = ([k for k, op in enumerate(ops) if base_name(op.call.func) not in COPIES] for ops in (dense, pruned))
    ours, theirs = [[(ops[k].module, ops[k].rule) for k in some] for ops, some in ((dense, left), (pruned, right))]
    blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    return {left[b.a + k]: right[b.b + k] for b in blocks for k in range(b.size)}


def _twins(dense: Sequence[Op], pruned: Sequence[Op]) -> dict[int, int]:
    """Dense op -> the op of the pruned model's recording that does the same; copies are left out. CoppiceError if they differ."""
    left, right = ([k for k, op in enumerate(ops) if base_name(op.call.func) not in COPIES] for ops in (dense, pruned))
    if [dense[k].rule for k in left] != [pruned[k].rule for k in right]:
        raise CoppiceError("the pruned model runs other ops than the dense one; repair needs them in step")
    return dict(zip(left, right, strict=True))
