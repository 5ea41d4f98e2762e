"""Where a model runs: one table of runtimes behind one small interface, each imported only when it is used.

A runtime is a function ``(subject, batch, threads) -> run``: it loads the model, and ``run()`` is one inference on a fixed input. To add
one, write that function and give it a line in ``RUNTIMES``.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError
from coppice.silence import silenced

if TYPE_CHECKING:
    from torch import nn

CALIBRATED_ON = 8  # inputs
COMPILED_AT_MOST = 64  # models of one class in one process
LITE = ".tflite"
Run = Callable[[], object]
Start = Callable[["Subject", int, int], Run]


@dataclass
class Subject:
    """A model to be timed: a PyTorch module, a Keras model (``network``), or an ONNX or LiteRT file.

    ``shape``: that of one input, without its batch dim. ``folder``: where files that are made of the model may lie.
    """

    name: str
    shape: tuple[int, ...]
    folder: Path
    module: nn.Module | None = None
    file: Path | None = None
    network: Any = None

    @cached_property
    def onnx(self) -> Path:
        """The model as an ONNX file with a dynamic batch, exported when it is first asked for."""
        if self.file is not None and self.file.suffix != LITE:
            return self.file
        path = self.folder / f"{id(self):x}.onnx"
        if self.module is not None:
            import torch

            from coppice.exporting import write_onnx

            write_onnx(self.torch(), torch.from_numpy(self.input(2)), path)
        else:
            self._write(path, "onnx", "a runtime of ONNX files")
        return path

    @cached_property
    def lite(self) -> Path:
        """The model as a LiteRT file with a dynamic batch, exported when it is first asked for."""
        if self.file is not None and self.file.suffix == LITE:
            return self.file
        path = self.folder / f"{id(self):x}{LITE}"
        self._write(path, "lite", "LiteRT")
        return path

    def _write(self, path: Path, to: str, runtime: str) -> None:
        from coppice.keras.export import write

        write(self.keras(runtime), path, to)

    @cached_property
    def int8(self) -> Path:
        """The same, quantised by ONNX Runtime: what it makes of the weights is left open here, only its speed is looked at."""
        path = self.folder / f"{id(self):x}-int8.onnx"
        with one_sentence(f"ONNX Runtime can't quantise {self.name}"):
            to_int8(self.onnx, path, _Noise(self))
        return path

    def torch(self) -> nn.Module:
        if self.module is None:
            raise self._unable("PyTorch")
        return self.module.eval()

    def keras(self, runtime: str = "Keras") -> Any:
        if self.network is None:
            raise self._unable(runtime)
        return self.network

    def _unable(self, runtime: str) -> CoppiceError:
        file = "" if self.file is None else "a LiteRT file" if self.file.suffix == LITE else "an ONNX file"
        kind = file or ("a PyTorch model" if self.network is None else "a Keras model")
        return CoppiceError(f"{self.name} is {kind}, which {runtime} can't run: choose another --runtime")

    def input(self, batch: int) -> NDArray[np.float32]:
        return np.random.default_rng(0).standard_normal((batch, *self.shape), dtype=np.float32)


@dataclass(frozen=True)
class Runtime:
    """``package`` is what must be importable, ``extra`` the extra of coppice that installs it.

    ``reads`` makes the file that it runs, where it runs one.
    """

    package: str
    extra: str
    start: Start
    reads: Callable[[Subject], Path] | None = attrgetter("onnx")

    def version(self) -> str:
        with contextlib.suppress(PackageNotFoundError):
            return version(self.package)
        return str(getattr(importlib.import_module(self.package), "__version__", "unknown"))  # builds that go by another name


def _eager(subject: Subject, batch: int, threads: int) -> Run:
    import torch

    return _in_torch(copy.deepcopy(subject.torch()), torch.from_numpy(subject.input(batch)), threads)


def _compiled(subject: Subject, batch: int, threads: int) -> Run:
    import torch
    import torch._dynamo

    model = torch.compile(copy.deepcopy(subject.torch()), dynamic=False)
    run = _in_torch(model, torch.from_numpy(subject.input(batch)), threads)
    limits = {"recompile_limit": COMPILED_AT_MOST, "fail_on_recompile_limit_hit": True}  # by default it would quietly run eagerly
    with torch._dynamo.config.patch(limits), one_sentence(f"torch.compile can't compile {subject.name}"):
        run()
    return run


def _in_torch(model: Callable[..., object], x: Any, threads: int) -> Run:
    import torch

    def run() -> object:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode():
            return model(x)

    return run


def _keras(subject: Subject, batch: int, threads: int) -> Run:
    """By the function that Keras compiles (on PyTorch, eagerly): the backend's threads share the cores that the process is kept on."""
    model, x = subject.keras(), subject.input(batch)
    torch = sys.modules.get("torch")

    def run() -> object:
        if torch is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return model.predict_on_batch(x)

    return run


def _litert(subject: Subject, batch: int, threads: int) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    with one_sentence(f"LiteRT can't run {subject.name}"), silenced():
        interpreter = Interpreter(str(subject.lite), num_threads=threads)
        (given,), (out, *_) = interpreter.get_input_details(), interpreter.get_output_details()
        interpreter.resize_tensor_input(given["index"], (batch, *subject.shape))
        interpreter.allocate_tensors()
    x = subject.input(batch)

    def run() -> object:
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(out["index"])

    return run


