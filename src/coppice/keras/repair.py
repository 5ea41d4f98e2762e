"""Repair of a pruned Keras model: its convolutions and dense layers as `coppice.refit` needs them, whatever the data format."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coppice.coupling import Coupling, keep_mask
from coppice.errors import CoppiceError
from coppice.graph import Kind, Op
from coppice.keras.program import Program, coupled_on
from coppice.keras.walk import layers_of, numbers, variables_of
from coppice.planning import Plan, masks_by_atom
from coppice.refit import Array, Refit, Refitting, only_use
from coppice.stepwise import of_one_shape

CONVOLUTIONS = ("conv_kernel_first", "depthwise_conv")  # rules
_SMALLEST_SCALE = 1e-4  # of a normalisation: below, nothing can be undone


def repair(dense: Any, pruned: Any, coupling: Coupling, plan: Plan, batches: Iterable[Array], seed: int = 0) -> list[Refit]:
    """See `coppice.repair`."""
    same = of_one_shape(batches)
    left, right = _Model(dense, same), _Model(pruned, same)
    if [op.rule for op in left.program.ops] != [op.rule for op in right.program.ops]:
        raise CoppiceError("the pruned model runs other ops than the dense one; repair needs them in step")
    here = coupled_on(dense, coupling, same[0])
    keep = masks_by_atom(here, plan)
    masks = {layer.index: [keep_mask(axis, keep) for axis in here.dims[layer.output]] for layer in left.layers}
    twin = {k: k for k in range(len(left.program.ops))}
    small = {layer.weight: layer for layer in right.layers}
    return Refitting(left, right, small, twin, masks, np.random.default_rng(seed)).run()


class _Model:
    """`coppice.refit.Model` of a Keras model."""

    def __init__(self, model: Any, batches: Sequence[Array]) -> None:
        self.program = Program(model, batches)
        self.layers = _layers(self.program, model)

    def array(self, value: int, batch: int) -> Array:
        return self.program.array(value, batch)

    def adds(self, op: Op) -> bool:
        return op.rule == "pointwise" and op.name == "keras.Add"


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


class _Linear:
    """`coppice.refit.Linear`: op ``index`` of a recording, with its variables and those of the normalisation ``norm`` after it."""

    def __init__(self, index: int, op: Op, weight: str, kernel: Any, bias: Any, geometry: _Geometry, norm: _Norm | None) -> None:
        assert op.inputs[0] is not None
        self.index, self.input, self.output, self.weight = index, op.inputs[0], op.outputs[0], weight
        self.last = bool(op.attrs.get("last", True))
        self.channels = -1 if self.last else 1
        self.normed = None if norm is None else norm.output
        self._norm, self._geometry, self._kernel, self._bias = norm, geometry, kernel, bias
        self._depthwise = op.rule == "depthwise_conv"
        self._groups = kernel.shape[-2] if self._depthwise else op.attrs.get("sizes", {}).get("g", 1)

    @property
    def can_shift(self) -> bool:
        return self._bias is not None or self._norm is not None

    def matrix(self) -> Array:
        kernel = numbers(self._kernel)
        if self._depthwise:  # *k c m
            return np.moveaxis(kernel.reshape(-1, *kernel.shape[-2:]), 0, -1)
        features = math.prod(kernel.shape[:-1])
        return np.ascontiguousarray(kernel.reshape(features, self._groups, -1).transpose(1, 2, 0))

    def bias(self) -> Array | None:
        return None if self._bias is None else numbers(self._bias)

    def change(self, matrix: Array, shift: Array | None) -> None:
        shape = tuple(self._kernel.shape)
        self._kernel.assign((np.moveaxis(matrix, -1, 0) if self._depthwise else matrix.transpose(2, 0, 1)).reshape(shape))
        if shift is not None and self._bias is not None:
            self._bias.assign(numbers(self._bias) + shift)
        elif shift is not None and self._norm is not None:
            self._norm.mean.assign(numbers(self._norm.mean) - shift)

    def affine(self) -> tuple[Array, Array]:
        assert self._norm is not None
        return self._norm.affine()

    def positions(self, y: Array) -> int:
        return math.prod(self._spatial(y)) if self._geometry.kernel else math.prod(y.shape[:-1])

    def samples(self, x: Array) -> int:
        return len(x) if self._geometry.kernel else 1

    def _spatial(self, array: Array) -> tuple[int, ...]:
        return array.shape[1:-1] if self.last else array.shape[2:]

    def features(self, x: Array, at: Array, y: Array) -> Array:
        if not self._geometry.kernel:
            return x.reshape(-1, x.shape[-1])[at][None]
        x = x if self.last else np.moveaxis(x, 1, -1)
        pads = self._geometry.pads(x.shape[1:-1])
        x = np.pad(x, [(0, 0), *pads, (0, 0)]) if any(map(any, pads)) else x
        places = np.unravel_index(at, self._spatial(y))
        g, n = self._geometry, len(x)
        taps = []
        for tap in itertools.product(*map(range, g.kernel)):
            where = (p * s + k * d for p, s, k, d in zip(places, g.stride, tap, g.dilation, strict=True))
            index: tuple[Any, ...] = (slice(None), *where)
            taps.append(x[index])
        found = np.stack(taps, axis=2).reshape(n * len(at), len(taps), self._groups, -1)  # (n p) k g c
        return np.ascontiguousarray(found.transpose(2, 0, 1, 3)).reshape(self._groups, n * len(at), -1)

    def responses(self, y: Array, at: Array) -> Array:
        y = y if self.last else np.moveaxis(y, 1, -1)
        rows = y.reshape(len(y), -1, y.shape[-1])[:, at] if self._geometry.kernel else y.reshape(-1, y.shape[-1])[at]
        return np.ascontiguousarray(rows.reshape(-1, self._groups, y.shape[-1] // self._groups).transpose(1, 0, 2))


@dataclass(frozen=True, slots=True)
class _Norm:
    """The BatchNormalization right after a layer; ``output`` is its result."""

    output: int
    gamma: Any
    beta: Any
    mean: Any
    variance: Any
    epsilon: float

    def affine(self) -> tuple[Array, Array]:
        scale = 1 / np.sqrt(numbers(self.variance) + self.epsilon) * (1 if self.gamma is None else numbers(self.gamma))
        shift = (0 if self.beta is None else numbers(self.beta)) - numbers(self.mean) * scale
        return shift, np.where(np.abs(scale) < _SMALLEST_SCALE, 1.0, scale).astype(shift.dtype)


def _layers(program: Program, model: Any) -> list[_Linear]:
    """The layers of a recording whose weights nothing else reads, in order."""
    reads = Counter(v for op in program.ops for v in {*op.inputs, *op.others} if v is not None)
    names = {v.id: v.names[0] for v in program.values if v.kind is Kind.PARAMETER}
    variables, layers = variables_of(model), dict(layers_of(model))
    found = []
    for k, op in enumerate(program.ops):
        weights = [v for v in op.inputs[1:3] if v is not None]
        known = op.rule in (*CONVOLUTIONS, "dense") and weights and op.inputs[0] is not None and op.module in layers
        if known and all(v in names and reads[v] == 1 for v in weights) and (reads[op.outputs[0]] or op.outputs[0] in program.outputs):
            use = only_use(program, op.outputs[0], k)
            norm = None if use is None else _norm(program.ops[use], program, variables, layers)
            kernel, bias = variables[names[weights[0]]], variables[names[weights[1]]] if len(weights) > 1 else None
            found.append(_Linear(k, op, names[weights[0]], kernel, bias, _geometry(op, layers[op.module], program), norm))
    return found


def _norm(op: Op, program: Program, variables: dict[str, Any], layers: dict[str, Any]) -> _Norm | None:
    layer = layers.get(op.module)
    if op.rule != "batch_norm" or layer is None:
        return None
    gamma, beta, mean, variance = (None if v is None else variables[program.values[v].names[0]] for v in op.inputs[1:])
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
