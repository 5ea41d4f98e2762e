"""The refit of a cut Keras model: each layer gives what it gave, on every backend and in both data formats."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.keras.apply import weights_in
from coppice.keras.recovery import recover
from coppice.keras.train import reestimate
from coppice.keras.walk import variables_of
from coppice.mending import AS_CUT, REESTIMATED, REFITTED
from cutting import random_plan

RNG = np.random.default_rng(0)
FORMATS = ["channels_last"] if keras.backend.backend() == "tensorflow" else ["channels_last", "channels_first"]  # its CPU kernels


def zoo(layout: str) -> Any:
    """Every kind of layer that is refitted: strides, groups, dilation, depthwise, separable, BatchNormalization, a residual sum."""
    last = layout == "channels_last"
    axis = -1 if last else 1
    conv: dict[str, Any] = {"data_format": layout, "padding": "same"}
    inputs = keras.Input((9, 9, 3) if last else (3, 9, 9))
    x = layers.Conv2D(16, 3, use_bias=False, **conv)(inputs)
    x = shortcut = layers.ReLU()(layers.BatchNormalization(axis=axis)(x))
    x = layers.Conv2D(24, 3, groups=4, **conv)(x)
    x = layers.Conv2D(24, 3, dilation_rate=2, activation="relu", **conv)(x)
    x = layers.DepthwiseConv2D(3, activation="relu", **conv)(x)
    x = layers.BatchNormalization(axis=axis)(layers.Conv2D(16, 1, use_bias=False, **conv)(x))
    x = layers.Add()([shortcut, x])
    x = layers.Conv2D(24, 2, strides=2, data_format=layout)(x)
    x = layers.SeparableConv2D(24, 3, strides=2, activation="relu", **conv)(x)
    x = layers.Flatten(data_format=layout)(x)
    return keras.Model(inputs, layers.Dense(5, activation="softmax")(layers.Dense(20, activation="relu")(x)))


def batches(layout: str, count: int = 8) -> list[Any]:
    shape = (16, 9, 9, 3) if layout == "channels_last" else (16, 3, 9, 9)
    return [RNG.standard_normal(shape).astype("float32") for _ in range(count)]


@pytest.mark.parametrize("layout", FORMATS)
def test_a_layer_that_lost_nothing_that_matters_is_mended_exactly(layout: str) -> None:
    """Weights that were spoilt, with all of their inputs there, give what they gave after least squares."""
    model = zoo(layout)
    coupling = coppice.couple(coppice.capture(model, (1, *model.input_shape[1:])))
    nothing = coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": coupling.cost().macs})
    spoilt = coppice.apply(model, nothing)
    kernels = {name: variable for name, variable in variables_of(spoilt).items() if name.endswith("kernel")}
    for variable in kernels.values():
        variable.assign(variable.value * 0.7)
    done = {refit.weight: refit for refit in coppice.repair(model, spoilt, coupling, nothing, batches(layout, 24))}
    assert done.keys() == kernels.keys()
    assert all(refit.after < 1e-2 * refit.before for refit in done.values()), done


def attention() -> Any:
    inputs = keras.Input((6, 12))
    x = layers.Add()([inputs, layers.MultiHeadAttention(3, 4)(inputs, inputs)])
    x = layers.EinsumDense("abc,cde->abde", (6, 3, 5), bias_axes="de", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(4)(layers.Flatten()(layers.EinsumDense("abde,dec->abc", (6, 8), bias_axes="c")(x))))


def test_einsums_are_mended_as_dense_layers_are() -> None:
    model = attention()
    coupling = coppice.couple(coppice.capture(model, (1, 6, 12)))
    nothing = coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": coupling.cost().macs})
    spoilt = coppice.apply(model, nothing)
    kernels = {name: variable for name, variable in variables_of(spoilt).items() if name.endswith("kernel")}
    for variable in kernels.values():
        variable.assign(variable.value * 0.7)
    x = [RNG.standard_normal((16, 6, 12)).astype("float32") for _ in range(24)]
    done = {refit.weight: refit for refit in coppice.repair(model, spoilt, coupling, nothing, x)}
    assert done.keys() == kernels.keys()
    assert len(kernels) == 7
    assert all(refit.after < 1e-2 * refit.before for refit in done.values()), done


@pytest.mark.parametrize("layout", FORMATS)
def test_a_cut_model_is_nearer_to_the_dense_one(layout: str) -> None:
    model = zoo(layout)
    x = batches(layout)
    reestimate(model, x)
    coupling = coppice.couple(coppice.capture(model, (1, *model.input_shape[1:])))
    plan = random_plan(coupling, np.random.default_rng(0))
    pruned = coppice.apply(model, plan)
    found = recover(model, pruned, coupling, plan, x, lambda cut: reestimate(cut, x))
    tried = dict(found.tried)
    assert found.refused is None
    assert found.refitted >= 6
    assert tried[REFITTED] < tried[AS_CUT]
    assert tried[found.kept] == min(tried.values())
    again = coppice.apply(model, plan)
    without = recover(model, again, coupling, plan, x, lambda cut: reestimate(cut, x), refit=False)
    assert [name for name, _ in without.tried] == [AS_CUT, REESTIMATED]


def test_what_makes_it_worse_is_not_kept() -> None:
    model = zoo("channels_last")
    coupling = coppice.couple(coppice.capture(model, (1, 9, 9, 3)))
    plan = random_plan(coupling, np.random.default_rng(0))
    pruned = coppice.apply(model, plan)
    before = weights_in(pruned)

    def spoil(cut: Any) -> None:
        for layer in cut.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.moving_mean.assign(np.full(layer.moving_mean.shape, 1e3, "float32"))

    found = recover(model, pruned, coupling, plan, batches("channels_last"), spoil, refit=False)
    assert found.kept == AS_CUT
    assert all(np.array_equal(a, b) for a, b in zip(before.values(), weights_in(pruned).values(), strict=True))
