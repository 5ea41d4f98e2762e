"""EinsumDense, and the projections of attention, as what they are: a matrix that multiplies rows of features, group by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coppice.graph import Op
from coppice.keras.walk import numbers
from coppice.linear import Array


class Einsum:
    """`coppice.linear.Linear` of an einsum of an input and a weight, by the letters of their dims.

    Letters of input, weight and result are groups; of input and weight, features; of input and result, rows; of weight and result, outputs.
    """

    channels = -1
    normed: int | None = None

    def __init__(self, index: int, op: Op, names: Sequence[str], variables: Mapping[str, Any], rank: int) -> None:
        assert op.inputs[0] is not None
        self.index, self.input, self.output = index, op.inputs[0], op.outputs[0]
        self.weight, self._bias, self._variables = names[0], names[1] if len(names) > 1 else None, variables
        self._left, self._kernel, self._shift, self._result = _letters(op.attrs["line"], rank)
        both = [x for x in self._left if x in self._kernel]
        self._groups, self._features = [x for x in both if x in self._result], [x for x in both if x not in self._result]
        self._rows = [x for x in self._left if x not in both]
        self._outputs = [x for x in self._kernel if x not in both]
        self.summed = tuple(self._left.index(x) for x in (*self._groups, *self._features))

    @property
    def is_linear(self) -> bool:
        """Whether that is all: nothing is summed over by itself or taken from a diagonal, and a bias is one number an output."""
        letters = (self._left, self._kernel, self._result)
        if any(len(set(part)) < len(part) for part in letters) or not {*self._rows, *self._outputs} <= set(self._result):
            return False
        sizes, outputs = self._sizes(), {*self._groups, *self._outputs}
        shift = {} if self._bias is None else dict(zip(self._shift, self._variables[self._bias].shape, strict=True))
        return self._bias is None or (outputs <= set(shift) and all(n == (sizes[x] if x in outputs else 1) for x, n in shift.items()))

    @property
    def can_shift(self) -> bool:
        return self._bias is not None

    def _sizes(self) -> dict[str, int]:
        return dict(zip(self._kernel, self._variables[self.weight].shape, strict=True))

    def _size(self, letters: Sequence[str]) -> int:
        sizes = self._sizes()
        return math.prod(sizes[x] for x in letters)

    def matrix(self) -> Array:
        kernel = _arranged(numbers(self._variables[self.weight]), self._kernel, [*self._groups, *self._outputs, *self._features])
        return kernel.reshape(self._size(self._groups), self._size(self._outputs), self._size(self._features))

    def bias(self) -> Array | None:
        if self._bias is None:
            return None
        sizes, own = self._sizes(), self._own_of_bias()
        array = numbers(self._variables[self._bias]).reshape([sizes[x] for x in own])
        return _arranged(array, own, [*self._groups, *self._outputs]).reshape(-1)

    def _own_of_bias(self) -> list[str]:
        """The letters of the bias, without the dims of one that it is broadcast along."""
        return [x for x in self._shift if x in self._kernel]

    def changed(self, matrix: Array, shift: Array | None) -> dict[str, Array]:
        sizes, outputs = self._sizes(), [*self._groups, *self._outputs]
        order = [*outputs, *self._features]
        found = {self.weight: _arranged(matrix.reshape([sizes[x] for x in order]), order, self._kernel)}
        if shift is not None and self._bias is not None:
            old = numbers(self._variables[self._bias])
            found[self._bias] = old + _arranged(shift.reshape([sizes[x] for x in outputs]), outputs, self._own_of_bias()).reshape(old.shape)
        return found

    def affine(self) -> tuple[Array, Array]:
        raise AssertionError("no normalisation is looked for behind an einsum")

    def positions(self, shape: Sequence[int]) -> int:
        return math.prod(n for x, n in zip(self._result, shape, strict=True) if x in self._rows)

    def samples(self, x: Array) -> int:
        return 1  # rows are positions, whatever they are of

    def features(self, x: Array, at: Array, shape: Sequence[int]) -> Array:
        rows = _arranged(x, self._left, [*self._groups, *self._rows, *self._features])
        return np.ascontiguousarray(rows.reshape(self._size(self._groups), -1, self._size(self._features))[:, at])

    def responses(self, y: Array, at: Array) -> Array:
        rows = _arranged(y, self._result, [*self._groups, *self._rows, *self._outputs])
        return np.ascontiguousarray(rows.reshape(self._size(self._groups), -1, self._size(self._outputs))[:, at])


def _letters(line: str, rank: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """The letters of input, weight, bias and result of a line of `coppice.rules`; an ellipsis is as many more as the result's rank asks."""
    operands, _, result = line.partition("->")
    more = [f"...{k}" for k in range(rank - len(result.split()) + 1)]
    left, kernel, shift, out = (
        [letter for x in part.split() for letter in (more if x == "..." else [x])] for part in (*operands.split(","), result)
    )
    return left, kernel, shift, out


def _arranged(array: Array, letters: Sequence[str], order: Sequence[str]) -> Array:
    """``array``, whose dims have these letters, with its dims in another order."""
    return np.asarray(array.transpose([letters.index(x) for x in order]))
