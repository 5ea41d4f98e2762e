"""``keras.ops`` in the vocabulary of ``coppice.rules``: one line an op, as for layers (``coppice.keras.layers``).

A line maps the name of an operation's class to a function of the tape, the operation and what it was called with. Arrays among the
arguments are constants. What is in no line is pinned; nothing is assumed to be element-wise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from coppice.keras.common_ops import NoRuleError, Translate, halves, joined, mixing, names, permuted, pointwise, reduced, view
from coppice.keras.tape import Tape, Traced
from coppice.movement import PICKED

POINTWISE = names(
    "Absolute Abs Add Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh Cast Cbrt Ceil Celu Clip Copy Cos Cosh Divide "
    "DivideNoNan Elu Equal Erf Erfc Exp Exp2 Expm1 Floor FloorDivide Fmax Fmin Gelu Greater GreaterEqual HardShrink HardSigmoid "
    "HardSilu HardTanh Heaviside Hypot Identity Isfinite Isinf Isnan LeakyRelu Less LessEqual Log Log10 Log1p Log2 LogSigmoid "
    "Logaddexp LogicalAnd LogicalNot LogicalOr LogicalXor Maximum Minimum Mod Multiply NanToNum Negative NotEqual OnesLike Power "
    "Reciprocal Relu Relu6 Round Rsqrt SaturateCast Selu Sigmoid Sign Silu Sin Sinh SoftShrink Softplus Softsign SparsePlus "
    "SparseSigmoid Sqrt Square Squareplus StopGradient Subtract Tan Tanh TanhShrink Threshold TrueDivide Trunc Where ZerosLike"
)


def elementwise(t: Tape, op: Any, *args: Any, **kwargs: Any) -> Traced:
    """Tensors and arrays broadcast against each other; whatever else is an argument stays as it is."""
    slots: list[Traced | int] = []

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Traced):
            slots.append(leaf)
        elif np.ndim(leaf) and not isinstance(leaf, (str, list, tuple, dict)):
            slots.append(t.constant(keras.ops.convert_to_numpy(leaf)))
        else:
            return leaf
        return _Slot(len(slots) - 1)

    args, kwargs = keras.tree.map_structure(take, (args, kwargs))

    def run(*arrays: Any) -> Any:
        known, named = keras.tree.map_structure(lambda leaf: arrays[leaf.at] if isinstance(leaf, _Slot) else leaf, (args, kwargs))
        if type(op).__name__ in ("Cast", "SaturateCast") and "float" in str(op.dtype):
            return known[0]  # the oracle stays in its own precision
        return op(*known, **named)

    shapes = [x.shape if isinstance(x, Traced) else t.values[x].shape for x in slots]
    return pointwise(t, slots, tuple(np.broadcast_shapes(*shapes)), run)


class _Slot:
    """Stands for an operand among the arguments."""

    def __init__(self, at: int) -> None:
        self.at = at


def _new_shape(op: Any, x: Traced) -> tuple[int, ...]:
    return tuple(op.compute_output_spec(x.symbol()).shape)


def reshape(t: Tape, op: Any, x: Traced) -> Traced:
    shape = _new_shape(op, x)
    out = view(t, x, shape)
    asked = tuple(op.newshape) if isinstance(op.newshape, (tuple, list)) else (op.newshape,)
    if len(asked) == len(shape) and all(isinstance(n, int) for n in asked):
        t.bind_all("newshape", out, [None if n == -1 else k for k, n in enumerate(asked)], asked)
    return out


def reshaped(t: Tape, op: Any, x: Traced) -> Traced:
    """Adds or drops dims of size 1."""
    return view(t, x, _new_shape(op, x))


def transpose(t: Tape, op: Any, x: Traced) -> Traced:
    return permuted(t, x, op.axes if op.axes is not None else list(range(len(x.shape)))[::-1])


def swapaxes(t: Tape, op: Any, x: Traced) -> Traced:
    order = list(range(len(x.shape)))
    order[op.axis1], order[op.axis2] = order[op.axis2], order[op.axis1]
    return permuted(t, x, order)


def moveaxis(t: Tape, op: Any, x: Traced) -> Traced:
    source, target = (np.atleast_1d(v) % len(x.shape) for v in (op.source, op.destination))
    rest = [k for k in range(len(x.shape)) if k not in source]
    for at, dim in sorted(zip(target.tolist(), source.tolist(), strict=True)):
        rest.insert(at, dim)
    return permuted(t, x, rest)


def concatenate(t: Tape, op: Any, inputs: Sequence[Traced]) -> Traced:
    if not all(isinstance(x, Traced) for x in inputs):
        raise NoRuleError("constants are concatenated")
    return joined(t, inputs, op.axis)


def stack(t: Tape, op: Any, inputs: Sequence[Traced]) -> Traced:
    if not all(isinstance(x, Traced) for x in inputs):
        raise NoRuleError("constants are stacked")
    rank = len(inputs[0].shape) + 1
    dim = op.axis % rank
    shape = (*inputs[0].shape[:dim], len(inputs), *inputs[0].shape[dim:])
    found: Traced = t.emit("stack", list(inputs), shape, lambda a, s: ops.stack(list(a), axis=dim), {"dim": dim})
    return found


def softmax(t: Tape, op: Any, x: Traced) -> Traced:
    return mixing(t, x, [op.axis] if isinstance(op.axis, int) else list(op.axis), op)


def glu(t: Tape, op: Any, x: Traced) -> Traced:
    return halves(t, x, op.axis, op)


def reduction(kind: str) -> Translate:
    def translate(t: Tape, op: Any, x: Traced) -> Traced:
        axes = getattr(op, "axis", None)
        dims = list(range(len(x.shape))) if axes is None else [axes] if isinstance(axes, int) else list(axes)
        return reduced(t, x, dims, bool(getattr(op, "keepdims", False)), kind, op)

    return translate


def normalize(t: Tape, op: Any, x: Traced) -> Traced:
    return mixing(t, x, [op.axis] if isinstance(op.axis, int) else list(op.axis), op)


def matmul(t: Tape, op: Any, a: Any, b: Any) -> Traced:
    if not (isinstance(a, Traced) and isinstance(b, Traced)) or min(len(a.shape), len(b.shape)) < 2 or len(a.shape) != len(b.shape):
        raise NoRuleError("a product with a constant, a vector, or of two ranks")
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    attrs = {"line": "... a b, ... b c -> ... a c", "macs": ("... a b c",)}
    found: Traced = t.emit("einsum", [a, b], shape, lambda v, s: ops.matmul(v[0], v[1]), attrs)
    return found


def einsum(t: Tape, op: Any, *args: Any) -> Traced:
    equation = str(op.subscripts).replace(" ", "")
    left, arrow, right = equation.partition("->")
    parts = left.split(",")
    if not arrow or "." in equation or equation != equation.lower() or any(len(set(p)) < len(p) for p in parts):
        raise NoRuleError("an equation without a result, or with ellipses, capital letters or diagonals")
    if not all(isinstance(x, Traced) for x in args):
        raise NoRuleError("a constant in the equation")
    sizes = {c: n for p, x in zip(parts, args, strict=True) for c, n in zip(p, x.shape, strict=True)}
    line = f"{', '.join(' '.join(p) for p in parts)} -> {' '.join(right)}"
    attrs = {"line": line, "macs": (" ".join(sizes),) if len(parts) > 1 else ()}
    found: Traced = t.emit("einsum", list(args), tuple(sizes[c] for c in right), lambda a, s: ops.einsum(equation, *a), attrs)
    return found


def split(t: Tape, op: Any, x: Traced) -> list[Traced]:
    """Sections of equal size follow the width; borders that the code names can't."""
    dim = op.axis % len(x.shape)
    if not isinstance(op.indices_or_sections, int):
        raise NoRuleError("split at borders that the model names")
    count = op.indices_or_sections
    shape = tuple(n // count if k == dim else n for k, n in enumerate(x.shape))
    run: Any = lambda a, s: ops.split(a[0], count, axis=dim)  # noqa: E731
    outs: list[Traced] = t.emit("take_apart", [x], [_Spec(shape, x.dtype)] * count, run, {"dim": dim, "start": 0})
    for other in outs[1:]:
        t.tie(outs[0].id, dim, other.id, dim)
    return outs


class _Spec:
    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, dtype


def get_item(t: Tape, op: Any, x: Traced, key: Any) -> Traced:
    """Whole dims, new dims of size 1, and single indices; slices within a dim are borders that the model names."""
    keys = list(key) if isinstance(key, (tuple, list)) else [key]  # a list, from a file
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        missing = len(x.shape) - sum(k is not None for k in keys) + 1
        keys[at : at + 1] = [slice(None)] * missing
    out, dim = x, 0
    for entry in keys:
        if entry is None:
            out = view(t, out, (*out.shape[:dim], 1, *out.shape[dim:]))
            dim += 1
        elif isinstance(entry, slice) and entry in (slice(None), slice(0, None), slice(None, None, 1)):
            dim += 1
        elif isinstance(entry, int):
            out = _picked(t, out, dim, entry)
        else:
            raise NoRuleError("sliced at borders that the model names")
    return out


def _picked(t: Tape, x: Traced, dim: int, index: int) -> Traced:
    index %= x.shape[dim]
    kept = [k for k in range(len(x.shape)) if k != dim]
    attrs = {"map": kept, "picked": [index], "dim": dim, "reason": PICKED}
    found: Traced = t.emit("along", [x], tuple(x.shape[k] for k in kept), lambda a, s: ops.take(a[0], index, axis=dim), attrs)
    return found


def pad(t: Tape, op: Any, x: Traced, constant_values: Any = None) -> Traced:
    pads = [tuple(p) for p in op.pad_width]
    if op.mode != "constant" or any(len(p) != 2 for p in pads):
        raise NoRuleError("padding that is not constant")
    shape = tuple(n + a + b for n, (a, b) in zip(x.shape, pads, strict=True))
    run: Any = lambda a, s: ops.pad(a[0], pads, constant_values=constant_values)  # noqa: E731
    found: Traced = t.emit("pad", [x], shape, run, {"pads": pads})
    return found


def reordered(t: Tape, op: Any, x: Traced) -> Traced:
    rank = len(x.shape)
    axes = getattr(op, "axis", None)
    moved = {a % rank for a in (range(rank) if axes is None else [axes] if isinstance(axes, int) else axes)}
    attrs = {"map": [None if k in moved else k for k in range(rank)], "reason": "its indices are reordered"}
    found: Traced = t.emit("along", [x], x.shape, lambda a, s: op(a[0]), attrs)
    return found


def _each(names: str, translate: Translate) -> dict[str, Translate]:
    return dict.fromkeys(names.split(), translate)


TABLE: dict[str, Translate] = {
    **dict.fromkeys(POINTWISE, elementwise),
    **_each("Reshape", reshape),
    **_each("ExpandDims Squeeze", reshaped),
    **_each("Transpose", transpose),
    **_each("Swapaxes", swapaxes),
    **_each("Moveaxis", moveaxis),
    **_each("Concatenate", concatenate),
    **_each("Stack", stack),
    **_each("Softmax LogSoftmax Sparsemax", softmax),
    **_each("Glu", glu),
    **_each("Sum", reduction("summed")),
    **_each("Mean Max Min Amax Amin Var Std Prod Logsumexp Any All", reduction("mixed")),
    **_each("Normalize", normalize),
    **_each("Matmul", matmul),
    **_each("Einsum", einsum),
    **_each("Split", split),
    **_each("GetItem", get_item),
    **_each("Pad", pad),
    **_each("Flip Roll", reordered),
}
