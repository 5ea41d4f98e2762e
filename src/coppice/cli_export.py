"""`coppice export`: a run's pruned model, or any Keras model, as a file for where it will run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coppice import cli_keras
from coppice.cli_options import Code, DataSpec, Mean, NumClasses, Resize, Size, Std, Weights, flag_of, settings_of
from coppice.errors import CoppiceError
from coppice.frameworks import names_keras

if TYPE_CHECKING:
    from coppice.exporting import ExportCheck


def export(
    model: Annotated[
        Path, typer.Argument(help="a finished run folder, FILE.keras, or FILE.json or FILE.py:factory with --weights", metavar="RUN|FILE")
    ],
    to: Annotated[
        str, typer.Option("--to", help="onnx, openvino or pt2 (torch.export); of a Keras model onnx, lite, savedmodel or keras")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", help="the file [RUN/model.onnx, FILE.onnx, ...]", metavar="FILE")] = None,
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX opset [the exporter's own]")] = None,
    data: DataSpec = None,
    mean: Mean = None,
    std: Std = None,
    size: Size = None,
    resize: Resize = None,
    code: Code = None,
    weights: Weights = None,
    num_classes: NumClasses = None,
) -> None:
    """Write a model to be run where coppice is not installed, compared with the framework it comes from on images of its data."""
    named = {k: v for k, v in locals().items() if v is not None and k not in ("model", "to", "out", "opset")}
    if out is not None and not out.parent.is_dir():
        raise CoppiceError(f"--out {out}: there is no folder {out.parent}")
    if model.is_dir() and named:
        raise CoppiceError(f"a run folder has its own data, code and weights: drop {flag_of(next(iter(named)))}")
    if names_keras(str(model), weights or "") or cli_keras.is_run(model):
        from coppice.config import load_config
        from coppice.run import CONFIG

        settings = load_config(model / CONFIG)[0] if model.is_dir() else settings_of(named | {"model": str(model)}, None)
        framework, (path, check, what) = "Keras", cli_keras.exported(model, settings, to, out, opset)
    else:
        framework, (path, check, what) = "PyTorch", _of_pytorch(model, to, out, opset)
    size = sum(file.stat().st_size for file in _files(path, to))
    about = f"equals {framework} within {check.error:.1e} of the largest output, on {check.images} {what}"
    typer.echo(f"{path}: {size / 1e6:.2f} MB, {about}")


def _files(path: Path, to: str) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path, path.with_suffix(".bin")] if to == "openvino" else [path]


def _of_pytorch(run: Path, to: str, out: Path | None, opset: int | None) -> tuple[Path, ExportCheck, str]:
    from coppice.exporting import check_onnx
    from coppice.formats import format_of, write
    from coppice.run import ONNX, load

    suffix = format_of(to).suffix
    model = load(run)
    from coppice.loop import some_images  # it needs PyTorch, which is not there if the folder is no run of its models

    images, what = some_images(run)
    path = out or run / (ONNX if opset is None else f"model-opset{opset}.onnx").replace(".onnx", suffix)
    written = path == run / ONNX and path.exists()  # by prune: say that it still holds
    return path, check_onnx(model, images, path) if written else write(to, model, images, path, opset), what
