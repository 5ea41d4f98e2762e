"""Every op of `keras.ops` that has a rule of its own, between two layers that are cut, and what the pointwise ones share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

from coppice.keras.operations import POINTWISE, TABLE
from cutting import proven

Between = Callable[[Any], Any]
CASES: list[tuple[str, Between, bool]] = [  # the op, the model's code, whether anything before it can still be cut
    ("Reshape", lambda x: ops.reshape(x, (-1, 7, 3, 4)), True),
    ("Reshape", lambda x: ops.reshape(x, (-1, 84)), True),
    ("ExpandDims", lambda x: ops.expand_dims(x, 2), True),
    ("Squeeze", lambda x: ops.squeeze(ops.expand_dims(x, 2), 2), True),
    ("Transpose", lambda x: ops.transpose(x, (0, 2, 1)), True),
    ("Swapaxes", lambda x: ops.swapaxes(x, 1, 2), True),
    ("Moveaxis", lambda x: ops.moveaxis(x, 1, 2), True),
    ("Concatenate", lambda x: ops.concatenate([x, layers.Dense(5)(x)], axis=-1), True),
    ("Stack", lambda x: ops.stack([x, x], axis=1), True),
    ("Softmax", lambda x: ops.softmax(x, axis=-1), True),
    ("LogSoftmax", lambda x: ops.log_softmax(x, axis=-1), True),
    ("Sparsemax", lambda x: ops.sparsemax(x, axis=-1), True),
    ("Glu", lambda x: ops.glu(x, axis=-1), True),
    ("Sum", lambda x: ops.sum(x, axis=-1, keepdims=True) + ops.sum(x, axis=1, keepdims=True), True),
    ("Mean", lambda x: ops.mean(x, axis=1), True),
    ("Max", lambda x: ops.max(x, axis=(1,), keepdims=True), True),
    ("Var", lambda x: x - ops.var(x, axis=-1, keepdims=True), True),
    ("Normalize", lambda x: ops.normalize(x, axis=-1), True),
    ("Matmul", lambda x: ops.matmul(x, ops.transpose(layers.Dense(12)(x), (0, 2, 1))), True),
    ("Einsum", lambda x: ops.einsum("nac,nbc->nab", x, layers.Dense(12)(x)), True),
    ("Split", lambda x: ops.multiply(*ops.split(x, 2, axis=-1)), True),
    ("Split", lambda x: ops.split(x, [4], axis=-1)[0], False),
    ("GetItem", lambda x: x[:, 2], True),
    ("GetItem", lambda x: x[..., 3], False),
    ("GetItem", lambda x: x[:, :, None, :4], False),
    ("Pad", lambda x: ops.pad(x, [[0, 0], [1, 1], [2, 0]]), True),
    ("Flip", lambda x: ops.flip(x, axis=1), True),
    ("Roll", lambda x: ops.roll(x, 2, axis=-1), False),
    ("Multiply", lambda x: x * np.arange(12, dtype="float32"), False),
    ("Where", lambda x: ops.where(x > 0, x, 0.1 * x), True),
    ("Clip", lambda x: ops.clip(x, 0, 6), True),
    ("Divide", lambda x: x / (1.0 + ops.abs(x)), True),
    ("Cumsum", lambda x: ops.cumsum(x, axis=-1), False),  # no rule
]
UNTESTED = {"Amax", "Amin", "Min", "Std", "Prod", "Logsumexp", "Any", "All"}  # lines that a tested op shares


def test_every_line_has_a_case() -> None:
    assert {name for name, _, _ in CASES} >= TABLE.keys() - POINTWISE - UNTESTED


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{k}-{name}" for k, (name, _, _) in enumerate(CASES)])
def test_an_op_between_two_layers_that_are_cut(number: int) -> None:
    _, make, free = CASES[number]
    start = keras.Input((7, 5))
    x = make(layers.Dense(12, name="before", activation="relu")(start))
    model = keras.Model(start, layers.Dense(3)(layers.Flatten()(x)))
    _, coupling, _ = proven(model, (2, 7, 5), seed=number)
    assert free == any(axis.pinned is None for axis in coupling.on("before/kernel", 1))
