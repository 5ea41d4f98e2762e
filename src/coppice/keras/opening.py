"""A Keras model by what a command line names: `FILE.keras`, or an architecture (`FILE.json`, `FILE.py:factory`) and `X.weights.h5`."""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import keras

from coppice.errors import CoppiceError
from coppice.frameworks import HDF5
from coppice.keras.files import LARGEST_CONFIG, check_classes, check_size, load_keras, one_line, run_users_code
from coppice.keras.functional import plain
from coppice.keras.hdf5 import arrays_in, attributes_of

WEIGHTS = ".weights.h5"  # as Keras 3 calls a file of weights and nothing else


def open_model(spec: str, weights: str = "", code: str = "", num_classes: int = 0) -> Any:
    """The model that ``spec`` names, with these weights. Raises CoppiceError, whatever is wrong with it."""
    file, users = Path(weights) if weights else None, Path(code) if code else None
    source, _, name = spec.rpartition(":")
    if spec.endswith(HDF5):
        raise CoppiceError(
            f"{spec} is a whole model as Keras 2 kept it, which may hold code: load it with Keras where you trust it, and save it as .keras"
        )
    held = None if file is None else _check_weights(file)
    if spec.endswith(".keras"):
        model = load_keras(Path(spec), users)
    elif held is None:
        raise CoppiceError(f"{spec} has no weights: name their file with --weights, as X{WEIGHTS}")
    elif spec.endswith(".json"):
        model = _of_json(Path(spec), users, sum(held.values()))
    elif source.endswith(".py"):
        model = _made(Path(source), name, num_classes)
    else:
        raise CoppiceError(f"--weights {weights} are those of a Keras model: name it as FILE.keras, FILE.json or FILE.py:factory")
    if file is not None and held is not None:
        _take_weights(model, file, held)
    return plain(model)


def _check_weights(path: Path) -> dict[str, int]:
    """The arrays of a file of weights, if it is one that Keras 3 wrote."""
    if not path.is_file():
        raise CoppiceError(f"there is no weights file {path}")
    if path.suffix not in HDF5:
        raise CoppiceError(f"{path}: the weights of a Keras model are in a file X{WEIGHTS}, as model.save_weights writes it")
    said = attributes_of(path)
    if said & {"model_config", "layer_names"}:
        kind = "a whole model" if "model_config" in said else "weights"
        raise CoppiceError(f"{path} holds {kind} as Keras 2 kept it: load it with Keras where you trust it, and save it as .keras")
    if not path.name.endswith(WEIGHTS):
        raise CoppiceError(f"{path}: Keras reads a file of weights only if its name ends in {WEIGHTS}, name it so")
    return arrays_in(path, path, path.stat().st_size)


def _of_json(path: Path, code: Path | None, held: int) -> Any:
    """The architecture that `model.to_json` wrote, if it asks for no more weights than there are, and for no code."""
    if not path.is_file():
        raise CoppiceError(f"there is no model file {path}")
    if path.stat().st_size > LARGEST_CONFIG:
        raise CoppiceError(f"{path} was refused: it is larger than {LARGEST_CONFIG >> 20} MB")
    if code is not None:
        run_users_code(code)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CoppiceError(f"{path} is truncated or no JSON: write the architecture again with model.to_json") from error
    if not isinstance(config, dict):
        raise CoppiceError(f"{path} holds no Keras model: write the architecture with model.to_json")
    check_classes(path, config, code)
    check_size(path, config, held)
    try:
        model = keras.saving.deserialize_keras_object({**config, "compile_config": None}, safe_mode=True)
    except Exception as error:  # Keras and the backends have errors of their own
        raise CoppiceError(f"{path} holds no model that Keras {keras.__version__} can build: {one_line(error)}") from error
    return model


def _made(path: Path, name: str, num_classes: int) -> Any:
    """What a user's own function makes."""
    if not path.is_file():
        raise CoppiceError(f"there is no model file {path}")
    factory = getattr(run_users_code(path), name, None)
    if not callable(factory):
        raise CoppiceError(f"{path} has no factory {name!r}")
    takes = "num_classes" in inspect.signature(factory).parameters
    try:
        model = factory(num_classes=num_classes) if num_classes and takes else factory()
    except Exception as error:  # the user's
        raise CoppiceError(f"{path}:{name} could not be built: {one_line(error)}") from error
    if not isinstance(model, keras.Model):
        raise CoppiceError(f"{path}:{name} makes a {type(model).__name__}, which is no Keras model: its weights are no {WEIGHTS} file")
    return model


def _take_weights(model: Any, path: Path, held: dict[str, int]) -> None:
    """Set the weights, if the file has the model's and no others: Keras itself passes over what it has no place for."""
    with tempfile.TemporaryDirectory(prefix="coppice-") as folder:
        own = Path(folder) / f"own{WEIGHTS}"
        model.save_weights(own)
        want = arrays_in(own, own, own.stat().st_size)
    have, want = _without_optimizer(held), _without_optimizer(want)
    for name in sorted(have.keys() | want.keys()):
        if name not in have or name not in want:
            where = "the file" if name in have else "the model"
            raise CoppiceError(f"{path} holds the weights of another model: {name} is only in {where}")
        if have[name] != want[name]:
            raise CoppiceError(f"{path} holds the weights of another model: {name} has {have[name]} bytes, the model's {want[name]}")
    try:
        model.load_weights(path)
    except Exception as error:  # Keras, HDF5 and the backends have errors of their own
        raise CoppiceError(f"{path} holds the weights of another model: {one_line(error)}") from error


def _without_optimizer(arrays: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in arrays.items() if not name.startswith("optimizer/")}
