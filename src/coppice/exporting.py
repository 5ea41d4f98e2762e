"""ONNX: written by PyTorch's own exporter, and compared with the model it came from before anyone gets to see the file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coppice.errors import CoppiceError, VerificationError
from coppice.run import replacing
from coppice.verification import largest_error

if TYPE_CHECKING:
    from torch import Tensor, nn

RTOL = 1e-4
"""Largest difference allowed between an exported model and eager PyTorch, relative to the largest absolute output (both in fp32)."""

_NOISY_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._dynamo", "torch.fx")


Answer = Callable[["Tensor"], Sequence["Tensor"]]  # an exported model: a batch of images -> its outputs


class ExportError(CoppiceError):
    """The model can't be written in some format: a limit of the exporter, not a wrong file."""


@dataclass(frozen=True)
class ExportCheck:
    """What was compared: `error` is max |exported − eager| / max |eager| over `images` images in batches of `batches`."""

    error: float
    images: int
    batches: tuple[int, ...]


def export_onnx(model: nn.Module, images: Tensor, path: Path, *, opset: int | None = None) -> ExportCheck:
    """Write `model` (fp32, eval mode, dynamic batch) to `path` and compare ONNX Runtime with eager on `images` (n, c, h, w).

    `images` need n >= 4: the first two are traced, then all of them are run one by one, as one batch, and as a batch of 3.
    Nothing is left at `path` unless the comparison holds within RTOL. Raises ExportError if the model can't be exported,
    VerificationError if the outputs differ.
    """
    with replacing(path) as temporary:
        write_onnx(model.eval(), as_fp32(images)[:2], temporary, opset)
        return check_onnx(model, images, temporary)


def check_onnx(model: nn.Module, images: Tensor, path: Path) -> ExportCheck:
    """Compare ONNX Runtime on the file at `path` with eager `model` on `images`. Raises VerificationError; CoppiceError if it is none."""
    import torch

    session = _session(path)
    name = session.get_inputs()[0].name
    return compare(model, images, lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})], "ONNX Runtime")


def compare(model: nn.Module, images: Tensor, answer: Answer, name: str) -> ExportCheck:
    """Compare `answer` with eager `model` on `images` (at least four), in batches of several sizes. Raises VerificationError."""
    model, images = model.eval(), as_fp32(images)
    batches = [images, images[:3], *images[:2].split(1)]
    error = largest_error(_difference(model, batch, answer, name) for batch in batches)
    if not error <= RTOL:  # also true for NaN
        raise VerificationError(f"{name} differs from PyTorch by {error:.2e} of the largest output (allowed: {RTOL:g}), nothing was saved")
    return ExportCheck(error, len(images), tuple(sorted({len(b) for b in batches})))


def as_fp32(images: Tensor) -> Tensor:
    import torch

    return images.detach().to("cpu", torch.float32)


def write_onnx(model: nn.Module, example: Tensor, path: Path, opset: int | None = None) -> None:
    """Write `model` with a dynamic batch, and compare nothing: by PyTorch's exporter, or else by its older one. Raises ExportError."""
    import torch

    try:
        import onnxruntime  # noqa: F401 - asked for here, so that a missing one is told before the slow export
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"ONNX export needs {error.name}: pip install 'coppice[onnx]'") from error
    with quietly() as said:
        try:
            program = torch.onnx.export(
                model, (example,), dynamo=True, external_data=False, verbose=False, opset_version=opset,
                input_names=["input"], output_names=["output"], dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
            assert program is not None  # it is None of the older exporter only
            _leave_out_nothing(program.model.graph)
            program.save(path, external_data=False)
        except Exception as error:  # the exporter's own errors have no common base
            if not _traced(model, example, path, opset):
                raise ExportError(f"the model can't be exported to ONNX: {first_line(error) or said.getvalue()[:200]}") from error
    if opset is not None and (found := _opset(path)) != opset:  # the exporter keeps its own where it can't convert, and only logs that
        raise ExportError(f"opset {opset} can't be had: the exporter wrote {found}")


def _traced(model: nn.Module, example: Tensor, path: Path, opset: int | None) -> bool:
    """Whether PyTorch's older exporter writes the model, which copes with more code, as it writes down what runs.

    What the code decides on values would be frozen in the file: such a model is left alone. What it decides on the size of the batch, a
    comparison in batches of several sizes finds.
    """
    import torch

    from coppice.torch.capture import capture, decisions_of

    try:
        if decisions_of(capture(model, example)):
            return False
        torch.onnx.export(
            model, (example,), str(path), dynamo=False, opset_version=opset,
            input_names=["input"], output_names=["output"], dynamic_axes={"input": {0: "batch"}},
        )  # fmt: skip
    except Exception:  # the exporter's own errors have no common base; what the newer one said is what a user can look up
        return False
    return True


def _leave_out_nothing(graph: Any) -> None:
    """PyTorch's concat leaves out an empty vector (what a removed branch answers), ONNX's does not: take it from the inputs."""
    from onnx_ir import Node
    from onnx_ir.convenience import replace_nodes_and_values

    for node in [node for node in graph if node.op_type == "Concat"]:
        kept = [value for value in node.inputs if value.shape is None or tuple(value.shape) != (0,)]
        if 0 < len(kept) < len(node.inputs):
            (old,) = node.outputs
            made = Node(node.domain, node.op_type, kept, attributes=list(node.attributes.values()), version=node.version)
            made.outputs[0].shape, made.outputs[0].type = old.shape, old.type
            replace_nodes_and_values(graph, node, [node], [made], [old], made.outputs)


def _opset(path: Path) -> int:
    import onnx

    return int(next(entry.version for entry in onnx.load(path).opset_import if entry.domain == ""))


def _session(path: Path) -> Any:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # warnings about the machine don't concern the file
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no common base
        raise CoppiceError(f"ONNX Runtime can't load {path}: {first_line(error)}") from error


def _difference(model: nn.Module, batch: Tensor, answer: Answer, name: str) -> float:
    import torch
    from torch.utils._pytree import tree_leaves

    with torch.no_grad():
        outputs = model(batch)
    eager = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]  # as the exporter lays dicts and tuples out
    ran = answer(batch)
    if len(ran) != len(eager) or any(r.shape != e.shape for r, e in zip(ran, eager, strict=True)):
        raise VerificationError(f"{name} returns {[tuple(r.shape) for r in ran]} where PyTorch returns {[tuple(e.shape) for e in eager]}")
    return largest_error(float((r - e).abs().max() / e.abs().max().clamp_min(1e-12)) for r, e in zip(ran, eager, strict=True))


@contextlib.contextmanager
def quietly() -> Iterator[io.StringIO]:
    """Keep the exporter's progress, log lines and deprecation notes out of the user's terminal."""
    said = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield said
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
