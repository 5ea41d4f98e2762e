"""The ops that layers and ``keras.ops`` have in common, each as a tape takes it down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from coppice.keras.tape import Tape, Traced

Translate = Callable[..., Any]  # (tape, layer, *what it was called with) -> its result


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


POINTWISE = names(
    "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid hard_sigmoid hard_silu log_sigmoid tanh hard_tanh tanh_shrink soft_shrink "
    "hard_shrink softplus softsign exponential linear squareplus sparse_plus sparse_sigmoid threshold"
)
MIXING = frozenset(("softmax", "log_softmax", "sparsemax"))  # along the last dim


class NoRuleError(Exception):
    """What was asked of the layer has no rule: the message says what that was."""


def pointwise(t: Tape, inputs: Sequence[Traced | int], shape: tuple[int, ...], run: Callable[..., Any]) -> Traced:
    found: Traced = t.emit("pointwise", list(inputs), shape, lambda a, s: run(*a))
    return found


def activation(t: Tape, function: Any, x: Traced) -> Traced:
    """The function that a layer ends with."""
    if function is None or function is keras.activations.linear:
        return x
    name = getattr(function, "__name__", type(function).__name__)
    own = getattr(keras.activations, name, None) is function
    if own and name in POINTWISE:
        return pointwise(t, [x], x.shape, function)
    if own and name in MIXING:
        return mixing(t, x, [-1], function)
    if own and name == "glu":
        return halves(t, x, -1, function)
    found: Traced = t.emit("unknown", [x], x.shape, lambda a, s: function(a[0]), {"reason": f"no rule for the activation {name}"})
    return found


def mixing(t: Tape, x: Traced, dims: Sequence[int], run: Callable[..., Any]) -> Traced:
    """The same shape in and out, mixing along ``dims``."""
    rank = len(x.shape)
    attrs = {"map": list(range(rank)), "mixed": sorted({d % rank for d in dims})}
    found: Traced = t.emit("along", [x], x.shape, lambda a, s: run(a[0]), attrs)
    return found


def halves(t: Tape, x: Traced, dim: int, run: Callable[..., Any]) -> Traced:
    dim %= len(x.shape)
    shape = tuple(n // 2 if k == dim else n for k, n in enumerate(x.shape))
    found: Traced = t.emit("halves", [x], shape, lambda a, s: run(a[0]), {"dim": dim})
    return found


def reduced(t: Tape, x: Traced, dims: Sequence[int], keepdims: bool, kind: str, run: Callable[..., Any]) -> Traced:
    """``kind`` "summed": a removed index just drops out; "mixed": mean, max, ..."""
    rank = len(x.shape)
    gone = sorted({d % rank for d in dims})
    kept = [None if k in gone else k for k in range(rank) if keepdims or k not in gone]
    shape = tuple(1 if k is None else x.shape[k] for k in kept)
    found: Traced = t.emit("along", [x], shape, lambda a, s: run(a[0]), {"map": kept, kind: gone})
    return found


def view(t: Tape, x: Traced, shape: tuple[int, ...]) -> Traced:
    found: Traced = t.emit("view", [x], shape, lambda a, s: ops.reshape(a[0], shape))
    return found


def permuted(t: Tape, x: Traced, order: Sequence[int]) -> Traced:
    order = [k % len(x.shape) for k in order]
    shape = tuple(x.shape[k] for k in order)
    found: Traced = t.emit("permute", [x], shape, lambda a, s: ops.transpose(a[0], order), {"order": order})
    return found


def joined(t: Tape, inputs: Sequence[Traced], axis: int) -> Traced:
    dim = axis % len(inputs[0].shape)
    shape = tuple(sum(x.shape[k] for x in inputs) if k == dim else n for k, n in enumerate(inputs[0].shape))
    found: Traced = t.emit("concat", list(inputs), shape, lambda a, s: ops.concatenate(list(a), axis=dim), {"dim": dim})
    return found
