"""What a pruned model is written as, each file compared with eager PyTorch before anyone gets to see it; none of them needs coppice to run.

A format is a function ``(model, images, path, opset) -> check``; to add one, write it and give it a line in ``FORMATS``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from coppice.errors import CoppiceError
from coppice.exporting import ExportCheck, ExportError, as_fp32, compare, export_onnx, first_line, quietly, write_onnx
from coppice.run import replacing
from coppice.runtimes import openvino_model, runtime

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Format:
    """``suffix`` of the file; ``opset``: whether there is one to choose."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path, int | None], ExportCheck]
    opset: bool = False


def export_program(model: nn.Module, images: Tensor, path: Path) -> ExportCheck:
    """Write `model` as a `torch.export` program with a dynamic batch: `torch.export.load(path).module()` needs none of its code.

    As for ONNX, nothing is left at `path` unless the outputs are those of eager PyTorch. Raises ExportError, VerificationError.
    """
    import torch

    with replacing(path) as temporary, quietly():
        try:
            program = torch.export.export(model.eval(), (as_fp32(images)[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
            torch.export.save(program, temporary)
        except Exception as error:  # the exporter's own errors have no common base
            raise ExportError(f"the model can't be exported by torch.export: {first_line(error)}") from error
        again = torch.export.load(temporary).module()

        def answer(x: Tensor) -> list[Tensor]:
            out = again(x)
            return [out] if isinstance(out, torch.Tensor) else list(out)

        return compare(model, images, answer, "the exported program")


def export_openvino(model: nn.Module, images: Tensor, path: Path) -> ExportCheck:
    """Write `model` as OpenVINO IR, fp32 with a dynamic batch: `path` (.xml) and the weights beside it (.bin).

    As for ONNX, nothing is left there unless the outputs are those of eager PyTorch. Raises ExportError, VerificationError.
    """
    import torch

    runtime("openvino")
    import openvino

    if path.suffix != ".xml":
        raise CoppiceError(f"{path}: an OpenVINO model is an .xml file, with a .bin beside it; name it so")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as folder:
        onnx, made = Path(folder) / "model.onnx", Path(folder) / path.name
        write_onnx(model.eval(), as_fp32(images)[:2], onnx)
        openvino.save_model(openvino.Core().read_model(onnx), made, compress_to_fp16=False)
        request = openvino_model(made, None, torch.get_num_threads(), path.name).create_infer_request()

        def answer(x: Tensor) -> list[Tensor]:
            return [torch.from_numpy(out.copy()) for out in request.infer({0: x.numpy()}).values()]

        check = compare(model, images, answer, "OpenVINO")
        os.replace(made.with_suffix(".bin"), path.with_suffix(".bin"))  # the weights first: an .xml never lacks them
        os.replace(made, path)
    return check


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", lambda model, images, path, opset: export_onnx(model, images, path, opset=opset), opset=True),
    "openvino": Format(".xml", lambda model, images, path, _: export_openvino(model, images, path)),
    "pt2": Format(".pt2", lambda model, images, path, _: export_program(model, images, path)),
}


def write(name: str, model: nn.Module, images: Tensor, path: Path, opset: int | None = None) -> ExportCheck:
    """Write `model` to `path` in the format of that name, compared on `images` (at least four). Nothing is written over."""
    chosen = format_of(name)
    if opset is not None and not chosen.opset:
        raise CoppiceError(f"--opset {opset}: only ONNX has opsets, drop it for {name}")
    if path.exists():
        raise CoppiceError(f"{path} exists already, name another file with --out")
    return chosen.write(model, images, path, opset)


def format_of(name: str) -> Format:
    if name not in FORMATS:
        raise CoppiceError(f"--to {name}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
