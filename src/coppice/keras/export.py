"""What a Keras model is written as; each file is compared with the model before anyone gets to see it, none of them needs coppice to run.

A format is a function that writes the file and one that loads it and answers; to add one, write these two and give them a line in
``FORMATS``.
"""

from __future__ import annotations

import importlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError, VerificationError
from coppice.exporting import RTOL, ExportCheck, ExportError, first_line, quietly
from coppice.keras.walk import function_of, require_plain
from coppice.silence import silenced
from coppice.verification import largest_error

Array = NDArray[Any]
Inputs = Sequence[Array]
Answer = Callable[[Inputs], Sequence[Array]]  # an exported model: its inputs, a batch each -> its outputs
FEWEST = 4  # inputs to compare on: there are batches of several sizes


@dataclass(frozen=True)
class Format:
    """``suffix`` of the file (a SavedModel is a folder), and what it is called.

    ``needs``: by backend that can write it, the packages, and the extra of coppice that installs each.
    """

    suffix: str
    title: str
    write: Callable[[Any, Path, int | None], None]
    load: Callable[[Path, Any], Answer]
    needs: Mapping[str, Mapping[str, str]]


def export(model: Any, path: Path, to: str, inputs: Any = None, opset: int | None = None) -> ExportCheck:
    """Write a Sequential or Functional model to ``path``, in the format of that name; nothing is written over.

    It is compared with Keras on ``inputs`` (an array, or one for each of the model's inputs, the batch first; random ones without) in
    batches of several sizes, and nothing is left unless they agree within RTOL. Raises ExportError, VerificationError, CoppiceError.
    """
    require_plain(model)
    chosen = format_of(to, opset)
    if path.exists():
        raise CoppiceError(f"{path} exists already, name another file with --out")
    if to != "savedmodel" and path.suffix != chosen.suffix:  # Keras and the converters go by it
        raise CoppiceError(f"{path}: {chosen.title} is a {chosen.suffix} file; name it so")
    given = _examples(model, inputs)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
        made = Path(folder) / path.name
        write(model, made, to, opset)
        check = compare(model, given, _loaded(chosen, made, model), chosen.title)
        os.replace(made, path)
    return check


def format_of(name: str, opset: int | None = None) -> Format:
    """The format of that name. CoppiceError where there is none, or it can't be written here: the backend, a package."""
    if name not in FORMATS:
        raise CoppiceError(f"--to {name}: a Keras model is written as one of {', '.join(FORMATS)}")
    if opset is not None and name != "onnx":
        raise CoppiceError(f"--opset {opset}: only ONNX has opsets, drop it for {name}")
    found, backend = FORMATS[name], keras.backend.backend()
    if backend not in found.needs:
        able = next((name for name in found.needs if find_spec(name)), "")
        do = f"set KERAS_BACKEND={able}" if able else "pip install 'coppice[tensorflow]', and set KERAS_BACKEND=tensorflow"
        raise CoppiceError(f"{found.title} is not written on the backend {backend}: {do}")
    for package, extra in found.needs[backend].items():
        try:
            importlib.import_module(package)
        except ImportError:
            raise CoppiceError(f"{found.title} needs the package {package}: pip install 'coppice[{extra}]'") from None
    return found


def write(model: Any, path: Path, to: str, opset: int | None = None) -> None:
    """Write the file, and compare nothing. Raises ExportError, CoppiceError."""
    chosen = format_of(to, opset)
    with _silently():
        try:
            chosen.write(model, path, opset)
        except CoppiceError:
            raise
        except Exception as error:  # the exporters' own errors have no common base
            other = {"tensorflow": "torch", "torch": "tensorflow"}[keras.backend.backend()] if to == "onnx" else ""
            hint = f"; KERAS_BACKEND={other} has another exporter" if other else ""
            raise ExportError(f"the model can't be written as {chosen.title}: {first_line(error)}{hint}") from error


