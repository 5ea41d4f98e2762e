"""Repair without labels: refit every layer of the pruned model so that it gives what the dense model's layer gave, first to last.

Ridge least squares on calibration images: the inputs are those of the *pruned* model, repaired so far, so that each layer also mends what
its predecessors got wrong; the goal is the dense model's result at the indices that stay. Where the result goes (through BatchNorm) into a
sum with a shortcut, the goal is the dense *sum* less the pruned shortcut: the residual stream's error is corrected, not passed on.
Reconstruction by least squares: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017; layers one after the
other on the compressed inputs: Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coppice.coupling import Mask
from coppice.linear import Array, Linear, Model
from coppice.stepwise import Stepwise, is_held_out

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
    x: Array
    d: Array
    xx: Array
    xd: Array
    dd: Array
    yy: Array

    @classmethod
    def empty(cls, groups: int, features: int, outputs: int) -> _Sums:
        shapes = ((features,), (outputs,), (features, features), (features, outputs), (outputs,), (outputs,))
        return cls(0, *(np.zeros((groups, *shape)) for shape in shapes))

    def add(self, x: Array, d: Array, y: Array) -> None:
        self.n += x.shape[1]
        self.x += x.sum(1, dtype=np.float64)
        self.d += d.sum(1, dtype=np.float64)
        self.xx += x.swapaxes(1, 2) @ x  # products in the model's precision, sums over batches in double
        self.xd += x.swapaxes(1, 2) @ d
        self.dd += np.square(d).sum(1, dtype=np.float64)
        self.yy += np.square(y - y.mean(1, keepdims=True)).sum(1, dtype=np.float64)

    def moments(self, centred: bool) -> tuple[Array, Array, Array]:
        """Second moments xx, xd, dd a sample, about the means where ``centred``."""
        xx, xd, dd = self.xx / self.n, self.xd / self.n, self.dd / self.n
        if centred:
            x, d = self.x / self.n, self.d / self.n
            xx, xd, dd = xx - x[:, :, None] * x[:, None], xd - x[:, :, None] * d[:, None], dd - np.square(d)
        return xx, xd, dd


@dataclass(frozen=True)
class Refitting:
    """``pruned`` is to give what ``dense`` gives at the indices that stay: ``masks`` of each dim of the results of a layer, by its op.

    ``small``: the pruned model's layers by their weights' names; ``twin``: dense op -> the pruned model's op that does the same.
    """

    dense: Model
    pruned: Model
    small: Mapping[str, Linear]
    twin: Mapping[int, int]
    masks: Mapping[int, list[Mask]]
    rng: np.random.Generator

    def run(self) -> list[Refit]:
        """Refit layer after layer in place, each only where it helps on held-out batches."""
        done = []
        for layer in self.dense.layers:
            small = self.small.get(layer.weight)
            if small is not None and self._matches(layer, small) and small.matrix().shape[2] <= LARGEST:
                done.append(self._refit(layer, small))
        return done

    def _matches(self, layer: Linear, small: Linear) -> bool:
        """Whether the pruned layer gives what the dense one's kept results are: one whose stride grew does not."""
        shape = tuple(int(mask.sum()) for mask in self.masks[layer.index])
        return self.twin.get(layer.index) == small.index and shape == self.pruned.program.values[small.output].shape

    def _refit(self, layer: Linear, small: Linear) -> Refit:
        goal = self._goal(layer, small)
        self.dense.program.advance(goal.ready)
        self.pruned.program.advance(small.index, self.dense.program.active)
        fit, judge = self._sums(small, goal)
        step, before, after = _solve(fit, judge, small.can_shift)
        if step is not None:
            shift = ((fit.d - (fit.x[:, None] @ step)[:, 0]) / fit.n).reshape(-1) if small.can_shift else None
            self.pruned.write(small.changed(small.matrix() + step.swapaxes(1, 2), shift))
        return Refit(layer.weight, before, after)

    def _sums(self, small: Linear, goal: _Goal) -> tuple[_Sums, _Sums]:
        matrix, bias = small.matrix(), small.bias()
        groups, outputs, features = matrix.shape
        sums = _Sums.empty(groups, features, outputs), _Sums.empty(groups, features, outputs)
        rows, count = SAMPLES_A_FEATURE * features, self.dense.program.active
        for k in range(count):
            x, wanted = self.pruned.array(small.input, k), self._wanted(small, goal, k)
            positions = small.positions(wanted.shape)
            take = min(positions, max(1, -(-rows // (small.samples(x) * count))))
            at = self.rng.permutation(positions)[:take]
            f, y = small.features(x, at, wanted.shape), small.responses(wanted, at)
            now = f @ matrix.swapaxes(1, 2)
            if bias is not None:
                now = now + bias.reshape(groups, 1, outputs)
            sums[is_held_out(k)].add(f, y - now, y)
        return sums

    def _goal(self, layer: Linear, small: Linear) -> _Goal:
        """Follow the layer's result through BatchNorm into a sum, as long as nothing else reads it on the way."""
        plain = _Goal(layer.output, layer.index + 1, None, self.masks[layer.index])
        dense, pruned, twin = self.dense.program, self.pruned.program, self.twin
        value = layer.output if layer.normed is None else layer.normed
        use = only_use(dense, value, layer.index)
        if use is None or use not in twin or not self.dense.adds(dense.ops[use]):
            return plain
        if any(layer.index < other.index <= use for other in self.dense.layers):
            return plain
        op, same = dense.ops[use], pruned.ops[twin[use]]
        others = [k for k, v in enumerate(op.inputs) if v != value]
        if len(op.inputs) != 2 or len(others) != 1:
            return plain
        other = same.inputs[others[0]]
        shapes = {dense.values[v].shape for v in (*op.inputs, op.outputs[0]) if v is not None}
        known_before = other is not None and not any(other in o.outputs for o in pruned.ops[small.index :])
        return _Goal(op.outputs[0], use + 1, other, self.masks[layer.index]) if known_before and len(shapes) == 1 else plain

    def _wanted(self, small: Linear, goal: _Goal, batch: int) -> Array:
        """The goal for one batch, of the shape of the pruned layer's result."""
        found = self.dense.array(goal.value, batch)
        for dim, mask in enumerate(goal.masks):
            if not mask.all():
                found = found.take(np.flatnonzero(mask), axis=dim)
        if goal.other is None:
            return found
        found = found - self.pruned.array(goal.other, batch)
        if small.normed is None:
            return found
        shape = [-1 if dim == small.channels % found.ndim else 1 for dim in range(found.ndim)]
        shift, scale = (part.reshape(shape) for part in small.affine())
        return np.asarray((found - shift) / scale)


@dataclass(frozen=True, slots=True)
class _Goal:
    """What a layer should give: the dense value ``value`` (known once op ``ready`` - 1 ran), undone back to the layer's own result.

    With ``other``, the pruned model's value that ``value`` is a sum with. ``masks``: which indices of each dim of ``value`` stay.
    """

    value: int
    ready: int
    other: int | None
    masks: list[Mask]


def only_use(program: Stepwise, value: int, after: int) -> int | None:
    """The one op after op ``after`` that reads ``value``; None where there are several or it is an output of the model."""
    uses = [k for k in range(after + 1, len(program.ops)) if value in program.ops[k].inputs or value in program.ops[k].others]
    if not uses or value in program.outputs or (len(uses) > 1 and value not in program.ops[uses[0]].outputs):
        return None
    return uses[0]  # of an op in place, what reads its operand later reads its result


def _solve(fit: _Sums, judge: _Sums, centred: bool) -> tuple[Array | None, float, float]:
    """The change of the weight (groups, features, outputs) that helps most on held-out images; None where none does."""
    judge = judge if judge.n else fit
    xx, xd, _ = fit.moments(centred)
    test_xx, test_xd, test_dd = judge.moments(centred)
    scale = float((judge.yy / judge.n).sum()) or 1.0
    unchanged = float(judge.dd.sum() / judge.n)  # not centred: a shift is part of the error that a refit mends
    best, chosen = unchanged, None
    mean = np.diagonal(xx, axis1=1, axis2=2).mean(1)
    eye = np.eye(xx.shape[1])
    for ridge in RIDGES:
        step = np.linalg.solve(xx + (ridge * mean + 1e-12)[:, None, None] * eye, xd)
        error = float((test_dd - 2 * (step * test_xd).sum(1) + (step * (test_xx @ step)).sum(1)).sum())
        if error < best:
            best, chosen = error, step
    return chosen, unchanged / scale, best / scale
