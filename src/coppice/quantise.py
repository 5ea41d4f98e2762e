"""INT8 after everything else: the exported model quantised on calibration images, and judged on the test split like any other.

ONNX Runtime's static quantiser, weights by channel and symmetric (a zero stays a zero), activations by the range that they have on images.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coppice.errors import CoppiceError


def quantise(onnx: Path, out: Path, batches: Iterable[Tensor]) -> None:
    """Write `onnx` to `out` in INT8, with activations' ranges from `batches` of model inputs. CoppiceError where the quantiser can't."""
    from coppice.run import replacing
    from coppice.runtimes import to_int8

    try:
        with replacing(out) as temporary:
            to_int8(onnx, temporary, _Images(onnx, batches))
    except Exception as error:  # the quantiser's own have no common base
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CoppiceError(f"ONNX Runtime can't quantise {onnx.name}: {lines[0]}") from error


class OnnxModel(nn.Module):
    """An .onnx file as a module, for what evaluates modules; on the CPU."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input: str = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.input: np.ascontiguousarray(x.numpy())})[0])


class _Images:
    """Batches in the form that the quantiser asks for."""

    def __init__(self, onnx: Path, batches: Iterable[Tensor]) -> None:
        self._name = OnnxModel(onnx).input
        self._left = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        found = next(self._left, None)
        return None if found is None else {self._name: found.numpy()}