@contextmanager
def _silently() -> Iterator[None]:
    """The converters speak by every way that there is, of the terminal and of the machine."""
    with quietly(), silenced():
        yield


@contextmanager
def _running(title: str) -> Iterator[None]:
    with _silently():
        try:
            yield
        except Exception as error:  # the runtimes' own kinds
            raise VerificationError(f"{title} can't run what was written of the model: {first_line(error)}; nothing was saved") from error


def _loaded(chosen: Format, path: Path, model: Any) -> Answer:
    with _running(chosen.title):
        return chosen.load(path, model)


def compare(model: Any, inputs: Inputs, answer: Answer, title: str) -> ExportCheck:
    """Compare ``answer`` with the model on the inputs, as one batch, as three, and one by one. Raises VerificationError."""
    whole = len(inputs[0])
    slices = [slice(whole)] if _batch_of(model) else [slice(whole), slice(3), slice(1), slice(1, 2)]
    error = largest_error(_difference(model, [x[some] for x in inputs], answer, title) for some in slices)
    if not error <= RTOL:  # also true for NaN
        raise VerificationError(f"{title} differs from Keras by {error:.2e} of the largest output (allowed: {RTOL:g}), nothing was saved")
    return ExportCheck(error, whole, tuple(sorted({len(inputs[0][some]) for some in slices})))


def _difference(model: Any, inputs: Inputs, answer: Answer, title: str) -> float:
    want = [np.asarray(keras.ops.convert_to_numpy(x)) for x in keras.tree.flatten(model(_structured(model, inputs), training=False))]
    with _running(title):
        have = [np.asarray(x) for x in answer(inputs)]
    if [x.shape for x in have] != [x.shape for x in want]:
        raise VerificationError(f"{title} gives {[x.shape for x in have]} where Keras gives {[x.shape for x in want]}, nothing was saved")
    return largest_error(float(np.abs(a - b).max() / max(float(np.abs(b).max()), 1e-12)) for a, b in zip(have, want, strict=True))


def _structured(model: Any, inputs: Sequence[Any]) -> Any:
    """Arrays as the model takes them: one, a list or a dict."""
    return keras.tree.pack_sequence_as(function_of(model)._inputs_struct, list(inputs))


def _batch_of(model: Any) -> int | None:
    """The batch, where the model has a fixed one."""
    size = function_of(model).inputs[0].shape[0]
    return None if size is None else int(size)


def _examples(model: Any, inputs: Any) -> list[Array]:
    """At least four inputs, or as many as the model's fixed batch: those given, again and again, or random ones."""
    symbols = function_of(model).inputs
    count = _batch_of(model) or FEWEST
    if inputs is None:
        if any(n is None for symbol in symbols for n in symbol.shape[1:]):
            raise CoppiceError("the model leaves the size of its input open: give inputs to compare on, with --data")
        generator = np.random.default_rng(0)
        return [
            generator.integers(0, 2, (count, *symbol.shape[1:])).astype(str(symbol.dtype))
            if "int" in str(symbol.dtype)
            else generator.standard_normal((count, *symbol.shape[1:])).astype(str(symbol.dtype))
            for symbol in symbols
        ]
    given = [np.asarray(x) for x in (inputs if isinstance(inputs, (list, tuple)) else [inputs])]
    if len(given) != len(symbols):
        raise CoppiceError(f"the model takes {len(symbols)} inputs, {len(given)} were given")
    for symbol, x in zip(symbols, given, strict=True):
        own = tuple(symbol.shape)
        if len(own) != x.ndim or not len(x) or any(n not in (None, m) for n, m in zip(own[1:], x.shape[1:], strict=True)):
            raise CoppiceError(f"the model's input {symbol.name} has the shape {own}, {x.shape} does not fit it")
    rows = np.arange(count if _batch_of(model) else max(count, len(given[0])))
    return [x[rows % len(x)].astype(str(symbol.dtype)) for symbol, x in zip(symbols, given, strict=True)]


