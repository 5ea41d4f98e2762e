"""Files that mean harm, or are broken: one sentence, nothing run, bounded memory; and files with a user's own classes."""

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

from coppice.errors import CoppiceError
from coppice.keras.files import load_keras


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
