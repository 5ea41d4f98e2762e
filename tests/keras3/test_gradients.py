"""Scores through the active backend: gradients against differences, a compiled loss, frozen layers, and data-free criteria."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.criteria import CRITERIA
from coppice.keras.gradients import gradients, synaptic_flow
from coppice.keras.walk import variables_of


def small(activation: str | None = "softmax") -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, activation="tanh"),
            layers.Flatten(),
            layers.Dense(16),
            layers.Dense(4, activation=activation),
        ]
    )


def some_batches() -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((6, 8, 8, 3)).astype("float32"), np.arange(6) % 4) for _ in range(2)]


def test_gradients_are_the_slopes_of_the_loss() -> None:
    model = small()
    x, y = some_batches()[0]
    found = next(iter(gradients(model, [(x, y)], None)))
    assert found.keys() == variables_of(model).keys()
    bias = variables_of(model)[next(name for name in found if name.endswith("bias"))]
    slopes = found[next(name for name in found if name.endswith("bias"))][1]

    def loss() -> float:
        answers = keras.ops.convert_to_numpy(model(x, training=False))
        return float(-np.log(answers[np.arange(6), y]).mean())

    before = np.array(keras.ops.convert_to_numpy(bias.value))
    for k in range(3):
        moved = np.zeros_like(before)
        moved[k] = 1e-2
        bias.assign(before + moved)
        up = loss()
        bias.assign(before - moved)
        assert (up - loss()) / 2e-2 == pytest.approx(slopes[k], abs=2e-3)
        bias.assign(before)


def test_the_compiled_loss_is_the_one_that_counts() -> None:
    model = small(None)
    x, y = some_batches()[0]
    one_hot = np.eye(4, dtype="float32")[y]
    model.compile(loss="mse")
    found = next(iter(gradients(model, [(x, one_hot)], None)))
    wanted = next(
        iter(
            gradients(model, [(x, one_hot)], lambda outputs, targets: keras.ops.mean((outputs - keras.ops.convert_to_tensor(targets)) ** 2))
        )
    )
    for name, (_, slope) in found.items():
        assert np.allclose(slope, wanted[name][1], rtol=1e-4, atol=1e-7)


def test_frozen_layers_get_gradients_too_and_stay_frozen() -> None:
    model = small()
    model.layers[0].trainable = False
    found = next(iter(gradients(model, some_batches(), None)))
    assert all(np.abs(slope).max() > 0 for _, slope in found.values())
    assert not model.layers[0].trainable_weights


@pytest.mark.parametrize(
    "criterion",
    [name for name in CRITERIA if name not in ("apoz", "rank", "obs")],  # of tanh nothing is zero, and obs has its own tests
)
def test_criteria(criterion: str) -> None:
    model = small()
    coupling = coppice.couple(coppice.capture(model, (1, 8, 8, 3)))
    scores = coppice.score(model, coupling, criterion, some_batches())
    assert all(scores[axis.id].max() > scores[axis.id].min() >= 0 for axis in coupling.prunable)


def test_synaptic_flow_is_conserved() -> None:
    """What flows into a layer's channels flows out of them."""
    model = small()
    found = synaptic_flow(model, ((1, 8, 8, 3),))
    first, second = (found[name] for name in sorted(found) if "dense" in name and name.endswith("kernel"))
    assert first.sum(0) == pytest.approx(second.sum(1), rel=1e-6)
