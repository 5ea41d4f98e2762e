"""Subclassed models: made Functional with the same layers, and refused where their code is more than calls of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import coppice
from coppice.errors import CoppiceError
from cutting import proven

CODE = """
import keras
from keras import layers, ops

class Block(layers.Layer):
    def __init__(self, width, **options):
        super().__init__(**options)
        self.width = width
        self.conv = layers.Conv2D(width, 3, padding="same")
        self.rest = [layers.BatchNormalization(), layers.Dropout(0.3)]
    def call(self, x, training=False):
        norm, drop = self.rest
        return x + drop(ops.relu(norm(self.conv(x), training=training)))
    def build(self, shape):
        for layer in (self.conv, *self.rest):
            layer.build(shape)

@keras.saving.register_keras_serializable("tests")
class Net(keras.Model):
    def __init__(self, width=16, **options):
        super().__init__(**options)
        self.width = width
        self.stem = layers.Conv2D(width, 3)
        self.blocks = [Block(width) for _ in range(2)]
        self.pool, self.head = layers.GlobalAveragePooling2D(), layers.Dense(10)
    def call(self, x, training=False):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(self.pool(x))
    def get_config(self):
        return {**super().get_config(), "width": self.width}

def make():
    model = Net()
    model(ops.zeros((1, 8, 8, 1)))
    return model
"""


@pytest.fixture
def net() -> Any:
    space: dict[str, Any] = {"__name__": "subclassed"}
    exec(CODE, space)
    return space["make"]()


def test_the_same_layers_cut_verified_and_saved(net: Any, tmp_path: Path) -> None:
    net.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model = coppice.as_functional(net)
    assert {id(w) for w in model.weights} == {id(w) for w in net.weights}
    pruned, coupling, _ = proven(model, (2, 8, 8, 1))
    assert len(coupling.prunable) == 1  # the residual stream
    assert pruned.count_params() < net.count_params()
    pruned.save(tmp_path / "small.keras")
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 1)).astype("float32")
    again = keras.saving.load_model(tmp_path / "small.keras")
    assert np.array_equal(again.predict_on_batch(x), pruned.predict_on_batch(x))
    assert np.isfinite(pruned.train_on_batch(x, np.arange(4))[0])
    drop = next(layer for layer in pruned.layers if isinstance(layer, layers.Dropout))
    assert float(ops.std(drop(np.ones((4, 64), "float32"), training=True))) > 0  # training is not frozen into it


def test_it_still_trains_as_it_did(net: Any) -> None:
    """A default of training=False in the code is not taken for what the layers are always told."""
    model = coppice.as_functional(net, (1, 8, 8, 1))
    norm = next(layer for layer in model.layers if isinstance(layer, layers.BatchNormalization))
    before = ops.convert_to_numpy(norm.moving_mean.value).copy()
    model(np.ones((2, 8, 8, 1), "float32"), training=True)
    assert not np.array_equal(before, ops.convert_to_numpy(norm.moving_mean.value))


def test_the_command_line_takes_one(net: Any, tmp_path: Path) -> None:
    """With its code, from a whole file, and from weights only."""
    from coppice.keras.opening import open_model

    code = tmp_path / "net.py"
    code.write_text(CODE)
    net.save(tmp_path / "net.keras")
    net.save_weights(tmp_path / "net.weights.h5")
    x = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype("float32")
    want = net.predict_on_batch(x)
    for model in (open_model(str(tmp_path / "net.keras"), code=str(code)), open_model(f"{code}:make", str(tmp_path / "net.weights.h5"))):
        np.testing.assert_allclose(model.predict_on_batch(x), want, rtol=1e-5, atol=1e-6)
        assert coppice.couple(coppice.capture(model, (1, 8, 8, 1))).prunable


class OnValues(keras.Model):
    def call(self, x: Any) -> Any:
        return x * 2 if float(ops.sum(x)) > 0 else x


class OwnWeight(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)
        self.scale = self.add_weight(shape=(3,), initializer="ones")

    def call(self, x: Any) -> Any:
        return self.dense(x) * self.scale


class OtherwiseInTraining(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.dense(ops.relu(x)) if training else self.dense(x)


class OwnStep(OwnWeight):
    def train_step(self, data: Any) -> Any:
        return {}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OnValues, "whose code can't be followed"),
        (OwnWeight, "outside of a layer, or never"),
        (OtherwiseInTraining, "something else while training"),
        (OwnStep, "has its own train_step"),
    ],
)
def test_code_that_is_more_than_layers_is_refused(kind: type, message: str) -> None:
    with pytest.raises(CoppiceError, match=message) as caught:
        coppice.as_functional(kind(), (2, 4))
    assert "\n" not in str(caught.value)


def test_a_model_that_was_never_built_is_refused() -> None:
    with pytest.raises(CoppiceError, match="never built: call it once"):
        coppice.as_functional(OwnWeight())
