"""What the commands do with a `.keras` file, or with the run of one. Keras is imported when there is one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.errors import CoppiceError
from coppice.silence import silenced

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from coppice.config import RunConfig
    from coppice.coupling import Coupling
    from coppice.exporting import ExportCheck
    from coppice.metrics import Metrics
    from coppice.progress import Progress
    from coppice.result import Result

EXPORTED_ON = 8  # images that an exported file is compared on
_BACKENDS = ("tensorflow", "jax", "torch")


def is_run(path: Path) -> bool:
    """Whether the folder is a run of a Keras model, finished or not."""
    from coppice.config import load_config

    return (path / "config.toml").is_file() and load_config(path / "config.toml")[0].is_keras


def ready() -> None:
    """CoppiceError where Keras or every backend is missing; without a choice of the user's, the first backend that is there is taken."""
    if find_spec("keras") is None:
        raise CoppiceError("a Keras model needs Keras and a backend: pip install 'coppice[tensorflow]'")
    if "KERAS_BACKEND" not in os.environ:
        there = next((name for name in _BACKENDS if find_spec(name) is not None), None)
        if there is None:
            raise CoppiceError("Keras needs a backend: install tensorflow, jax or torch")
        os.environ["KERAS_BACKEND"] = there
    _import_quietly()


def _import_quietly() -> None:
    """Import Keras and its backend without TensorFlow's notes on the machine, which it writes past Python, on every start."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        with silenced():
            import keras

            keras.ops.zeros(())
    except Exception as error:
        raise CoppiceError(f"Keras can't be imported with the backend {os.environ['KERAS_BACKEND']}: {error}") from error


def opened(config: RunConfig) -> Any:
    """The dense model of a configuration."""
    ready()
    from coppice.keras.opening import open_model

    return open_model(config.model, config.weights, config.code, config.num_classes)


def shape_of(model: Any) -> tuple[int, ...] | None:
    """The shape of the model's one input without the batch, where that is fixed."""
    from coppice.keras.walk import function_of

    inputs = function_of(model).inputs
    if len(inputs) != 1:
        raise CoppiceError(f"the model takes {len(inputs)} inputs: only models with one can be looked at from the command line")
    shape = tuple(inputs[0].shape[1:])
    return None if None in shape else shape


def coupled(config: RunConfig) -> tuple[Coupling, Sequence[int]]:
    """The axes of the model, and the shape they were found with: the one given, or the model's own."""
    from coppice.coupling import couple

    network = opened(config)
    from coppice.keras.capture import capture

    shape = config.input
    if not shape:
        own = shape_of(network)
        if own is None:
            raise CoppiceError("the model leaves the size of its input open: give one, as in --input 1,224,224,3")
        shape = (1, *own)
    return couple(capture(network, shape)), shape


def prune(config: RunConfig, out: Path, progress: Progress) -> Result[Any]:
    ready()
    from coppice.keras.loop import prune_run

    return prune_run(config, out, progress=progress)


def resume(run: Path, progress: Progress) -> Result[Any]:
    ready()
    from coppice.keras.loop import resume as go_on

    return go_on(run, progress=progress)


def measured(model: Path, config: RunConfig, part: str, progress: Callable[[int, int | None], None]) -> tuple[Metrics, Sequence[str]]:
    """Metrics of a file, or of a run's pruned model, and the names of the classes."""
    ready()
    from coppice.keras.data import load_images
    from coppice.keras.evaluate import evaluate
    from coppice.run import load

    if not config.data:
        raise CoppiceError("name the data with --data")
    network = load(model) if model.is_dir() else opened(config)
    data = load_images(config.data, config.preprocess, config.val_fraction, config.seed, config.splits)
    return evaluate(network, getattr(data, part), progress), data.classes


def exported(model: Path, config: RunConfig, to: str, out: Path | None, opset: int | None) -> tuple[Path, ExportCheck, str]:
    """Write a file or a run's pruned model in another format: where it lies, how it compares, and with what that was found."""
    ready()
    from coppice.keras.export import export, format_of
    from coppice.run import load

    suffix = format_of(to, opset).suffix
    network = load(model) if model.is_dir() else opened(config)
    path = out or (model / f"model{suffix}" if model.is_dir() else model.with_suffix(suffix))
    images = _images(config)
    return path, export(network, path, to, images, opset), "random inputs" if images is None else "images of its data"


def _images(config: RunConfig) -> NDArray[Any] | None:
    """Some validation images, where there is data."""
    from coppice.keras.data import load_images

    if not config.data:
        return None
    data = load_images(config.data, config.preprocess, config.val_fraction, config.seed, config.splits)
    return next(data.val.batches(EXPORTED_ON))[0]
