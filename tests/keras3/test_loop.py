"""The loop on a Keras model, from the command line and in Python: to a target, with a floor, resumed, and with a user's own loss."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.cli import run
from coppice.criteria import TRIED
from coppice.errors import CoppiceError
from coppice.keras.apply import weights_in
from coppice.keras.data import load_images
from coppice.keras.evaluate import evaluate
from coppice.keras.loop import prune
from coppice.preprocess import Preprocess
from coppice.progress import Silent
from coppice.recipe import Recipe


@pytest.fixture(scope="module")
def trained() -> Any:
    keras.utils.set_random_seed(0)
    data = load_images("digits", Preprocess())
    x, y = (np.concatenate(part) for part in zip(*data.train.batches(256), strict=True))
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)), layers.Conv2D(16, 3, activation="relu", padding="same"), layers.BatchNormalization(momentum=0.8),
            layers.MaxPooling2D(), layers.Conv2D(32, 3, activation="relu", padding="same"), layers.Flatten(),
            layers.Dense(32, activation="relu"), layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, epochs=6, batch_size=32, verbose=0)
    return model


@pytest.fixture
def net(trained: Any, tmp_path: Path) -> Path:
    trained.save(tmp_path / "net.keras")
    return tmp_path / "net.keras"


def test_from_the_command_line(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    options = ["--data", "digits", "--target", "macs=0.5", "--max-drop", "20", "--epochs", "1", "--augment", "none", "--batch-size", "64"]
    assert run(["prune", "--model", str(net), *options, "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["pruned"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    assert metrics["met"]
    assert metrics["history"][1]["repair"]["criterion"] == "obs"
    assert (out / "report.html").read_text().count("<svg") >= 3
    small = keras.saving.load_model(out / "model.keras")
    assert small.compiled
    assert {name: a.tobytes() for name, a in weights_in(small).items()} == {
        n: a.tobytes() for n, a in weights_in(coppice.load(out)).items()
    }
    capsys.readouterr()
    assert run(["eval", "--model", str(out), "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(metrics["pruned"]["top1"])
    assert run(["prune", "--resume", str(out)]) == 0
    assert "finished already" in capsys.readouterr().err
    assert run(["prune", "--config", str(out / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    again = keras.saving.load_model(tmp_path / "again" / "model.keras")
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(weights_in(small).values(), weights_in(again).values(), strict=True))


def test_inspect(net: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--model", str(net), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [axis["width"] for axis in found["axes"] if axis["pinned"] is None] == [16, 32, 32]


BAD = {
    "there is no model file": ["--model", "none.keras", "--data", "digits", "--target", "macs=0.5"],
    "PyTorch models only": ["--data", "digits", "--target", "macs=0.5", "--depth"],
    "nothing to reach": ["--data", "digits"],
    "--features works on PyTorch": ["--data", "digits", "--target", "macs=0.5", "--features", "0.1"],
    "can't be reached": ["--data", "digits", "--target", "macs=0.0001"],
    "there is no data": ["--data", "nowhere", "--target", "macs=0.5"],
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(said: str, net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = BAD[said] if "--model" in BAD[said] else ["--model", str(net), *BAD[said]]
    assert run(["prune", *options, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_of_several_criteria_the_best_cut_is_kept(trained: Any) -> None:
    said = Said()
    settings = {"criterion": "auto", "calibration": 64, "recipe": Recipe(epochs=0)}
    result = coppice.prune(trained, load_images("digits", Preprocess()), "macs=0.5", progress=said, **settings)
    (line,) = [text for text in said.lines if " it is; " in text]
    tried = dict(part.rsplit(" ", 1) for part in line.partition("validation images: ")[2].split(", "))
    assert set(tried) == set(TRIED)
    kept = result.metrics["history"][1]["repair"]["criterion"]
    assert kept == min(tried, key=lambda name: float(tried[name]))
    assert f" {kept} it is" in line


class Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class StoppedError(Exception):
    pass


def test_a_stopped_run_goes_on(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coppice.keras import loop

    data = load_images("digits", Preprocess())
    settings: dict[str, Any] = {
        "target": "macs=0.5",
        "recipe": Recipe(epochs=2, augment="none", distill=0.5),
        "steps": 2,
        "calibration": 64,
    }
    whole = prune(trained, data, out=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", _interrupt)
        with pytest.raises(StoppedError):
            prune(trained, data, out=tmp_path / "stopped", **settings)
    again = coppice.prune(trained, data, out=tmp_path / "stopped", **settings)
    assert again.plan == whole.plan
    assert all(
        np.allclose(a, b, atol=1e-5) for a, b in zip(weights_in(again.model).values(), weights_in(whole.model).values(), strict=True)
    )


def _interrupt(*_: Any) -> None:
    raise StoppedError


def test_own_batches_and_a_compiled_loss_of_one_hot_targets(trained: Any) -> None:
    data = load_images("digits", Preprocess())

    def part(images: Any) -> list[tuple[Any, Any]]:
        return [(x, np.eye(10, dtype="float32")[y]) for x, y in images.batches(64)]

    model = keras.models.clone_model(trained)
    model.set_weights(trained.get_weights())
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    settings = {"recipe": Recipe(epochs=1, distill=0.0), "calibration": 64}
    result = coppice.prune(model, (part(data.train), part(data.val), part(data.test)), "params=0.5", **settings)
    assert result.metrics["pruned"]["params"] <= 0.5 * result.metrics["dense"]["params"]
    assert result.model.loss == "categorical_crossentropy"
    assert evaluate(result.model, part(data.test)).top1 == pytest.approx(result.metrics["pruned"]["top1"])


def test_a_data_set_by_its_name(trained: Any) -> None:
    settings: dict[str, Any] = {"criterion": "l1", "repair": False, "recipe": Recipe(epochs=0)}
    named, opened = (prune(trained, data, "macs=0.5", **settings) for data in ("digits", load_images("digits", Preprocess())))
    assert all(np.array_equal(a, b) for a, b in zip(named.model.get_weights(), opened.model.get_weights(), strict=True))
    with pytest.raises(CoppiceError, match="give the data as the name of a data set"):
        prune(trained, ([], []), "macs=0.5")


def test_data_that_is_no_batches(trained: Any) -> None:
    def broken() -> Iterator[Any]:
        yield np.zeros((4, 8, 8, 1), "float32")

    with pytest.raises(CoppiceError, match="inputs, targets"):
        prune(trained, (list(broken()), list(broken()), list(broken())), "macs=0.5")


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="that backend is PyTorch")
def test_no_pytorch_is_needed_for_all_this() -> None:
    assert "torch" not in sys.modules
