"""`coppice.linear` of a Keras model: its convolutions and dense layers, whatever the data format, in NumPy's arrays."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from coppice.coupling import Coupling
from coppice.graph import Kind, Op
from coppice.keras.einsum import Einsum
from coppice.keras.heads import activation_of
from coppice.keras.program import Program, coupled_on
from coppice.keras.walk import layers_of, numbers, variables_of
from coppice.linear import Array, Linear
from coppice.refit import only_use
from coppice.stepwise import of_one_shape

CONVOLUTIONS = ("conv_kernel_first", "depthwise_conv")  # rules
_SMALLEST_SCALE = 1e-4  # of a normalisation: below, nothing can be undone


class Recorded:
    """`coppice.linear.Model` of a Keras model that runs on ``batches``."""

    def __init__(self, model: Any, batches: Sequence[Array]) -> None:
        self.program = Program(model, batches)
        self._model, self._variables = model, variables_of(model)
        self.layers = _layers(self.program, model, self._variables)

    def array(self, value: int, batch: int) -> Array:
        return self.program.array(value, batch)

    def adds(self, op: Op) -> bool:
        return op.rule == "pointwise" and op.name == "keras.Add"

    def tensor(self, name: str) -> Array:
        return numbers(self._variables[name])

    def write(self, values: Mapping[str, Array]) -> None:
        for name, value in values.items():
            self._variables[name].assign(value)

    def answers(self) -> Array:
        found = np.concatenate([keras.ops.convert_to_numpy(y) for y in self.program.finish()])
        return np.log(np.maximum(found, 1e-30)) if activation_of(self._model) == "softmax" else found


def recorded(model: Any, coupling: Coupling, batches: Iterable[Any]) -> tuple[Recorded, Coupling]:
    """``model`` on those of ``batches`` (model inputs) that have the first one's shape, and ``coupling`` as it is there.

    CoppiceError where there are no batches.
    """
    same = of_one_shape(np.asarray(x) for x in batches)
    return Recorded(model, same), coupled_on(model, coupling, same[0])


@dataclass(frozen=True, slots=True)
class _Geometry:
    """How a convolution walks over its input; () for a dense layer."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: str = "valid"

    def pads(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Zeros before and after each spatial dim: as TensorFlow counts them, on every backend."""
        found = []
        for size, kernel, stride, dilation in zip(sizes, self.kernel, self.stride, self.dilation, strict=True):
            reach = dilation * (kernel - 1)
            if self.padding == "causal":
                found.append((reach, 0))
            elif self.padding == "same":
                missing = max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
                found.append((missing // 2, missing - missing // 2))
            else:
                found.append((0, 0))
        return found


class _Layer:
    """`coppice.linear.Linear`: op ``index`` of a recording, with its weights and those of the normalisation ``norm`` after it."""

    def __init__(self, index: int, op: Op, names: Sequence[str], variables: Mapping[str, Any], geometry: _Geometry, norm: _Norm | None):
        assert op.inputs[0] is not None
        self.index, self.input, self.output = index, op.inputs[0], op.outputs[0]
        self.weight, self._bias = names[0], names[1] if len(names) > 1 else None
        self.last = bool(op.attrs.get("last", True))
        self.channels = -1 if self.last else 1
        self.summed: tuple[int, ...] = (self.channels,)
        self.normed = None if norm is None else norm.output
        self._variables, self._norm, self._geometry = variables, norm, geometry
        self._depthwise = op.rule == "depthwise_conv"
        self._groups = self._kernel().shape[-2] if self._depthwise else op.attrs.get("sizes", {}).get("g", 1)

    @property
    def can_shift(self) -> bool:
        return self._bias is not None or self._norm is not None

    def _kernel(self) -> Array:
        return numbers(self._variables[self.weight])

    def matrix(self) -> Array:
        kernel = self._kernel()
        inputs = 1 if self._depthwise else kernel.shape[-2]
        places = math.prod(kernel.shape[:-2])
        return np.ascontiguousarray(kernel.reshape(places, inputs, self._groups, -1).transpose(2, 3, 1, 0)).reshape(
            self._groups, -1, inputs * places
        )

    def bias(self) -> Array | None:
        return None if self._bias is None else numbers(self._variables[self._bias])

    def changed(self, matrix: Array, shift: Array | None) -> dict[str, Array]:
        shape = self._kernel().shape
        apart = matrix.reshape(*matrix.shape[:2], -1, math.prod(shape[:-2]))  # groups, outputs, inputs, places
        found = {self.weight: apart.transpose(3, 2, 0, 1).reshape(shape)}
        if shift is not None and self._bias is not None:
            found[self._bias] = numbers(self._variables[self._bias]) + shift
        elif shift is not None and self._norm is not None:
            found[self._norm.mean] = numbers(self._variables[self._norm.mean]) - shift
        return found

    def affine(self) -> tuple[Array, Array]:
        assert self._norm is not None
        return self._norm.affine(self._variables)

    def positions(self, shape: Sequence[int]) -> int:
        return math.prod(self._spatial(shape)) if self._geometry.kernel else math.prod(shape[:-1])

    def samples(self, x: Array) -> int:
        return len(x) if self._geometry.kernel else 1

    def _spatial(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[1:-1] if self.last else shape[2:])

    def features(self, x: Array, at: Array, shape: Sequence[int]) -> Array:
        if not self._geometry.kernel:
            return x.reshape(-1, x.shape[-1])[at][None]
        x = x if self.last else np.moveaxis(x, 1, -1)
        pads = self._geometry.pads(x.shape[1:-1])
        x = np.pad(x, [(0, 0), *pads, (0, 0)]) if any(map(any, pads)) else x
        places = np.unravel_index(at, self._spatial(shape))
        g, n = self._geometry, len(x)
        taps = []
        for tap in itertools.product(*map(range, g.kernel)):
            where = (p * s + k * d for p, s, k, d in zip(places, g.stride, tap, g.dilation, strict=True))
            index: tuple[Any, ...] = (slice(None), *where)
            taps.append(x[index])
        found = np.stack(taps, axis=2).reshape(n * len(at), len(taps), self._groups, -1)  # (n p) k g c
        return np.ascontiguousarray(found.transpose(2, 0, 3, 1)).reshape(self._groups, n * len(at), -1)

    def responses(self, y: Array, at: Array) -> Array:
        y = y if self.last else np.moveaxis(y, 1, -1)
        rows = y.reshape(len(y), -1, y.shape[-1])[:, at] if self._geometry.kernel else y.reshape(-1, y.shape[-1])[at]
        return np.ascontiguousarray(rows.reshape(-1, self._groups, y.shape[-1] // self._groups).transpose(1, 0, 2))


@dataclass(frozen=True, slots=True)
class _Norm:
    """The BatchNormalization right after a layer, by the names of its weights; ``output`` is its result."""

    output: int
    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    epsilon: float

    def affine(self, variables: Mapping[str, Any]) -> tuple[Array, Array]:
        gamma, beta = (None if name is None else numbers(variables[name]) for name in (self.gamma, self.beta))
        scale = 1 / np.sqrt(numbers(variables[self.variance]) + self.epsilon) * (1 if gamma is None else gamma)
        shift = (0 if beta is None else beta) - numbers(variables[self.mean]) * scale
        return shift, np.where(np.abs(scale) < _SMALLEST_SCALE, 1.0, scale).astype(shift.dtype)


def _layers(program: Program, model: Any, variables: Mapping[str, Any]) -> list[Linear]:
    """The layers of a recording whose weights nothing else reads, in order."""
    reads = Counter(v for op in program.ops for v in {*op.inputs, *op.others} if v is not None)
    names = {v.id: v.names[0] for v in program.values if v.kind is Kind.PARAMETER}
    layers = dict(layers_of(model))
    found: list[Linear] = []
    for k, op in enumerate(program.ops):
        weights = [v for v in op.inputs[1:3] if v is not None]
        known = op.rule in (*CONVOLUTIONS, "dense", "einsum") and weights and op.inputs[0] is not None and op.module in layers
        if not (known and all(v in names and reads[v] == 1 for v in weights)):
            continue
        if not (reads[op.outputs[0]] or op.outputs[0] in program.outputs):
            continue
        own = [names[v] for v in weights]
        if op.rule == "einsum":
            layer = Einsum(k, op, own, variables, len(program.values[op.outputs[0]].shape))
            found += [layer] if layer.is_linear else []
            continue
        use = only_use(program, op.outputs[0], k)
        norm = None if use is None else _norm(program.ops[use], program, layers)
        found.append(_Layer(k, op, own, variables, _geometry(op, layers[op.module], program), norm))
    return found


def _norm(op: Op, program: Program, layers: Mapping[str, Any]) -> _Norm | None:
    layer = layers.get(op.module)
    if op.rule != "batch_norm" or layer is None:
        return None
    gamma, beta, mean, variance = (None if v is None else program.values[v].names[0] for v in op.inputs[1:])
    assert mean is not None
    assert variance is not None
    return _Norm(op.outputs[0], gamma, beta, mean, variance, layer.epsilon)


def _geometry(op: Op, layer: Any, program: Program) -> _Geometry:
    if op.rule == "dense":
        return _Geometry()
    assert op.inputs[1] is not None
    kernel = program.values[op.inputs[1]].shape[:-2]
    if op.rule != "depthwise_conv" and hasattr(layer, "pointwise_kernel"):  # the second half of a separable convolution
        ones = (1,) * len(kernel)
        return _Geometry(kernel, ones, ones)
    return _Geometry(kernel, tuple(layer.strides), tuple(layer.dilation_rate), layer.padding)
