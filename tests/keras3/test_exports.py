"""Exports: each file computes what the model does, for any batch, in a process that knows neither Keras nor coppice."""

from __future__ import annotations

import json
import subprocess
import sys
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
    "savedmodel": "import tensorflow\nm = tensorflow.saved_model.load('m.savedmodel')\ny = m.serve(x).numpy()",
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


@pytest.mark.parametrize("name", FORMATS)
def test_several_inputs_and_outputs_by_name(name: str, tmp_path: Path) -> None:
    """Exporters put them in orders of their own."""
    keras.utils.set_random_seed(2)
    late, early = keras.Input((4,), name="zeta"), keras.Input((6,), name="alpha")
    both = layers.Add()([layers.Dense(4)(early), late])
    outputs = [layers.Dense(3, name="z")(both), *(layers.Dense(k + 4, name=f"a{k}")(late) for k in range(10))]
    listed = keras.Model([late, early], outputs)
    named = keras.Model({"zeta": late, "alpha": early}, {"z": outputs[0], "a": outputs[1]})
    for k, model in enumerate((listed, named)):
        assert coppice.export(model, tmp_path / f"{k}{exports.FORMATS[name].suffix}", name).error <= RTOL


@pytest.mark.parametrize("name", FORMATS)
def test_a_fixed_batch(name: str, tmp_path: Path) -> None:
    start = keras.Input(batch_shape=(2, 8, 8, 3))
    model = keras.Model(start, layers.Dense(3)(layers.Reshape((-1,))(layers.Conv2D(8, 3)(start))))
    images = np.random.default_rng(0).standard_normal((5, 8, 8, 3)).astype("float32")
    assert coppice.export(model, tmp_path / f"m{exports.FORMATS[name].suffix}", name, images).batches == (2,)


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_file_never_reaches_its_place(name: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one weight is off."""
    found = exports.FORMATS[name]

    def wrong(given: Any, path: Path, opset: int | None) -> None:
        other = keras.models.clone_model(given)
        other.set_weights(given.get_weights())
        other.layers[-1].bias.assign(other.layers[-1].bias + np.eye(5)[0] * 0.01)
        found.write(other, path, opset)

    monkeypatch.setitem(exports.FORMATS, name, exports.Format(found.suffix, found.title, wrong, found.load, found.needs))
    with pytest.raises(VerificationError, match=f"{found.title} differs from Keras"):
        coppice.export(model, tmp_path / f"m{found.suffix}", name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["nan", "shape", "crash"])
def test_one_wrong_batch_size_is_enough(what: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that goes wrong on single inputs only."""
    found = exports.FORMATS["keras"]

    def load(path: Path, given: Any) -> exports.Answer:
        right = found.load(path, given)

        def answer(inputs: exports.Inputs) -> list[Any]:
            (y,) = right(inputs)
            if len(y) > 1:
                return [y]
            if what == "crash":
                raise RuntimeError("no kernel")
            return [y * np.nan if what == "nan" else y[:, :-1]]

        return answer

    monkeypatch.setitem(exports.FORMATS, "keras", exports.Format(found.suffix, found.title, found.write, load, found.needs))
    with pytest.raises(VerificationError, match="nothing was saved"):
        coppice.export(model, tmp_path / "m.keras", "keras")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in ("lite", "onnx") if name in FORMATS])
