"""EinsumDense, and attention, which is made of it, in the vocabulary of ``coppice.rules``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from coppice.keras.common_ops import NoRuleError, activation
from coppice.keras.tape import Tape, Traced


def einsum_dense(t: Tape, layer: Any, x: Traced) -> Any:
    return _einsum_dense(t, layer, x, "output_shape")


def _einsum_dense(t: Tape, layer: Any, x: Traced, key: str | None = None) -> Traced:
    """``key``: the field of the configuration that holds the result's shape."""
    operands, _, result = layer.equation.replace(" ", "").partition("->")
    left, _, weight = operands.partition(",")
    if layer.equation != layer.equation.lower() or left[-1] == "." or left.startswith("...") != result.startswith("..."):
        raise NoRuleError("its equation has capital letters, or an ellipsis on the right")
    first = min((result.index(c) for c in layer.bias_axes or ""), default=len(result))
    line = f"{_spaced(left)}, {_spaced(weight)}, {_spaced(result[first:]) or '...'} -> {_spaced(result)}"
    letters = dict.fromkeys((left + weight).replace(".", ""))
    macs = " ".join([*letters, *(["..."] if "..." in result else [])])

    def run(a: Sequence[Any], s: Any) -> Any:
        y = ops.einsum(layer.equation, a[0], a[1])
        return y if a[2] is None else y + a[2]

    shape = _einsum_shape(left, weight, result, x.shape, tuple(layer.kernel.shape))
    out: Traced = t.emit("einsum", [x, t.weight(layer.kernel), t.weight(layer.bias)], shape, run, {"line": line, "macs": (macs,)})
    if key is not None:
        dense_sizes = layer.get_config()[key]
        sizes = (dense_sizes,) if isinstance(dense_sizes, int) else tuple(dense_sizes)
        offset = len(shape) - len(sizes)
        if isinstance(dense_sizes, int):
            t.bind(key, out, -1)
        else:
            t.bind_all(key, out, [None if n is None else offset + k for k, n in enumerate(sizes)], sizes)
    return activation(t, layer.activation, out)


def _einsum_shape(left: str, weight: str, result: str, x: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Keras itself leaves open what its configuration does."""
    letters = left.removeprefix("...")
    rest = x[: len(x) - len(letters)]
    sizes = dict(zip(letters + weight, (*x[len(rest) :], *kernel), strict=True))
    return (*rest, *(sizes[c] for c in result.removeprefix("...")))


def _spaced(pattern: str) -> str:
    return " ".join(["...", *pattern[3:]] if pattern.startswith("...") else pattern)


def multi_head_attention(t: Tape, layer: Any, query: Traced, value: Traced, key: Any = None, **options: Any) -> Any:
    key = value if key is None else key
    asked = {name: v for name, v in options.items() if name != "training" and v is not None and v is not False}
    plain = all(len(x.shape) == 3 for x in (query, key, value)) and layer.attention_axes in (None, (1,)) and not asked
    if not plain or layer._use_gate or layer._sliding_window or (layer._output_shape and len(layer._output_shape) != 1):
        raise NoRuleError("attention with masks, gates, windows or several axes")
    q, k, v = (_einsum_dense(t, part, x) for part, x in ((layer.query_dense, query), (layer.key_dense, key), (layer.value_dense, value)))
    t.bind("num_heads", q, 2)
    t.bind("key_dim", q, 3)
    t.bind("value_dim", v, 3)
    if q.shape[3] == v.shape[3]:  # JAX's attention takes no other, and the result is to run on every backend
        t.tie(q.id, 3, v.id, 3)
    return _attention_output(t, layer.output_dense, _attend(t, q, k, v))


def grouped_query_attention(t: Tape, layer: Any, query: Traced, value: Traced, key: Any = None, **options: Any) -> Any:
    key = value if key is None else key
    asked = {name: v for name, v in options.items() if name != "training" and v is not None and v is not False}
    if asked or layer.use_gate or layer.sliding_window or any(len(x.shape) != 3 for x in (query, key, value)):
        raise NoRuleError("attention with masks, gates, windows or several axes")
    q, k, v = (_einsum_dense(t, part, x) for part, x in ((layer._query_dense, query), (layer._key_dense, key), (layer._value_dense, value)))
    t.bind("num_query_heads", q, 2)
    t.bind("num_key_value_heads", k, 2)
    t.bind("head_dim", q, 3)
    t.tie(q.id, 3, v.id, 3)
    out = _attend(t, q, k, v)
    return _einsum_output(t, layer._output_dense, out, query)


def _attend(t: Tape, q: Traced, k: Traced, v: Traced) -> Traced:
    """Scaled by the head dim's width; each key head serves as many query heads, one after the other."""

    def run(a: Sequence[Any], s: Any) -> Any:
        query, key, value = a
        times = query.shape[2] // key.shape[2]
        key, value = (ops.repeat(x, times, axis=2) if times > 1 else x for x in (key, value))
        scores = ops.einsum("nqhd,nkhd->nhqk", query, key) / math.sqrt(query.shape[3])
        return ops.einsum("nhqk,nkhd->nqhd", ops.softmax(scores, axis=-1), value)

    out: Traced = t.emit("attention_heads", [q, k, v], (*q.shape[:3], v.shape[3]), run)
    return out


def _attention_output(t: Tape, layer: Any, x: Traced) -> Traced:
    """The projection behind the heads; its width is what the configuration says, or that of the query."""
    out = _einsum_dense(t, layer, x)
    t.bind_all("output_shape", out, [2], [out.shape[2]])
    return out


def _einsum_output(t: Tape, layer: Any, x: Traced, query: Traced) -> Traced:
    """The projection back to the width of the query, whatever that is."""
    out = _einsum_dense(t, layer, x)
    t.tie(out.id, 2, query.id, 2)
    return out
