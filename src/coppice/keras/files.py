"""Read a `.keras` file that may come from anywhere: what is in it is looked at before Keras builds anything, and nothing in it is run.

The file is a zip of a configuration, metadata and weights. Refused, each in one sentence: archives that unpack to far more than they hold
or whose entries lead elsewhere, configurations that ask for far more weights than the file has, code in the configuration (a Lambda layer),
and classes that are not Keras's own, unless the user names the file with their code.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import StatelessScope

from coppice.errors import CoppiceError
from coppice.keras.functional import plain
from coppice.keras.hdf5 import arrays_in

CONFIG, WEIGHTS = "config.json", "model.weights.h5"
RATIO = 100  # an archive that unpacks to more than this many times its size holds no weights
LARGEST_CONFIG = 2**26
SLACK = 2**20  # bytes that a small model's configuration may ask for beyond what its file holds
OWN = ("keras", "keras.src", "builtins")


def load_keras(path: Path, code: Path | None = None) -> Any:
    """The model in a `.keras` file. `code`: a Python file of the user's with the classes that it needs; it is executed.

    Raises CoppiceError if it is no such file, is damaged, asks for more than it holds, would run code, or is no model that can be pruned.
    """
    if not path.is_file():
        raise CoppiceError(f"there is no model file {path}")
    if code is not None:
        run_users_code(code)
    config, weights = _unpack(path)
    check_classes(path, config, code)
    check_size(path, config, sum(arrays_in(path, io.BytesIO(weights), len(weights)).values()))
    try:
        model = keras.saving.load_model(path, safe_mode=True)
    except Exception as error:  # Keras, HDF5 and the backends have errors of their own
        raise CoppiceError(f"{path} can't be loaded by Keras {keras.__version__}: {one_line(error)}") from error
    return plain(model)


def _unpack(path: Path) -> tuple[Any, bytes]:
    """The configuration and the weights' file, if the archive is what it says."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                place = PurePosixPath(entry.filename.replace("\\", "/"))
                if place.is_absolute() or ".." in place.parts or ":" in entry.filename:
                    raise CoppiceError(f"{path} was refused: its entry {entry.filename!r} leads out of the archive")
            if sum(entry.file_size for entry in entries) > RATIO * path.stat().st_size or len(entries) > 10_000:
                raise CoppiceError(f"{path} was refused: it unpacks to more than {RATIO} times its size")
            sizes = {entry.filename: entry.file_size for entry in entries}
            if sizes.get(CONFIG, 0) > LARGEST_CONFIG:
                raise CoppiceError(f"{path} was refused: its configuration is larger than {LARGEST_CONFIG >> 20} MB")
            return json.loads(archive.read(CONFIG)), archive.read(WEIGHTS)
    except (zipfile.BadZipFile, KeyError, OSError, ValueError, EOFError, NotImplementedError, RecursionError) as error:
        raise CoppiceError(f"{path} is truncated or no .keras file ({one_line(error)}): save the model again with model.save") from error


def check_classes(path: Path, config: Any, code: Path | None) -> None:
    """Raise CoppiceError where building the model would run code that nobody named."""
    for entry in _entries(config):
        name, module = entry.get("class_name"), entry.get("module")
        if name in ("Lambda", "__lambda__") or "__lambda__" in entry:
            raise CoppiceError(
                f"{path} was refused: it has a Lambda layer, which is code; write it with keras.ops and save the model again"
            )
        own = module is None or str(module).split(".")[0] in OWN
        if not own and code is None:
            raise CoppiceError(f"{path} was refused: {name} of {module} is not Keras's own; name the file with its code by --code")
        if entry.get("registered_name") and ">" in str(entry["registered_name"]) and code is None:
            raise CoppiceError(f"{path} was refused: {entry['registered_name']} is not Keras's own; name the file with its code by --code")


def _entries(config: Any) -> Iterator[dict[str, Any]]:
    pending = [config]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            if "class_name" in found:
                yield found
            pending += found.values()
        elif isinstance(found, list):
            pending += found


def check_size(path: Path, config: Any, held: int) -> None:
    """Build the model without its weights, and compare what it asks for with what the file holds."""
    config = {**config, "compile_config": None}
    waiting = global_state.get_global_attribute("uninitialized_variables", [], set_to_default=True)
    before = list(waiting)
    try:
        with StatelessScope(initialize_variables=False):  # its variables have shapes and no values
            model = keras.saving.deserialize_keras_object(config, safe_mode=True)
    except Exception as error:  # whatever a wrong configuration makes Keras and the backends raise
        raise CoppiceError(f"{path} holds no model that Keras {keras.__version__} can build: {one_line(error)}") from error
    finally:
        waiting[:] = before  # else Keras would make values for them later
    if not isinstance(model, keras.Model):
        raise CoppiceError(f"{path} holds a {type(model).__name__}, no model")
    asked = sum(math.prod(w.shape) * 4 for w in model.weights)
    if asked > 8 * held + SLACK:
        raise CoppiceError(f"{path} was refused: its configuration asks for {asked} bytes of weights, the file holds {held}")


def run_users_code(code: Path) -> ModuleType:
    """The module that a user's file makes; its folder is on the path meanwhile, as for ``python FILE.py``. Raises CoppiceError."""
    spec = importlib.util.spec_from_file_location("_coppice_user_code", code)
    if spec is None or spec.loader is None or not code.is_file():
        raise CoppiceError(f"{code} is no Python file")
    module, folder = importlib.util.module_from_spec(spec), str(code.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CoppiceError(f"{code} could not be run: {one_line(error)}") from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
