"""What a command line names to be timed: models, run folders with their dense models, files of runtimes, and the shape of their input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coppice import cli_keras
from coppice.config import RunConfig
from coppice.errors import CoppiceError
from coppice.frameworks import is_keras, names_keras
from coppice.runtimes import LITE, runtime
from coppice.silence import silenced

Opened = tuple[Any, tuple[int, ...] | None]  # a module, a Keras model or the path of a file
Subjects = dict[str, Any]


def open_subjects(
    specs: Sequence[str], against: str | None, given: Sequence[int] | None, num_classes: int | None
) -> tuple[Subjects, str, tuple[int, ...]]:
    """The models by name, the name of the one to compare with, and the shape of one input without its batch dim.

    A run folder brings its dense model along, unless ``against`` names another one. CoppiceError where a model can't be opened, where no
    shape is known, and where models take inputs of different shapes.
    """
    named = list(dict.fromkeys([*([against] if against else []), *specs]))
    opened: dict[str, Opened] = {}
    for spec in named:
        if Path(spec).is_dir():
            if against is None:
                opened.setdefault(*_dense_of(Path(spec)))
            opened[spec] = _pruned(Path(spec))
        elif spec.endswith(".onnx"):
            opened[spec] = _onnx_file(Path(spec))
        elif spec.endswith(LITE):
            opened[spec] = _lite_file(Path(spec))
        elif names_keras(spec):
            network = cli_keras.opened(RunConfig(model=spec))
            opened[spec] = network, cli_keras.shape_of(network)
        else:
            opened[spec] = _module(spec, num_classes)
    shape = _shape({name: own for name, (_, own) in opened.items()}, given)
    return {name: model for name, (model, _) in opened.items()}, against or next(iter(opened)), shape


def own_runtime(subjects: Subjects) -> str:
    """Where a model runs as it is: the first one's."""
    first = next(iter(subjects.values()))
    if isinstance(first, Path):
        return "litert" if first.suffix == LITE else "onnxruntime"
    return "keras" if is_keras(first) else "torch"


def _pruned(run: Path) -> Opened:
    from coppice.run import METRICS, load, read_json

    if cli_keras.is_run(run):
        cli_keras.ready()
    return load(run), tuple(read_json(run / METRICS)["input"][1:])


def _dense_of(run: Path) -> tuple[str, Opened]:
    """Its weights are not needed: what they are does not change how long they take."""
    from coppice.config import load_config
    from coppice.run import CONFIG, METRICS, check_manifest, read_json

    check_manifest(run)
    config, _ = load_config(run / CONFIG)
    if not config.model:
        raise CoppiceError(f"{run} was made from a module in Python: name the model to compare with by --against")
    name, shape = f"{config.model} (dense)", tuple(read_json(run / METRICS)["input"][1:])
    if config.is_keras:
        return name, (cli_keras.opened(config), shape)
    from coppice.models import load_model

    return name, (load_model(config.model, None, config.num_classes or None), shape)


def _module(spec: str, num_classes: int | None) -> Opened:
    from coppice.models import load_model

    return load_model(spec, None, num_classes), None


def _lite_file(path: Path) -> Opened:
    """The file, and the shape of its one input, where that is fixed but for the batch."""
    if not path.is_file():
        raise CoppiceError(f"there is no file {path}")
    runtime("litert")
    from ai_edge_litert.interpreter import Interpreter

    try:
        with silenced():
            inputs = Interpreter(str(path)).get_input_details()
    except Exception as error:  # LiteRT's own
        raise CoppiceError(f"{path} is truncated or no LiteRT file: export it again") from error
    if len(inputs) != 1:
        raise CoppiceError(f"{path} takes {len(inputs)} inputs: only models with one input can be timed")
    shape = tuple(int(n) for n in inputs[0]["shape_signature"][1:])
    return path, shape if shape and min(shape) > 0 else None


def _onnx_file(path: Path) -> Opened:
    """The file, and the shape of its one input, where that is fixed but for the batch."""
    if not path.is_file():
        raise CoppiceError(f"there is no file {path}")
    try:
        import onnx
    except ImportError:
        raise CoppiceError(f"{path} needs the package onnx: pip install 'coppice[onnxruntime]'") from None
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own kinds of errors differ by version
        raise CoppiceError(f"{path} is truncated or no ONNX file: export it again") from error
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise CoppiceError(f"{path} takes {len(inputs)} inputs: only models with one input can be timed")
    dims = inputs[0].type.tensor_type.shape.dim[1:]
    return path, tuple(d.dim_value for d in dims) if dims and all(d.dim_value for d in dims) else None


def _shape(own: dict[str, tuple[int, ...] | None], given: Sequence[int] | None) -> tuple[int, ...]:
    known = {name: shape for name, shape in own.items() if shape is not None}
    if given is not None:
        if len(given) < 2 or any(size < 1 for size in given):
            raise CoppiceError(f"--input {','.join(map(str, given))}: give the batch and then the shape of one input, as in 1,3,224,224")
        known["--input"] = tuple(given[1:])
    if not known:
        raise CoppiceError("the shape of an input is not known: give it, as in --input 1,3,224,224")
    (first, shape), *others = known.items()
    for name, other in others:
        if other != shape:
            raise CoppiceError(
                f"{first} takes inputs of shape {shape} and {name} of {other}: only models of one input shape can be compared"
            )
    return shape
