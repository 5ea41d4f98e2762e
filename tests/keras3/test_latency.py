"""Targets in milliseconds on Keras models: planned by MACs, timed where it will run, corrected. No test asserts how long anything takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers

import coppice
from coppice.cli import run
from coppice.deadline import SLACK, TimedModel, plan_on_time
from coppice.errors import CoppiceError, UnreachableError
from coppice.latency import latency_model
from coppice.planning import kept_widths
from coppice.timing import Measurement, Setting

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("busy_machine")]  # the converters' own
RUNTIME = {"tensorflow": "litert", "torch": "onnxruntime", "jax": "keras"}[keras.backend.backend()]
HERE = Setting("keras", 1, 1)


def net() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)), layers.Conv2D(32, 3, activation="relu"), layers.BatchNormalization(), layers.Conv2D(48, 3),
            layers.Flatten(), layers.Dense(32, activation="relu"), layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


class Overhead:
    """Every model takes 0.3 seconds, and up to 0.7 by its MACs."""

    setting = HERE

    def __init__(self, macs: int) -> None:
        self.macs = macs

    def time(self, model: Any) -> TimedModel:
        share = coppice.couple(coppice.capture(model, (1, 8, 8, 1))).cost().macs / self.macs
        return TimedModel(0.3 + 0.7 * share, Measurement((), (), {}, {}))


def test_what_goes_by_macs_is_corrected_by_what_is_measured() -> None:
    model = net()
    coupling = coppice.couple(coppice.capture(model, (1, 8, 8, 1)))
    predictor = latency_model(coupling, HERE, 1.0)
    assert predictor.predict() == pytest.approx(1.0)
    assert predictor.unexplained is None
    assert sum(predictor.layers().values()) == pytest.approx(1.0)
    scores = coppice.score(model, coupling, "l1")
    options: dict[str, Any] = {"round_to": 1, "min_width": 1}
    found = plan_on_time(model, coupling, scores, {"latency": 0.6}, Overhead(coupling.cost().macs), predictor, **options)  # type: ignore[arg-type]
    (predicted, measured), *corrected = found.tried
    assert predicted <= 0.6 < measured
    assert corrected
    assert found.timed.seconds <= 0.6 * (1 + SLACK)
    kept = coupling.cost(kept_widths(coupling, found.plan)).macs / coupling.cost().macs
    assert found.timed.seconds == pytest.approx(0.3 + 0.7 * kept)
    with pytest.raises(UnreachableError):
        plan_on_time(model, coupling, scores, {"latency": 1e-6}, Overhead(coupling.cost().macs), predictor)  # type: ignore[arg-type]
    flat = coppice.couple(coppice.capture(keras.Sequential([keras.Input((4,)), layers.ReLU()]), (1, 4)))
    with pytest.raises(CoppiceError, match="no convolution and no matrix product"):
        latency_model(flat, HERE, 1.0)


def test_milliseconds_and_bytes_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = net(), tmp_path / "run"
    model.save(tmp_path / "net.keras")
    options = ["--target", f"latency=0.9@{RUNTIME}", "--target", "bytes=0.5", "--criterion", "l1", "--epochs", "0", "--calibration", "32"]
    assert run(["prune", "--model", str(tmp_path / "net.keras"), "--data", "digits", *options, "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["pruned"]["bytes"] <= 0.5 * metrics["dense"]["bytes"]
    assert metrics["latency"]["setting"] == {"runtime": RUNTIME, "threads": 1, "batch": 1}
    assert metrics["latency"]["measured"] == metrics["pruned"]["latency"]
    assert metrics["latency"]["tried"]
    assert f"latency ({RUNTIME}, 1 thread, batch 1)" in metrics["statement"]
    assert metrics["met"] == (metrics["pruned"]["latency"] <= 0.9 * metrics["dense"]["latency"] * (1 + SLACK))
    assert "Promised before it was measured" in (out / "report.html").read_text()
    capsys.readouterr()
    assert run(["prune", "--resume", str(out)]) == 0


def test_a_runtime_that_a_keras_model_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net().save(tmp_path / "net.keras")
    options = ["--model", str(tmp_path / "net.keras"), "--data", "digits", "--target", "latency=0.7@torch", "--out", str(tmp_path / "run")]
    assert run(["prune", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "PyTorch" in err or "torch" in err
    assert not (tmp_path / "run").exists()
