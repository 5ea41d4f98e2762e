"""The ops of a recorded model that a latency table times, in its vocabulary, and the axes that each of their sizes runs over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from coppice.axes import Axis, find
from coppice.coupling import Coupling
from coppice.graph import Op
from coppice.microbench import ACTIVATIONS, OpShape

CONVOLUTIONS = {"conv": "conv", "pointwise_conv": "conv", "conv_transpose": "conv_transpose"}
LETTERS = {"conv": "n g i o", "conv_transpose": "n g i o", "linear": "a b c", "product": "n a b c"}
FREE = {"view", "permute", "expand", "fresh", "filled", "take_apart"}  # moves no data, or is folded away
_Behind = tuple[list[int], str]


@dataclass(frozen=True, eq=False)
class TimedOp:
    """An op at full widths, by the name of the module it runs in; size ``k`` is the product of the widths of ``axes[k]``, 0 the batch's."""

    name: str
    shape: OpShape
    axes: tuple[tuple[Axis, ...], ...]


@dataclass(frozen=True, eq=False)
class Timed:
    """The ops that are timed one by one; ``inside`` and ``others``: the axes of what the rest writes, an entry an op.

    ``inside`` are norms and activations behind a convolution: where a runtime fuses them, the convolution's time has them.
    """

    ops: tuple[TimedOp, ...]
    inside: tuple[tuple[Axis, ...], ...]
    others: tuple[tuple[Axis, ...], ...]


def timed(coupling: Coupling) -> Timed:
    """Every convolution, matrix product and attention of the model, in order, and the rest."""
    fused = _fused(coupling)
    inside = {k for behind, _ in fused.values() for k in behind}
    ops = {k: found for k, op in enumerate(coupling.graph.ops) if (found := _timed(coupling, k, fused.get(k))) is not None}
    written = {
        k: tuple(coupling.dims[op.outputs[0]])
        for k, op in enumerate(coupling.graph.ops)
        if op.outputs and op.rule not in FREE and k not in ops
    }
    return Timed(
        tuple(ops.values()),
        tuple(axes for k, axes in written.items() if k in inside),
        tuple(axes for k, axes in written.items() if k not in inside),
    )


def _timed(coupling: Coupling, k: int, fused: _Behind | None) -> TimedOp | None:
    op, info = coupling.graph.ops[k], coupling.ops[k]
    if not info.letters:  # no rule of letters, or it did not fit: the op is part of the rest
        return None
    if op.rule == "attention":
        *outer, queries, _ = coupling.dims[op.outputs[0]]
        axes = (tuple(outer), (queries,), *((info.letters[x],) for x in "kdv"))
        return TimedOp(op.module, OpShape("attention", _sizes(axes)), axes)
    kind = CONVOLUTIONS.get(op.rule) or {"mm": "linear", "bmm": "product"}.get(op.rule)
    if kind is None:
        return None
    axes = tuple((info.letters[x],) for x in LETTERS[kind].split())
    shape = OpShape(kind, _sizes(axes))
    return TimedOp(op.module, _convolution(coupling, op, shape, fused[1] if fused else "") if kind in CONVOLUTIONS else shape, axes)


def _sizes(axes: tuple[tuple[Axis, ...], ...]) -> tuple[int, ...]:
    return tuple(math.prod(find(axis).size for axis in some) for some in axes)


def _convolution(coupling: Coupling, op: Op, shape: OpShape, activation: str) -> OpShape:
    x, weight = (coupling.graph.shape(v) for v in op.inputs[:2] if v is not None)
    dims = len(weight) - 2
    stride, padding, dilation = (_each(op.call.args[at], dims) for at in (3, 4, 5))  # by the schema of aten.convolution
    return OpShape(shape.kind, shape.sizes, x[2:], weight[2:], stride, padding, dilation, activation)


def _each(given: Any, dims: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in given)
    return values * dims if len(values) == 1 else values


def _fused(coupling: Coupling) -> dict[int, _Behind]:
    """For each convolution, the ops behind it that runtimes make part of it, and the ONNX name of the activation among them."""
    ops = coupling.graph.ops
    readers: dict[int, list[int]] = {}
    for k, op in enumerate(ops):
        for value in dict.fromkeys((*op.inputs, *op.others)):
            if value is not None:
                readers.setdefault(value, []).append(k)

    def behind(k: int) -> int | None:
        found = readers.get(ops[k].outputs[0], [])
        return found[0] if len(found) == 1 else None

    fused: dict[int, _Behind] = {}
    for k, op in enumerate(ops):
        if op.rule in CONVOLUTIONS:
            norm = behind(k)
            inside = [norm] if norm is not None and ops[norm].rule == "batch_norm" else []
            last = behind(inside[-1]) if inside else norm
            activation = _activation(ops[last]) if last is not None else ""
            fused[k] = ([*inside, last] if activation and last is not None else inside, activation)
    return fused


def _activation(op: Op) -> str:
    name = op.name.partition(".")[2].removesuffix("_")
    if name == "hardtanh" and tuple(op.call.args[1:]) == (0.0, 6.0):
        name = "relu6"
    return ACTIVATIONS.get(name, "")