# --- .keras ---------------------------------------------------------------------------------------------------------


def _save(model: Any, path: Path, opset: int | None) -> None:
    del opset
    model.save(path)


def _saved(path: Path, model: Any) -> Answer:
    del model
    again = keras.saving.load_model(path, safe_mode=True)
    return lambda inputs: [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(again(_structured(again, inputs), training=False))]


# --- TensorFlow -----------------------------------------------------------------------------------------------------


def _write_saved_model(model: Any, path: Path, opset: int | None) -> None:
    del opset
    model.export(path, format="tf_saved_model", verbose=False)


def _saved_model(path: Path, model: Any) -> Answer:
    import tensorflow as tf

    loaded = tf.saved_model.load(path)  # to be kept: it owns the variables
    return lambda inputs: [x.numpy() for x in keras.tree.flatten(loaded.serve(_structured(model, [tf.constant(x) for x in inputs])))]


def _write_lite(model: Any, path: Path, opset: int | None) -> None:
    """With LiteRT's own ops only: a file that asks for TensorFlow's beside them does not run where LiteRT alone is."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory(prefix="coppice-") as folder:
        _write_saved_model(model, Path(folder), opset)
        try:
            path.write_bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())
        except Exception as error:  # a report of many lines, one of which names what is missing
            missing = re.search(r"^TF Select ops: (.+)$", str(error), re.MULTILINE)
            if missing is None:
                raise
            raise ExportError(f"the model can't be written as LiteRT: it has no op for TensorFlow's {missing[1]}") from error


def _lite(path: Path, model: Any) -> Answer:
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(path), num_threads=1).get_signature_runner("serving_default")
    names = [symbol.name for symbol in function_of(model).inputs]

    def answer(inputs: Inputs) -> list[Array]:
        outputs = run(**dict(zip(names, inputs, strict=True)))
        return [outputs[name] for name in sorted(outputs, key=_counted)]

    return answer


def _counted(name: str) -> tuple[int, str]:
    """Keras calls the outputs of a model output_0, output_1, ..., those of one that answers a dict by their keys, which it sorts."""
    number = re.fullmatch(r"output_(\d+)", name)
    return (int(number[1]), "") if number else (0, name)


# --- ONNX -----------------------------------------------------------------------------------------------------------


def _write_onnx(model: Any, path: Path, opset: int | None) -> None:
    import onnx

    if keras.backend.backend() == "tensorflow":
        from coppice.keras.tf2onnx_ops import register

        register()
    signature = [function_of(model)._inputs_struct]  # named, else Keras asks for a model that has been called
    model.export(path, format="onnx", verbose=False, input_signature=signature, opset_version=opset)
    try:
        onnx.checker.check_model(path)
    except Exception as error:  # tf2onnx writes a file where it has logged that an op of TensorFlow's is none of ONNX's
        raise ValueError(first_line(error)) from error


def _onnx(path: Path, model: Any) -> Answer:
    from coppice.runtimes import onnx_session

    session = onnx_session(path, None, 1, "CPUExecutionProvider", path.name)
    names = [symbol.name for symbol in function_of(model).inputs]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


_RUNTIME = {"onnx": "onnxruntime", "onnxruntime": "onnxruntime"}
FORMATS: dict[str, Format] = {
    "keras": Format(".keras", ".keras", _save, _saved, {"tensorflow": {}, "jax": {}, "torch": {}}),
    "savedmodel": Format(".savedmodel", "SavedModel", _write_saved_model, _saved_model, {"tensorflow": {}}),
    "lite": Format(".tflite", "LiteRT", _write_lite, _lite, {"tensorflow": {"ai_edge_litert": "litert"}}),
    "onnx": Format(".onnx", "ONNX", _write_onnx, _onnx, {"tensorflow": {**_RUNTIME, "tf2onnx": "tensorflow-onnx"}, "torch": _RUNTIME}),
}
