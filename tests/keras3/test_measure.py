"""Timing Keras models where they will run. No test asserts how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.cli import run
from coppice.errors import CoppiceError
from coppice.runtimes import RUNTIMES, Subject

BACKEND = keras.backend.backend()
SHAPE = (8, 8, 1)
RUNTIMES_HERE = {"tensorflow": ["keras", "litert", "onnxruntime"], "torch": ["keras", "onnxruntime"], "jax": ["keras"]}[BACKEND]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("busy_machine")]  # the converters' own


def net(width: int = 8) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input(SHAPE), layers.Conv2D(width, 3, activation="relu"), layers.Flatten(), layers.Dense(10, activation="softmax")]
    )


@pytest.mark.parametrize("name", RUNTIMES_HERE)
def test_each_runtime_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    subject = Subject("net", SHAPE, tmp_path, network=net())
    for batch in (1, 3):
        found: Any = RUNTIMES[name].start(subject, batch, 1)()
        found = found[0] if isinstance(found, list) else found
        want = subject.network.predict_on_batch(subject.input(batch))
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-6)


def test_models_in_every_setting() -> None:
    found = coppice.measure({"wide": net(), "thin": net(4)}, SHAPE, RUNTIMES_HERE, batches=(1, 2), rounds=5)
    assert {(t.model, t.setting.runtime, t.setting.batch) for t in found.timings} == {
        (name, runtime, batch) for name in ("wide", "thin") for runtime in RUNTIMES_HERE for batch in (1, 2)
    }
    assert found.versions["keras"] == keras.__version__


def test_what_can_not_run_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    subject = Subject("net", SHAPE, tmp_path, network=net())
    with pytest.raises(CoppiceError, match="net is a Keras model, which PyTorch can't run"):
        subject.torch()
    for file, kind in (("a.onnx", "an ONNX file"), ("a.tflite", "a LiteRT file")):
        with pytest.raises(CoppiceError, match=f"net is {kind}, which Keras can't run"):
            Subject("net", SHAPE, tmp_path, file=Path(file)).keras()
    with pytest.raises(CoppiceError, match="net is a LiteRT file, which a runtime of ONNX files can't run"):
        _ = Subject("net", SHAPE, tmp_path, file=Path("a.tflite")).onnx
    with pytest.raises(CoppiceError, match="net is an ONNX file, which LiteRT can't run"):
        _ = Subject("net", SHAPE, tmp_path, file=Path("a.onnx")).lite


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, width in (("wide", 8), ("thin", 4)):
        net(width).save(tmp_path / f"{name}.keras")
    files = [str(tmp_path / f"{name}.keras") for name in ("wide", "thin")]
    assert run(["measure", *files, "--rounds", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {t["setting"]["runtime"] for t in found["timings"]} == {"keras"}
    assert [c["model"] for c in found["comparisons"]] == files[1:]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT files are written on TensorFlow")
def test_the_command_on_exported_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width, to in ((8, "lite"), (4, "lite")):
        coppice.export(net(width), tmp_path / f"{width}.tflite", to)
    assert run(["measure", str(tmp_path / "8.tflite"), str(tmp_path / "4.tflite"), "--rounds", "5", "--batch", "2", "--json"]) == 0
    assert [t["setting"]["runtime"] for t in json.loads(capsys.readouterr().out)["timings"]] == ["litert"] * 2
    (tmp_path / "cut.tflite").write_bytes((tmp_path / "8.tflite").read_bytes()[:100])
    for arguments, message in (
        ([str(tmp_path / "cut.tflite")], "truncated or no LiteRT file"),
        ([str(tmp_path / "none.tflite")], "there is no file"),
        ([str(tmp_path / "8.tflite"), "--runtime", "keras"], "is a LiteRT file, which Keras can't run"),
    ):
        assert run(["measure", *arguments]) == 2
        assert message in capsys.readouterr().err
