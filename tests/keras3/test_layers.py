"""Every line of the table of layers, run: a layer between two that can be cut, at random widths, must compute what the plan says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from coppice.keras.layers import TABLE
from cutting import proven

Between = Callable[[Any], Any]


@dataclass(frozen=True)
class Case:
    """``make`` gets a tensor of ``shape`` whose last dim can be cut; ``free``: whether it still can be with the layer behind it."""

    name: str
    make: Between
    shape: tuple[int, ...] = (6, 6, 12)
    free: bool = True


def attend(query: Any) -> Any:
    return layers.MultiHeadAttention(4, 6, value_dim=5)(query, query)


def cross(query: Any) -> Any:
    memory = layers.Dense(10)(query)
    return layers.MultiHeadAttention(2, 4, output_shape=8)(query, memory)


def grouped(query: Any) -> Any:
    return layers.GroupQueryAttention(6, 6, 3)(query, query)


def merge(layer: Any) -> Between:
    return lambda x: layer([layers.Dense(8)(x), layers.Dense(8)(x)])


def embed(x: Any) -> Any:
    return layers.Embedding(5, 12)(keras.ops.cast(keras.ops.clip(keras.ops.sum(x, axis=-1), 0, 4), "int32"))


def scale(x: Any) -> Any:
    return _own("convnext", "LayerScale")(0.1, x.shape[-1])(x)


def depth(x: Any) -> Any:
    return _own("convnext", "StochasticDepth")(0.1)(x)


def custom(x: Any) -> Any:
    return _own("inception_resnet_v2", "CustomScaleLayer")(0.3)([layers.Dense(8)(x), layers.Dense(8)(x)])


def _own(module: str, name: str) -> Any:
    from importlib import import_module

    return getattr(import_module(f"keras.src.applications.{module}"), name)


@keras.saving.register_keras_serializable("tests")
def doubled(x: Any) -> Any:
    return 2 * x


ROW, SERIES, VOLUME = (7, 12), (8, 12), (4, 4, 4, 12)
CASES = [
    Case("Dense", layers.Dense(10, activation="relu"), (12,)),
    Case("Dense", layers.Dense(10, use_bias=False), ROW),
    Case("EinsumDense", layers.EinsumDense("abc,cd->abd", (7, 16), bias_axes="d"), ROW),
    Case("EinsumDense", layers.EinsumDense("abc,cde->abde", (7, 4, 6), bias_axes="de"), ROW),
    Case("EinsumDense", layers.EinsumDense("...x,xy->...y", 16, bias_axes="y"), ROW),
    Case("Conv1D", layers.Conv1D(8, 3, padding="causal", dilation_rate=2), SERIES),
    Case("Conv2D", layers.Conv2D(8, 3, strides=2, padding="same")),
    Case("Conv2D", layers.Conv2D(9, 3, groups=3, use_bias=False)),
    Case("Conv2D", layers.Conv2D(24, 3, groups=12)),
    Case("Conv3D", layers.Conv3D(8, 2, activation="gelu"), VOLUME),
    Case("Conv1DTranspose", layers.Conv1DTranspose(8, 3, strides=2), SERIES),
    Case("Conv2DTranspose", layers.Conv2DTranspose(8, 3, strides=2, padding="same")),
    Case("Conv3DTranspose", layers.Conv3DTranspose(8, 2), VOLUME),
    Case("DepthwiseConv1D", layers.DepthwiseConv1D(3), SERIES),
    Case("DepthwiseConv2D", layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2)),
    Case("SeparableConv1D", layers.SeparableConv1D(8, 3), SERIES),
    Case("SeparableConv2D", layers.SeparableConv2D(8, 3, depth_multiplier=2, padding="same")),
    Case("BatchNormalization", layers.BatchNormalization()),
    Case("BatchNormalization", layers.BatchNormalization(scale=False, center=False)),
    Case("LayerNormalization", layers.LayerNormalization(), ROW),
    Case("LayerNormalization", layers.LayerNormalization(axis=1), ROW, free=False),
    Case("RMSNormalization", layers.RMSNormalization(), ROW),
    Case("GroupNormalization", layers.GroupNormalization(4)),
    Case("GroupNormalization", layers.GroupNormalization(-1)),
    Case("UnitNormalization", layers.UnitNormalization(), ROW),
    Case("Embedding", embed, ROW),
    Case("PReLU", layers.PReLU(shared_axes=[1, 2])),
    Case("PReLU", layers.PReLU(), (12,)),
    Case("LayerScale", scale),
    Case("StochasticDepth", depth),
    Case("CustomScaleLayer", custom),
    Case("Normalization", layers.Normalization()),
    Case("MultiHeadAttention", attend, ROW),
    Case("MultiHeadAttention", cross, ROW),
    Case("GroupedQueryAttention", grouped, ROW),
    Case("Dropout", layers.Dropout(0.3)),
    Case("SpatialDropout1D", layers.SpatialDropout1D(0.3), SERIES),
    Case("SpatialDropout2D", layers.SpatialDropout2D(0.3)),
    Case("SpatialDropout3D", layers.SpatialDropout3D(0.3), VOLUME),
    Case("GaussianDropout", layers.GaussianDropout(0.3)),
    Case("GaussianNoise", layers.GaussianNoise(0.3)),
    Case("AlphaDropout", layers.AlphaDropout(0.3)),
    Case("ActivityRegularization", layers.ActivityRegularization(0.1)),
    Case("Identity", layers.Identity()),
    Case("ReLU", layers.ReLU(6.0)),
    Case("LeakyReLU", layers.LeakyReLU()),
    Case("ELU", layers.ELU()),
    Case("Rescaling", layers.Rescaling(1 / 255, offset=-1)),
    Case("Rescaling", layers.Rescaling([1.0] * 12), free=False),
    Case("Activation", layers.Activation("silu")),
    Case("Activation", layers.Activation("softmax"), ROW),
    Case("Activation", layers.Activation(doubled), free=False),
    Case("Softmax", layers.Softmax(), ROW),
    Case("MaxPooling1D", layers.MaxPooling1D(2), SERIES),
    Case("MaxPooling2D", layers.MaxPooling2D(2)),
    Case("MaxPooling3D", layers.MaxPooling3D(2), VOLUME),
    Case("AveragePooling1D", layers.AveragePooling1D(2), SERIES),
    Case("AveragePooling2D", layers.AveragePooling2D(2, padding="same")),
    Case("AveragePooling3D", layers.AveragePooling3D(2), VOLUME),
    Case("AdaptiveAveragePooling1D", layers.AdaptiveAveragePooling1D(2), SERIES),
    Case("AdaptiveAveragePooling2D", layers.AdaptiveAveragePooling2D(2)),
    Case("AdaptiveAveragePooling3D", layers.AdaptiveAveragePooling3D(2), VOLUME),
    Case("AdaptiveMaxPooling1D", layers.AdaptiveMaxPooling1D(2), SERIES),
    Case("AdaptiveMaxPooling2D", layers.AdaptiveMaxPooling2D(2)),
    Case("AdaptiveMaxPooling3D", layers.AdaptiveMaxPooling3D(2), VOLUME),
    Case("GlobalAveragePooling1D", layers.GlobalAveragePooling1D(), SERIES),
    Case("GlobalAveragePooling2D", layers.GlobalAveragePooling2D(keepdims=True)),
    Case("GlobalAveragePooling3D", layers.GlobalAveragePooling3D(), VOLUME),
    Case("GlobalMaxPooling1D", layers.GlobalMaxPooling1D(), SERIES),
    Case("GlobalMaxPooling2D", layers.GlobalMaxPooling2D()),
    Case("GlobalMaxPooling3D", layers.GlobalMaxPooling3D(), VOLUME),
    Case("ZeroPadding1D", layers.ZeroPadding1D(1), SERIES),
    Case("ZeroPadding2D", layers.ZeroPadding2D(((1, 0), (0, 1)))),
    Case("ZeroPadding3D", layers.ZeroPadding3D(1), VOLUME),
    Case("Cropping1D", layers.Cropping1D(1), SERIES),
    Case("Cropping2D", layers.Cropping2D(1)),
    Case("Cropping3D", layers.Cropping3D(1), VOLUME),
    Case("UpSampling1D", layers.UpSampling1D(2), SERIES),
    Case("UpSampling2D", layers.UpSampling2D(2, interpolation="bilinear")),
    Case("UpSampling3D", layers.UpSampling3D(2), VOLUME),
    Case("Resizing", layers.Resizing(4, 4)),
    Case("CenterCrop", layers.CenterCrop(4, 4)),
    Case("Flatten", layers.Flatten()),
    Case("Reshape", layers.Reshape((36, 3, 4))),
    Case("Reshape", layers.Reshape((-1, 12))),
    Case("Permute", layers.Permute((3, 1, 2))),
    Case("RepeatVector", layers.RepeatVector(3), (12,)),
    Case("Add", merge(layers.Add())),
    Case("Subtract", merge(layers.Subtract())),
    Case("Multiply", merge(layers.Multiply())),
    Case("Average", merge(layers.Average())),
    Case("Maximum", merge(layers.Maximum())),
    Case("Minimum", merge(layers.Minimum())),
    Case("Concatenate", merge(layers.Concatenate())),
]
if keras.backend.backend() == "torch":  # where Keras's own code fails on it
    CASES = [case for case in CASES if not (case.name == "LayerNormalization" and not case.free)]


def test_every_line_has_a_case() -> None:
    assert {case.name for case in CASES} == TABLE.keys()


@pytest.mark.filterwarnings("ignore:You are using a softmax over axis:UserWarning")  # Keras, of one channel that was kept
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{k}-{case.name}" for k, case in enumerate(CASES)])
def test_a_layer_between_two_that_are_cut(number: int) -> None:
    case = CASES[number]
    start = keras.Input((*case.shape[:-1], 5))
    x = case.make(layers.Dense(case.shape[-1], name="before")(start))
    out = layers.Dense(3, name="after")(layers.Flatten()(x))
    _, coupling, plan = proven(keras.Model(start, out), (2, *case.shape[:-1], 5), seed=number)
    before = coupling.on("before/kernel", 1)
    assert case.free == any(axis.pinned is None for axis in before), [axis.pinned for axis in before]
    assert not case.free or any(len(axis.keep) < axis.width for axis in plan.axes)


FIRST = [
    ("conv", lambda: layers.Conv2D(8, 3, groups=2)),
    ("transposed", lambda: layers.Conv2DTranspose(8, 3)),
    ("depthwise", lambda: layers.DepthwiseConv2D(3, depth_multiplier=2)),
    ("separable", lambda: layers.SeparableConv2D(8, 3)),
    ("batch norm", lambda: layers.BatchNormalization(axis=1)),
    ("group norm", lambda: layers.GroupNormalization(4, axis=1)),
    ("pool", lambda: layers.AveragePooling2D(2)),
    ("global pool", lambda: layers.GlobalAveragePooling2D()),
    ("flatten", lambda: layers.Flatten()),
    ("upsample", lambda: layers.UpSampling2D(2)),
]


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="TensorFlow's kernels for CPUs have no channels first")
@pytest.mark.parametrize(("name", "make"), FIRST, ids=[name for name, _ in FIRST])
def test_channels_first(name: str, make: Callable[[], Any]) -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        start = keras.Input((3, 8, 8))
        x = make()(layers.Conv2D(12, 3, name="before")(start))
        _, coupling, _ = proven(keras.Model(start, layers.Dense(2)(layers.Flatten()(x))), (2, 3, 8, 8))
    finally:
        keras.config.set_image_data_format("channels_last")
    assert any(axis.pinned is None for axis in coupling.on("before/kernel", 3))


def test_what_is_not_in_the_table_is_pinned_with_its_reason() -> None:
    start = keras.Input((8, 5))
    out = layers.Dense(2)(layers.LSTM(6)(layers.Dense(12, name="before")(start)))
    _, coupling, _ = proven(keras.Model(start, out), (1, 8, 5))
    assert coupling.axis("before/kernel:1").pinned == "no rule for LSTM"


def test_an_heir_of_a_known_layer_is_not_known() -> None:
    @keras.saving.register_keras_serializable("tests")
    class Doubled(layers.Dense):
        def call(self, inputs: Any) -> Any:
            return 2 * super().call(inputs) * keras.ops.arange(self.units, dtype=inputs.dtype)

    start = keras.Input((5,))
    model = keras.Model(start, layers.Dense(2)(Doubled(8, name="own")(layers.Dense(12)(start))))
    _, coupling, _ = proven(model, (1, 5))
    assert coupling.axis("own/kernel:1").pinned == "no rule for Doubled"
    assert np.isfinite(coupling.cost().macs)