def test_what_a_format_has_no_op_for_is_one_sentence(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = keras.Input((6, 6, 3))
    x = keras.ops.erfinv(layers.Conv2D(4, 3, activation="sigmoid")(start)) if name == "onnx" else keras.ops.erf(layers.Conv2D(4, 3)(start))
    with pytest.raises(ExportError, match=r"[Ee]rf") as caught:
        coppice.export(keras.Model(start, layers.Flatten()(x)), tmp_path / f"m{exports.FORMATS[name].suffix}", name)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    said = capfd.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize(
    ("file", "arguments", "message"),
    [
        ("m.tflite", {"to": "pt2"}, "is written as one of keras, savedmodel, lite, onnx"),
        ("m.keras", {"to": "keras", "opset": 18}, "only ONNX has opsets"),
        ("m.bin", {"to": "keras"}, r"\.keras file; name it so"),
        ("none/m.keras", {"to": "keras"}, "there is no folder"),
        ("there.keras", {"to": "keras"}, "exists already"),
        ("m.keras", {"to": "keras", "inputs": np.zeros((4, 9, 9, 3))}, "does not fit it"),
        ("m.keras", {"to": "keras", "inputs": [np.zeros((4, 12, 12, 3))] * 2}, "takes 1 inputs, 2 were given"),
    ],
)
def test_bad_requests_are_one_sentence(file: str, arguments: dict[str, Any], message: str, model: Any, tmp_path: Path) -> None:
    (tmp_path / "there.keras").write_text("old")
    with pytest.raises(CoppiceError, match=message):
        coppice.export(model, tmp_path / file, **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["there.keras"]


@pytest.mark.skipif(BACKEND == "jax", reason="ONNX is not written on that backend")
def test_the_opset_can_be_chosen(model: Any, tmp_path: Path) -> None:
    import onnx

    coppice.export(model, tmp_path / "m.onnx", opset=17)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 17
    with pytest.raises(ExportError):
        coppice.export(model, tmp_path / "n.onnx", opset=999)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="that backend writes all of them")
@pytest.mark.parametrize("name", ["lite", "savedmodel"])
def test_what_another_backend_writes(name: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(CoppiceError, match=f"is not written on the backend {BACKEND}: .*set KERAS_BACKEND=tensorflow"):
        coppice.export(model, tmp_path / "m", name)


def test_a_package_that_is_missing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    if BACKEND != "jax":
        with pytest.raises(CoppiceError, match=r"ONNX needs the package onnxruntime: pip install 'coppice\[onnxruntime\]'"):
            coppice.export(model, tmp_path / "m.onnx")


def test_an_input_of_open_size_needs_data(tmp_path: Path) -> None:
    start = keras.Input((None, None, 3))
    model = keras.Model(start, layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(start)))
    with pytest.raises(CoppiceError, match="leaves the size of its input open"):
        coppice.export(model, tmp_path / "m.keras", "keras")
    assert coppice.export(model, tmp_path / "m.keras", "keras", np.ones((2, 9, 7, 3))).images == 4


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the digits, in a file."""
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("digits") / "net.keras"
    net = [keras.Input((8, 8, 1)), layers.Conv2D(8, 3, activation="relu"), layers.Flatten(), layers.Dense(10, activation="softmax")]
    keras.Sequential(net).save(path)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_the_command(name: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"out{exports.FORMATS[name].suffix}"
    assert run(["export", str(digits), "--to", name, "--out", str(out), "--data", "digits"]) == 0
    said = capsys.readouterr().out
    assert out.exists()
    assert "equals Keras within" in said
    assert "on 8 images of its data" in said
    assert run(["export", str(digits), "--to", name, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(digits), "--to", "pt2"], "a Keras model is written as one of"),
        ([str(tmp_path / "none.keras")], "there is no model file"),
        ([str(tmp_path)], "no run folder"),
        ([str(tmp_path), "--data", "digits"], "a run folder has its own data, code and weights: drop --data"),
        ([str(digits), "--to", "keras"], "exists already"),
    ):
        assert run(["export", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(BACKEND == "jax", reason="ONNX is not written on that backend")
@pytest.mark.usefixtures("busy_machine")
def test_a_run_is_exported_and_timed(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    options = ["--data", "digits", "--target", "macs=0.6", "--min-width", "4", "--round-to", "4", "--criterion", "l1", "--epochs", "0"]
    assert run(["prune", "--model", str(digits), *options, "--out", str(folder)]) == 0
    assert run(["export", str(folder)]) == 0
    assert "on 8 images of its data" in capsys.readouterr().out
    assert (folder / "model.onnx").exists()
    assert run(["measure", str(folder), "--runtime", "keras,onnxruntime", "--rounds", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [c["reference"] for c in found["comparisons"]] == [f"{digits} (dense)"] * 2
