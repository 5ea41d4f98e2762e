"""Run the recorded ops of a Keras model again along chosen axes at the planned sizes: the oracle of verification.

It runs the *dense* program, never the pruned model: wherever an op sums over an axis, the removed indices are taken out of the sum; where
an op mixes an axis (a norm, a softmax, a mean), that op alone runs on the kept indices and its result is put back with NaN at the removed
ones, so that anything that reads a removed index shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from coppice.axes import Axis, atoms, find
from coppice.coupling import Coupling, Mask, OpDims, keep_mask
from coppice.graph import Kind, Op

Array = NDArray[Any]


class Replay:
    """One run of the dense program with the indices outside ``keep`` (atom -> mask) out of effect.

    ``coupling`` says what each op's dims are; ``ops`` are the same ops recorded on the model whose numbers are to be used, ``weights`` that
    model's, by name.
    """

    def __init__(
        self, coupling: Coupling, ops: Sequence[Op], constants: Mapping[int, Any], weights: Mapping[str, Array], keep: Mapping[Axis, Mask]
    ) -> None:
        self.coupling, self.ops, self.keep = coupling, ops, keep
        self.env: dict[int, Array] = {w.id: weights[w.names[0]] for w in coupling.graph.weights()}
        self.env.update({k: np.asarray(v) for k, v in constants.items()})
        self._ends = self._lifetimes()

    def _lifetimes(self) -> dict[int, list[int]]:
        last = {v: k for k, op in enumerate(self.ops) for v in (*op.inputs, *op.others, *op.outputs) if v is not None}
        ends: dict[int, list[int]] = {}
        for value, k in last.items():
            if value not in self.coupling.graph.outputs and self.coupling.graph.values[value].kind is Kind.INTERMEDIATE:
                ends.setdefault(k, []).append(value)
        return ends

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The graph's outputs."""
        for _ in self.steps(inputs):
            pass
        return self.outputs()

    def outputs(self) -> list[Array]:
        return [self.env[v] for v in self.coupling.graph.outputs]

    def steps(self, inputs: Sequence[Array]) -> Iterator[list[Array]]:
        """Op by op its results, restricted to the kept indices; its operands are in ``env`` until the next step."""
        self.env.update(zip(self.coupling.graph.inputs, inputs, strict=True))
        for k, op in enumerate(self.ops):
            outs = self._step(op, self.coupling.ops[k])
            self.env.update(zip(op.outputs, outs, strict=True))
            yield [self.kept(v, x) for v, x in zip(op.outputs, outs, strict=True)]
            for value in self._ends.get(k, ()):
                self.env.pop(value, None)

    def scale(self, k: int) -> float:
        """The largest number among the operands of op ``k``, which is running."""
        given = [self.env[v] for v in (*self.ops[k].inputs, *self.ops[k].others) if v is not None]
        return max((float(np.nanmax(np.abs(x))) for x in given if x is not None and x.size and x.dtype.kind == "f"), default=0.0)

    def _step(self, op: Op, info: OpDims) -> list[Array]:
        given = [None if v is None else self.env[v] for v in (*op.inputs, *op.others)]
        if any(self._cut(atom) for axis in info.mixes for atom in atoms(axis)):
            ids = (*op.inputs, *op.others)
            small = [None if v is None or x is None else self.kept(v, x) for v, x in zip(ids, given, strict=True)]
            sizes = {letter: int(keep_mask(axis, self.keep).sum()) for letter, axis in info.letters.items()}
            return [self._scatter(v, x) for v, x in zip(op.outputs, self._call(op, small, sizes), strict=True)]
        for k, dim in info.contracted:
            value, array = op.inputs[k], given[k]
            if value is not None and array is not None:
                mask = keep_mask(self.coupling.dims[value][dim], self.keep)
                if not mask.all():
                    given[k] = np.where(mask.reshape([-1 if d == dim else 1 for d in range(array.ndim)]), array, np.zeros((), array.dtype))
        return self._call(op, given, {})

    def _call(self, op: Op, given: Sequence[Array | None], sizes: Mapping[str, int]) -> list[Array]:
        results = op.call([None if x is None else keras.ops.convert_to_tensor(x) for x in given], sizes)
        return [keras.ops.convert_to_numpy(x) for x in (results if isinstance(results, (tuple, list)) else (results,))]

    def _cut(self, atom: Axis) -> bool:
        mask = self.keep.get(find(atom))
        return mask is not None and not mask.all()

    def kept(self, value: int, array: Array) -> Array:
        """``array`` (dense value ``value``) restricted to the indices that stay."""
        for dim, axis in enumerate(self.coupling.dims[value]):
            mask = keep_mask(axis, self.keep)
            if not mask.all():
                array = array.take(np.flatnonzero(mask), axis=dim)
        return array

    def _scatter(self, value: int, small: Array) -> Array:
        dims = self.coupling.dims[value]
        out = np.full([find(a).size for a in dims], np.nan if small.dtype.kind == "f" else 0, small.dtype)
        out[np.ix_(*(np.flatnonzero(keep_mask(a, self.keep)) for a in dims))] = small
        return out
