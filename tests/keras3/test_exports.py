"""Exports: each file computes what the model does, for any batch, in a process that knows neither Keras nor coppice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.cli import run
from coppice.errors import CoppiceError, VerificationError
from coppice.exporting import RTOL, ExportError
from coppice.keras import export as exports

BACKEND = keras.backend.backend()
FORMATS = [name for name, found in exports.FORMATS.items() if BACKEND in found.needs]
pytestmark = pytest.mark.filterwarnings("ignore")  # the converters' own

PLAIN = """
import sys
for name in ("coppice", "keras", {hidden}):
    sys.modules[name] = None  # as where it is not installed
import numpy as np
x = np.load("x.npy")
{load}
np.save("y.npy", y)
"""
LOAD = {
    "onnx": "import onnxruntime\ns = onnxruntime.InferenceSession('m.onnx')\ny = s.run(None, {s.get_inputs()[0].name: x})[0]",
    "lite": (
        "from ai_edge_litert.interpreter import Interpreter\n"
        "i = Interpreter('m.tflite')\n(given,), (out,) = i.get_input_details(), i.get_output_details()\n"
        "i.resize_tensor_input(given['index'], x.shape)\ni.allocate_tensors()\ni.set_tensor(given['index'], x)\ni.invoke()\n"
        "y = i.get_tensor(out['index'])"
    ),
    "savedmodel": "import tensorflow\ny = tensorflow.saved_model.load('m.savedmodel').serve(x).numpy()",
}


def small() -> Any:
    """Convolutions, BatchNorm with statistics, GELU, attention of channels, softmax."""
    keras.utils.set_random_seed(1)
    start = keras.Input((12, 12, 3))
    x = layers.BatchNormalization()(layers.Conv2D(16, 3, strides=2, padding="same")(start))
    x = layers.Activation("gelu")(x)
    y = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.Multiply()([y, layers.Dense(16, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))])
    x = layers.Dense(24, activation="relu")(layers.Flatten()(layers.MaxPooling2D()(x)))
    model = keras.Model(start, layers.Dense(5, activation="softmax")(layers.Dropout(0.5)(x)))
    for weight in model.weights:
        weight.assign(weight + 0.1 * np.random.default_rng(2).random(weight.shape))
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    dense = small()
    coupling = coppice.couple(coppice.capture(dense, (1, 12, 12, 3)))
    plan = coppice.plan(coupling, coppice.score(dense, coupling, "l1"), {"macs": 0.6 * coupling.cost().macs})
    return coppice.apply(dense, plan)


@pytest.fixture
def images() -> Any:
    return np.random.default_rng(3).standard_normal((5, 12, 12, 3)).astype("float32")


@pytest.mark.parametrize("name", FORMATS)
def test_each_is_what_the_model_is(name: str, model: Any, images: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"m{exports.FORMATS[name].suffix}"
    check = coppice.export(model, path, name, images)
    assert check.error <= RTOL
    assert check.images == 5
    assert check.batches == (1, 3, 5)
    assert list(tmp_path.iterdir()) == [path]
    said = capfd.readouterr()
    assert said.out + said.err == ""
    if name in LOAD:
        np.save(tmp_path / "x.npy", images[:4])
        hidden = "" if name == "savedmodel" else "'tensorflow', 'torch'"
        code = PLAIN.format(hidden=hidden, load=LOAD[name])
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict_on_batch(images[:4]), rtol=1e-3, atol=1e-5)
