"""Whole networks on every backend: residual, attention, nested and shared layers, generated ones; saved, loaded, trained on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.errors import CoppiceError, VerificationError
from coppice.keras.apply import weights_in
from coppice.rules import LINES
from cutting import proven

BACKEND = keras.backend.backend()


def residual() -> Any:
    start = keras.Input((12, 12, 3))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(start)
    for width in (16, 24):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", use_bias=False)(x)))
        gate = layers.Dense(width, activation="sigmoid")(
            layers.Dense(8, activation="relu")(layers.GlobalAveragePooling2D(keepdims=True)(y))
        )
        y = layers.Conv2D(x.shape[-1], 3, padding="same")(layers.Multiply()([y, gate]))
        x = layers.Concatenate()([layers.Add()([x, y]), layers.AveragePooling2D(3, strides=1, padding="same")(x)])
    return keras.Model(start, layers.Dense(5, activation="softmax")(layers.Flatten()(layers.MaxPooling2D(3)(x))))


def transformer() -> Any:
    start = keras.Input((8, 8, 3))
    x = layers.Reshape((16, 24))(layers.Conv2D(24, 2, strides=2)(start))
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 8)(y, y)
        y = layers.Dense(48, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(24)(layers.Dropout(0.1)(y))
    return keras.Model(start, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def nested() -> Any:
    """A block used twice, a stem of its own, and a shared layer."""
    stem = keras.Sequential([keras.Input((10, 10, 3)), layers.Conv2D(12, 3, activation="relu"), layers.Conv2D(12, 1)])
    inside = keras.Input((None, None, 12))
    block = keras.Model(inside, inside + layers.Conv2D(12, 3, padding="same")(layers.Conv2D(20, 1, activation="relu")(inside)))
    shared = layers.Conv2D(12, 1, name="shared")
    start = keras.Input((10, 10, 3))
    x = block(shared(block(shared(stem(start)))))
    return keras.Model(start, layers.Dense(4)(layers.GlobalMaxPooling2D()(x)))


def depthwise() -> Any:
    return keras.Sequential(
        [
            keras.Input((14, 14, 3)), layers.Conv2D(8, 3, strides=2), layers.DepthwiseConv2D(3, depth_multiplier=2), layers.ReLU(6.0),
            layers.SeparableConv2D(12, 3), layers.Conv2DTranspose(8, 2, strides=2), layers.Flatten(), layers.Dense(3),
        ]
    )  # fmt: skip


NETWORKS = {
    f.__name__: (f, (2, *size))
    for f, size in ((residual, (12, 12, 3)), (transformer, (8, 8, 3)), (nested, (10, 10, 3)), (depthwise, (14, 14, 3)))
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_cut_at_random_computes_what_the_plan_says(name: str) -> None:
    make, shape = NETWORKS[name]
    pruned, _, plan = proven(make(), shape)
    assert any(len(axis.keep) < axis.width for axis in plan.axes)
    assert type(pruned) in (keras.Model, keras.Sequential, type(residual()))


@pytest.mark.parametrize("seed", range(2 if BACKEND == "jax" else 8))
def test_generated_networks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = keras.Input((9, 9, 3))
    x = layers.Conv2D(int(rng.integers(4, 13)), 3)(start)
    heads = [x]
    for _ in range(int(rng.integers(2, 6))):
        x = heads[int(rng.integers(len(heads)))]
        width = int(rng.integers(2, 7)) * 2
        kind = int(rng.integers(6))
        if kind == 0:
            x = layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same", groups=2 if x.shape[-1] % 2 == 0 else 1)(x))
        elif kind == 1:
            x = layers.Add()([x, layers.Conv2D(x.shape[-1], 1, activation="relu")(x)])
        elif kind == 2:
            x = layers.Concatenate()([x, layers.SeparableConv2D(width, 3, padding="same")(x)])
        elif kind == 3:
            x = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
        elif kind == 4:
            x = layers.GroupNormalization(2 if x.shape[-1] % 2 == 0 else -1)(x)
        else:
            x = layers.Multiply()([x, keras.ops.sigmoid(keras.ops.mean(x, axis=(1, 2), keepdims=True))])
        heads.append(x)
    model = keras.Model(start, layers.Dense(3)(layers.Flatten()(layers.MaxPooling2D(3)(layers.Concatenate()(heads[-2:])))))
    proven(model, (2, 9, 9, 3), seed=seed)


def test_the_rules_of_this_front_end_are_run() -> None:
    """Those that no test of the PyTorch front-end runs."""
    made = [coppice.capture(make(), shape) for make, shape in NETWORKS.values()]
    rules = {op.rule for graph in made for op in graph.ops}
    own = {"conv_kernel_first", "conv_transpose_kernel_first", "depthwise_conv", "dense", "einsum", "attention_heads", "spatial_last"}
    assert own <= rules
    assert "spatial_first" in LINES


def test_saved_and_loaded_without_coppice(tmp_path: Path) -> None:
    pruned, _, _ = proven(residual(), (1, 12, 12, 3))
    pruned.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    have, want = weights_in(again), weights_in(pruned)
    assert have.keys() == want.keys()
    assert all(have[name].tobytes() == want[name].tobytes() for name in want)
    x = np.random.default_rng(0).standard_normal((3, 12, 12, 3)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, keras, numpy as np; m = keras.saving.load_model(sys.argv[1] + '/small.keras');"
        "np.save(sys.argv[1] + '/y.npy', m.predict(np.load(sys.argv[1] + '/x.npy'), verbose=0)); assert 'coppice' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, "KERAS_BACKEND": BACKEND}, capture_output=True
    )
    assert np.array_equal(np.load(tmp_path / "y.npy"), pruned.predict(x, verbose=0))


def test_loss_metrics_and_the_state_of_the_optimiser_go_along() -> None:
    model = depthwise()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    x = np.random.default_rng(0).standard_normal((8, 14, 14, 3)).astype("float32")
    model.fit(x, np.arange(8) % 3, epochs=2, verbose=0)
    pruned, _, plan = proven(model, (1, 14, 14, 3))
    assert int(pruned.optimizer.iterations.value) == 2
    names = [v.path for v in model.trainable_variables]
    masks = next(iter(plan.changed().values()))
    slots = {v.path.rpartition("/")[2]: keras.ops.convert_to_numpy(v) for v in model.optimizer.variables}
    cut = {v.path.rpartition("/")[2]: keras.ops.convert_to_numpy(v) for v in pruned.optimizer.variables}
    first = names[0].replace("/", "_") + "_momentum"
    assert np.array_equal(slots[first][np.ix_(*(np.flatnonzero(m) for m in masks))], cut[first])
    history = pruned.fit(x, np.arange(8) % 3, epochs=1, verbose=0).history
    assert {"loss", "accuracy"} <= history.keys()


def test_the_model_given_is_left_as_it_is() -> None:
    model = nested()
    before = weights_in(model)
    proven(model, (2, 10, 10, 3))
    assert all(np.array_equal(before[name], array) for name, array in weights_in(model).items())


def test_a_subclassed_model_is_refused_in_a_sentence() -> None:
    class Own(keras.Model):
        def call(self, x: Any) -> Any:
            return x

    with pytest.raises(CoppiceError, match="subclassed"):
        coppice.capture(Own(), (1, 4))
    with pytest.raises(CoppiceError, match="has not been built"):
        coppice.capture(keras.Sequential([layers.Dense(3)]), (1, 4))
    with pytest.raises(CoppiceError, match="does not fit"):
        coppice.capture(residual(), (1, 8, 8, 3))


def test_one_layer_in_two_nested_models_is_refused_in_a_sentence() -> None:
    """Keras itself can't save such a model."""
    shared = layers.Dense(8, name="shared")
    nested = [keras.Sequential([keras.Input((8,)), shared], name=name) for name in ("a", "b")]
    with pytest.raises(CoppiceError, match="a/shared and b/shared are one layer"):
        coppice.capture(keras.Sequential([keras.Input((8,)), *nested]), (1, 8))


def test_a_wrong_model_does_not_pass() -> None:
    model = residual()
    pruned, coupling, plan = proven(model, (1, 12, 12, 3))
    kernel = pruned.layers[1].kernel
    kernel.assign(keras.ops.flip(kernel, axis=-1))
    with pytest.raises(VerificationError, match="does not hold the dense model's kept values"):
        coppice.verify(model, pruned, coupling, plan)


def test_a_wrong_rule_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output channels of a depthwise convolution are channel by channel, not multiplier by multiplier."""
    from coppice.rules import Rule

    monkeypatch.setitem(LINES, "depthwise_conv", Rule("n ~... c, ~... c m, (m c) -> n ~... (m c)"))
    with pytest.raises(VerificationError):
        proven(depthwise(), (1, 14, 14, 3))


@pytest.mark.skipif(BACKEND == "torch", reason="that backend is PyTorch")
def test_no_pytorch_is_needed() -> None:
    proven(residual(), (1, 12, 12, 3))
    assert "torch" not in sys.modules
