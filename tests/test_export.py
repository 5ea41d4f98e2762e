"""ONNX: equal to PyTorch at every batch size, quiet, and nothing left behind when it is not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coppice.errors import CoppiceError, VerificationError
from coppice.exporting import RTOL, ExportError, check_onnx, export_onnx


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class ByData(nn.Module):
    """What no exporter can write: control flow that depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3)) if float(x.sum()) > 0 else x.mean((2, 3))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def test_it_equals_pytorch_and_says_nothing(model: nn.Module, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check = export_onnx(model, images, tmp_path / "m.onnx")
    assert check.error <= RTOL
    assert check.batches == (1, 3, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_it_runs_where_neither_coppice_nor_pytorch_is_installed(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    export_onnx(model, images, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", images.numpy())
    code = (
        "import sys; sys.modules['torch'] = sys.modules['coppice'] = None\n"  # None: importing it fails
        "import numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession('m.onnx', providers=['CPUExecutionProvider'])\n"
        "numpy.save('y.npy', session.run(None, {'input': numpy.load('x.npy')})[0])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    with torch.no_grad():
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(images).numpy(), rtol=1e-3, atol=1e-5)


def test_the_opset_can_be_chosen(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    import onnx

    export_onnx(model, images, tmp_path / "m.onnx", opset=18)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 18


def test_a_file_of_another_model_is_found_out(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    export_onnx(model, images, tmp_path / "m.onnx")
    with torch.no_grad():
        model.head.bias[0] += 0.01
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        check_onnx(model, images, tmp_path / "m.onnx")


def test_a_wrong_file_never_reaches_its_place(model: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_text("old")
    monkeypatch.setattr("coppice.exporting.RTOL", -1.0)
    with pytest.raises(VerificationError):
        export_onnx(model, images, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_nan_is_a_difference(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(VerificationError):
        export_onnx(model, images, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class NanAfterwards(Small):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.head(self.norm(self.conv(x)).mean((2, 3)))
        return y, y * float("nan")


def test_nan_is_a_difference_in_the_last_output_too(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        export_onnx(NanAfterwards().eval(), images, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_exported_is_one_sentence(images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ExportError, match="can't be exported to ONNX") as caught:
        export_onnx(ByData(), images, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_what_only_the_older_exporter_takes(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It freezes what code decides on values: such a model stays refused (the test before), whatever the images."""
    seen = []
    export = torch.onnx.export

    def watched(*args: Any, dynamo: bool, **kwargs: Any) -> Any:
        seen.append(dynamo)
        if dynamo:
            raise RuntimeError("not this one")
        return export(*args, dynamo=dynamo, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", watched)
    assert export_onnx(Small().eval(), images, tmp_path / "m.onnx").error <= RTOL
    assert seen == [True, False]
    seen.clear()
    with pytest.raises(ExportError, match="not this one"):
        export_onnx(ByData().eval(), images, tmp_path / "n.onnx")
    assert seen == [True]


def test_a_file_that_is_no_model_is_one_sentence(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(CoppiceError, match="can't load"):
        check_onnx(model, images, tmp_path / "m.onnx")


class InADict(Small):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        features = self.norm(self.conv(x)).mean((2, 3))
        return {"logits": self.head(features), "features": features}


def test_a_model_that_returns_a_dict(images: Tensor, tmp_path: Path) -> None:
    """The exporter lays a dict out as one output a value."""
    assert export_onnx(InADict().eval(), images, tmp_path / "m.onnx").error <= RTOL


def test_an_opset_that_there_is_not(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """The exporter would go on with its own opset and say nothing."""
    with pytest.raises(ExportError, match="opset 999"):
        export_onnx(model, images, tmp_path / "m.onnx", opset=999)
    assert list(tmp_path.iterdir()) == []
