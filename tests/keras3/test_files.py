"""Files that mean harm, or are broken: one sentence, nothing run, bounded memory; and files with a user's own classes, or weights only."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from coppice.cli import run
from coppice.errors import CoppiceError
from coppice.keras.files import load_keras
from coppice.keras.opening import open_model


def small() -> Any:
    return keras.Sequential([keras.Input((4,)), layers.Dense(8, name="first"), layers.Dense(3)])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small().save(tmp_path / "net.keras")
    return tmp_path / "net.keras"


def changed(path: Path, edit: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    edit(entries)
    out = path.with_name("changed.keras")
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out


def configured(path: Path, edit: Callable[[Any], None]) -> Path:
    def rewrite(entries: dict[str, bytes]) -> None:
        config = json.loads(entries["config.json"])
        edit(config)
        entries["config.json"] = json.dumps(config).encode()

    return changed(path, rewrite)


def test_a_good_file(saved: Path) -> None:
    assert len(load_keras(saved).weights) == 4


def test_shape_bomb(saved: Path) -> None:
    path = configured(saved, lambda config: config["config"]["layers"][-1]["config"].update(units=10**9))
    with pytest.raises(CoppiceError, match="asks for"):
        load_keras(path)


def test_zip_bomb(saved: Path) -> None:
    def swell(entries: dict[str, bytes]) -> None:
        entries["assets/zeros"] = b"\0" * 50_000_000

    with pytest.raises(CoppiceError, match="unpacks to more than"):
        load_keras(changed(saved, swell, zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "..\\outside"])
def test_paths_that_lead_out(saved: Path, name: str) -> None:
    with pytest.raises(CoppiceError, match="leads out"):
        load_keras(changed(saved, lambda entries: entries.update({name: b"x"})))
    assert not (saved.parent.parent / "outside").exists()


def test_weights_that_are_said_to_be_huge(saved: Path) -> None:
    def rewrite(entries: dict[str, bytes]) -> None:
        stream = io.BytesIO()
        with h5py.File(stream, "w") as file:
            file.create_dataset("layers/first/vars/0", shape=(10**6, 10**6), dtype="f4", chunks=(100, 100), compression="gzip")
        entries["model.weights.h5"] = stream.getvalue()

    with pytest.raises(CoppiceError, match="the file has fewer"):
        load_keras(changed(saved, rewrite))


def test_weights_elsewhere(saved: Path) -> None:
    def rewrite(entries: dict[str, bytes]) -> None:
        stream = io.BytesIO()
        with h5py.File(stream, "w") as file:
            file["layers"] = h5py.ExternalLink("/etc/hostname", "/")
        entries["model.weights.h5"] = stream.getvalue()

    with pytest.raises(CoppiceError, match="a link to somewhere else"):
        load_keras(changed(saved, rewrite))


def spoilt(path: Path, edit: Callable[[h5py.File], None]) -> Path:
    """The file of weights with something done to it."""
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def in_circles(file: h5py.File) -> None:
    file["layers/round"] = file["layers"]


def twice(file: h5py.File) -> None:
    file["layers/again"] = file["layers/dense/vars/0"]


def elsewhere(file: h5py.File) -> None:
    file["layers/out"] = h5py.ExternalLink("/etc/hostname", "/")


def by_name(file: h5py.File) -> None:
    file["layers/soft"] = h5py.SoftLink("/layers/dense")


def outside(file: h5py.File) -> None:
    file.create_dataset("layers/raw", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", shape=(4,))
    file.create_virtual_dataset("layers/virtual", layout)


def huge(file: h5py.File) -> None:
    file.create_dataset("layers/huge", (10**6, 10**6), "f4", chunks=(100, 100), compression="gzip")


def many(file: h5py.File) -> None:
    for k in range(100):
        file.create_dataset(f"layers/many{k}", (1000,), "f4", chunks=(1000,), compression="gzip")


def text(file: h5py.File) -> None:
    file["layers/text"] = ["x" * 1000] * 10


HARM = [
    (in_circles, "lie in it twice"),
    (twice, "lie in it twice"),
    (elsewhere, "a link to somewhere else"),
    (by_name, "a link to somewhere else"),
    (outside, "the file has fewer"),
    (virtual, "the file has fewer"),
    (huge, "the file has fewer"),
    (many, "larger than the file"),
    (text, "are no numbers"),
]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    small().save_weights(tmp_path / "net.weights.h5")
    (tmp_path / "net.json").write_text(small().to_json())
    return tmp_path / "net.weights.h5"


@pytest.mark.parametrize(("edit", "message"), HARM, ids=lambda x: getattr(x, "__name__", ""))
def test_weights_that_mean_harm(edit: Callable[[h5py.File], None], message: str, weights: Path, saved: Path) -> None:
    """In a file of their own, and within a .keras file."""
    with pytest.raises(CoppiceError, match=message):
        open_model(str(weights.with_name("net.json")), str(spoilt(weights, edit)))
    inner = saved.with_name("inner.h5")

    def rewrite(entries: dict[str, bytes]) -> None:
        inner.write_bytes(entries["model.weights.h5"])
        entries["model.weights.h5"] = spoilt(inner, edit).read_bytes()

    with pytest.raises(CoppiceError, match=message):
        load_keras(changed(saved, rewrite))


def test_an_architecture_and_its_weights(weights: Path, saved: Path) -> None:
    trained = small()
    trained.set_weights([w + 1 for w in trained.get_weights()])
    trained.save_weights(weights)
    code = weights.with_name("net.py")
    code.write_text(
        "import keras\n"
        "def make(num_classes=3):\n"
        "    dense = keras.layers.Dense\n"
        "    return keras.Sequential([keras.Input((4,)), dense(8, name='first'), dense(num_classes)])\n"
    )
    for spec in (weights.with_name("net.json"), f"{code}:make", saved):
        model = open_model(str(spec), str(weights), num_classes=3)
        assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), trained.get_weights(), strict=True))
    with pytest.raises(CoppiceError, match="another model: layers/dense_1/vars/0 has 96 bytes, the model's 160"):
        open_model(f"{code}:make", str(weights), num_classes=5)


def test_weights_of_another_model(weights: Path) -> None:
    keras.Sequential([keras.Input((4,)), layers.Dense(8)]).save_weights(weights)
    with pytest.raises(CoppiceError, match="another model: layers/dense_1/vars/0 is only in the model"):
        open_model(str(weights.with_name("net.json")), str(weights))
    keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3), layers.Dense(3)]).save_weights(weights)
    with pytest.raises(CoppiceError, match="another model: layers/dense_2/vars/0 is only in the file"):
        open_model(str(weights.with_name("net.json")), str(weights))


def test_an_architecture_that_asks_for_more_than_there_is(weights: Path) -> None:
    config = json.loads(weights.with_name("net.json").read_text())
    config["config"]["layers"][-1]["config"]["units"] = 10**9
    weights.with_name("net.json").write_text(json.dumps(config))
    with pytest.raises(CoppiceError, match="asks for"):
        open_model(str(weights.with_name("net.json")), str(weights))


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"class_name": "Dense", "module": "os", "config": {}}', '{"a": 1}'])
def test_no_architecture(content: str, weights: Path) -> None:
    weights.with_name("net.json").write_text(content)
    with pytest.raises(CoppiceError):
        open_model(str(weights.with_name("net.json")), str(weights))


def test_what_keras_2_kept_is_refused(tmp_path: Path, weights: Path) -> None:
    with h5py.File(tmp_path / "full.h5", "w") as file:
        file.attrs["model_config"] = "{}"
    with h5py.File(tmp_path / "old.weights.h5", "w") as file:
        file.attrs["layer_names"] = ["dense"]
    shutil.copy(weights, tmp_path / "renamed.h5")
    json_file = str(weights.with_name("net.json"))
    for spec, given, message in (
        (str(tmp_path / "full.h5"), "", "a whole model as Keras 2 kept it, which may hold code"),
        (json_file, str(tmp_path / "full.h5"), "holds a whole model as Keras 2 kept it"),
        (json_file, str(tmp_path / "old.weights.h5"), "holds weights as Keras 2 kept it"),
        (json_file, str(tmp_path / "renamed.h5"), r"only if its name ends in \.weights\.h5"),
        (json_file, str(tmp_path / "none.weights.h5"), "there is no weights file"),
        (json_file, json_file, r"in a file X\.weights\.h5"),
        (json_file, "", "has no weights: name their file"),
        (str(tmp_path / "none.json"), str(weights), "there is no model file"),
        (f"{tmp_path / 'none.py'}:make", str(weights), "there is no model file"),
        ("torchvision:resnet18", str(weights), "are those of a Keras model: name it as"),
    ):
        with pytest.raises(CoppiceError, match=message):
            open_model(spec, given)


def test_weights_cut_off_in_the_middle(weights: Path) -> None:
    content = weights.read_bytes()
    for part in (0.0, 0.3, 0.6, 0.9):
        weights.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(CoppiceError, match=r"truncated|damaged|no HDF5"):
            open_model(str(weights.with_name("net.json")), str(weights))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise SystemExit(3)", "could not be run: SystemExit"),
        ("x = 1", "has no factory 'make'"),
        ("def make(): return 1 / 0", "could not be built: ZeroDivisionError"),
        ("def make(): return 3", "makes a int, which is no Keras model"),
    ],
)
def test_factories_that_make_no_model(source: str, message: str, weights: Path) -> None:
    weights.with_name("net.py").write_text(source)
    with pytest.raises(CoppiceError, match=message):
        open_model(f"{weights.with_name('net.py')}:make", str(weights))


def test_the_commands_read_weights_only(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = str(weights.with_name("net.json"))
    assert run(["inspect", "--model", json_file, "--weights", str(weights), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["axes"]
    for arguments in (
        ["inspect", "--model", json_file],
        ["inspect", "--model", str(weights)],
        ["prune", "--model", json_file, "--weights", str(weights) + "x.h5", "--data", "digits", "--target", "macs=0.5"],
    ):
        out = weights.with_name("out")
        assert run([*arguments, *(["--out", str(out)] if arguments[0] == "prune" else [])]) == 2
        said = capsys.readouterr().err
        assert said.startswith("coppice: ")
        assert said.count("\n") == 1
        assert not out.exists()


def test_a_run_from_code_and_weights(tmp_path: Path) -> None:
    """The run folder names both, and gives a whole model."""
    code, weights, out = tmp_path / "net.py", tmp_path / "net.weights.h5", tmp_path / "run"
    code.write_text(
        "import keras\n"
        "def make():\n"
        "    rest = [keras.layers.Conv2D(16, 3), keras.layers.Flatten(), keras.layers.Dense(10)]\n"
        "    return keras.Sequential([keras.Input((8, 8, 1)), *rest])\n"
    )
    space: dict[str, Any] = {}
    exec(code.read_text(), space)
    space["make"]().save_weights(weights)
    options = ["--data", "digits", "--target", "macs=0.6", "--criterion", "l1", "--epochs", "0", "--out", str(out)]
    assert run(["prune", "--model", f"{code}:make", "--weights", str(weights), *options]) == 0
    assert load_keras(out / "model.keras").count_params() < space["make"]().count_params()
    assert run(["prune", "--resume", str(out)]) == 0
    weights.write_bytes(b"")
    assert run(["eval", "--model", str(out), "--data", "digits"]) == 0  # it needs the dense model no more


def test_code_in_the_configuration(tmp_path: Path) -> None:
    keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: 2 * x), layers.Dense(2)]).save(tmp_path / "l.keras")
    with pytest.raises(CoppiceError, match="Lambda layer"):
        load_keras(tmp_path / "l.keras")


def test_a_class_of_another_module_is_not_imported(saved: Path) -> None:
    path = configured(saved, lambda config: config["config"]["layers"][1].update(module="os", class_name="system", registered_name=None))
    with pytest.raises(CoppiceError, match="not Keras's own"):
        load_keras(path)


def test_a_users_class_needs_its_code(tmp_path: Path) -> None:
    code = tmp_path / "own.py"
    code.write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('own')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2 * x\n"
    )
    space: dict[str, Any] = {"__name__": "own"}
    exec(code.read_text(), space)
    keras.Sequential([keras.Input((4,)), layers.Dense(8), space["Twice"](), layers.Dense(2)]).save(tmp_path / "own.keras")
    del keras.saving.get_custom_objects()["own>Twice"]  # as in another process
    with pytest.raises(CoppiceError, match="--code"):
        load_keras(tmp_path / "own.keras")
    model = load_keras(tmp_path / "own.keras", code)
    assert np.allclose(model.layers[1](np.ones((1, 8), "float32")), 2)


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04" + b"\0" * 100])
def test_no_keras_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.keras").write_bytes(content)
    with pytest.raises(CoppiceError, match=r"truncated or no \.keras file"):
        load_keras(tmp_path / "x.keras")
    with pytest.raises(CoppiceError, match="there is no model file"):
        load_keras(tmp_path / "none.keras")


def test_cut_off_in_the_middle(saved: Path) -> None:
    content = saved.read_bytes()
    cut = saved.with_name("cut.keras")
    for part in (0.3, 0.6, 0.9):
        cut.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(CoppiceError):
            load_keras(cut)
    shutil.rmtree(saved.parent, ignore_errors=True)