class _Noise:
    """Inputs for the quantiser to look at, in the form that it asks for."""

    def __init__(self, subject: Subject) -> None:
        import onnx

        graph = onnx.load(subject.onnx, load_external_data=False).graph
        name = next(value.name for value in graph.input if value.name not in {tensor.name for tensor in graph.initializer})
        self._left = [{name: one[None]} for one in subject.input(CALIBRATED_ON)]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return self._left.pop() if self._left else None


def to_int8(onnx: Path, out: Path, images: Any) -> None:
    """Write ``onnx`` to ``out`` in INT8 by ONNX Runtime's static quantiser; ``images``: its calibration reader.

    Weights have 7 bits: x86 CPUs without VNNI add two products of 8 by 8 bits in 16, which saturates without a word, and the file is to be
    right wherever it goes (ONNX Runtime's page on quantisation, "When and why do I need to try U8U8?").
    """
    from onnxruntime.quantization import QuantType, quantize_static

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "reduce_range": True}
    with _quiet():
        quantize_static(onnx, out, images, per_channel=True, **kinds)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on how to prepare the file."""
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(before)


def _int8(subject: Subject, batch: int, threads: int) -> Run:
    return _in_session(subject, subject.int8, batch, threads, "CPUExecutionProvider")


def _onnxruntime(subject: Subject, batch: int, threads: int, provider: str = "CPUExecutionProvider") -> Run:
    return _in_session(subject, subject.onnx, batch, threads, provider)


def _in_session(subject: Subject, path: Path, batch: int, threads: int, provider: str) -> Run:
    session = onnx_session(path, batch, threads, provider, subject.name)
    feed = {session.get_inputs()[0].name: subject.input(batch)}
    outputs = [output.name for output in session.get_outputs()]
    return lambda: session.run(outputs, feed)


def onnx_session(path: Path, batch: int | None, threads: int, provider: str, name: str, profile: Path | None = None) -> Any:
    """An ONNX Runtime session with every free batch dim fixed, unless ``batch`` is None.

    CoppiceError where the provider is absent or can't run the file.
    """
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise CoppiceError(
            f"this build of ONNX Runtime has no {provider}: install one that has, such as onnxruntime-gpu, on a machine for it"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it raises what it can't do
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    for free in () if batch is None else _free_dims(path):
        options.add_free_dimension_override_by_name(free, batch)
    with one_sentence(f"ONNX Runtime can't run {name}"):
        return onnxruntime.InferenceSession(str(path), options, providers=[provider])


def _free_dims(path: Path) -> set[str]:
    """The names of the batch dim of the file's inputs, where it is free."""
    import onnx

    inputs = onnx.load(path, load_external_data=False).graph.input
    shapes = (value.type.tensor_type.shape.dim for value in inputs)
    return {dims[0].dim_param for dims in shapes if dims and dims[0].dim_param}


def _openvino(subject: Subject, batch: int, threads: int) -> Run:
    request = openvino_model(subject.onnx, (batch, *subject.shape), threads, subject.name).create_infer_request()
    x = subject.input(batch)
    return lambda: request.infer({0: x}, share_inputs=True)


def openvino_model(path: Path, shape: Sequence[int] | None, threads: int, name: str, **properties: Any) -> Any:
    """A compiled model for the CPU: fp32 as everywhere else, one stream (latency), threads left to the system and to our own pinning.

    ``shape``: the input's, where the file leaves it open.
    """
    import openvino

    core = openvino.Core()
    chosen = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False, **properties,
    }  # fmt: skip
    with one_sentence(f"OpenVINO can't run {name}"):
        model = core.read_model(path)
        if shape is not None:
            model.reshape({model.inputs[0]: list(shape)})
        return core.compile_model(model, "CPU", chosen)


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """The runtimes' own errors have no common base and many lines."""
    try:
        yield
    except CoppiceError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CoppiceError(f"{what}: {lines[-1][:240]}") from error


RUNTIMES: dict[str, Runtime] = {
    "torch": Runtime("torch", "torch", _eager, reads=None),
    "torch.compile": Runtime("torch", "torch", _compiled, reads=None),
    "onnxruntime": Runtime("onnxruntime", "onnxruntime", _onnxruntime),
    "onnxruntime-int8": Runtime("onnxruntime", "onnxruntime", _int8),
    "onnxruntime-cuda": Runtime("onnxruntime", "onnxruntime", partial(_onnxruntime, provider="CUDAExecutionProvider")),
    "onnxruntime-tensorrt": Runtime("onnxruntime", "onnxruntime", partial(_onnxruntime, provider="TensorrtExecutionProvider")),
    "openvino": Runtime("openvino", "openvino", _openvino),
    "keras": Runtime("keras", "keras", _keras, reads=None),
    "litert": Runtime("ai_edge_litert", "litert", _litert, reads=attrgetter("lite")),
}


def runtime(name: str) -> Runtime:
    """The runtime of that name, imported. CoppiceError where there is none or its package is missing."""
    if name not in RUNTIMES:
        raise CoppiceError(f"there is no runtime {name!r}: choose one of {', '.join(RUNTIMES)}")
    found = RUNTIMES[name]
    try:
        importlib.import_module(found.package)
    except ImportError:
        raise CoppiceError(f"the runtime {name} needs the package {found.package}: pip install 'coppice[{found.extra}]'") from None
    return found
