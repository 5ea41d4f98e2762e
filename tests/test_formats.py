"""Exports: each computes what the model does, for any batch, in a process that knows neither coppice nor the model's code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice import formats
from coppice.cli import run
from coppice.demo import DigitsNet
from coppice.errors import CoppiceError, VerificationError
from coppice.exporting import RTOL, ExportError
from coppice.recipe import Recipe

PLAIN = """
import sys
sys.modules["coppice"] = None  # as where it is not installed
import numpy as np
x = np.load("x.npy")
{}
np.save("y.npy", y)
"""
LOAD = {
    "onnx": "import onnxruntime\ns = onnxruntime.InferenceSession('m.onnx')\ny = s.run(None, {s.get_inputs()[0].name: x})[0]",
    "openvino": "import openvino\ny = openvino.Core().compile_model('m.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})(x)[0]",
    "pt2": "import torch\ny = torch.export.load('m.pt2').module()(torch.from_numpy(x)).detach().numpy()",
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    dense = DigitsNet().eval()
    coupling = coppice.couple(coppice.capture(dense, torch.zeros(1, 1, 8, 8)))
    plan = coppice.plan(coupling, coppice.score(dense, coupling, "l2"), {"macs": 0.5 * coupling.cost().macs})
    return coppice.apply(dense, plan).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_runs_in_a_plain_environment(name: str, model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    check = formats.write(name, model, images, tmp_path / f"m{formats.FORMATS[name].suffix}")
    assert check.error <= RTOL
    assert check.batches == (1, 3, 5)
    np.save(tmp_path / "x.npy", images[:4].numpy())
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN.format(LOAD[name])], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), model(images[:4]), rtol=1e-4, atol=1e-4)


class ByData(nn.Module):
    """What it does depends on what it sees: no exporter can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize("name", ["openvino", "pt2"])
def test_what_can_not_be_exported_leaves_nothing(name: str, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ExportError, match="can't be exported"):
        formats.write(name, ByData(), images, tmp_path / f"m{formats.FORMATS[name].suffix}")
    assert not list(tmp_path.iterdir())


class Moody(nn.Module):
    """Differs from call to call, so no file can be equal to it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) * self.calls


@pytest.mark.parametrize("name", ["openvino", "pt2"])
def test_a_wrong_file_never_reaches_its_place(name: str, images: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        formats.write(name, Moody(), images, tmp_path / f"m{formats.FORMATS[name].suffix}")
    assert not list(tmp_path.iterdir())


def test_bad_requests(model: nn.Module, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "there.pt2").write_text("")
    for name, path, opset, says in (
        ("pt2", "m.pt2", 18, "only ONNX has opsets"),
        ("pt2", "there.pt2", None, "exists already"),
        ("openvino", "m.ir", None, "name it so"),
        ("tflite", "m.tflite", None, "choose one of"),
    ):
        with pytest.raises(CoppiceError, match=says):
            formats.write(name, model, images, tmp_path / path, opset)


@pytest.mark.usefixtures("busy_machine")
def test_a_finished_run_is_exported_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    out = tmp_path / "run"
    coppice.prune(
        DigitsNet(), (loader, loader, loader), "macs=0.5", out=out, criterion="l2", allocation="global", calibration=16,
        recipe=Recipe(epochs=0),
    )  # fmt: skip
    assert json.loads((out / "metrics.json").read_text())["latency"] is None
    config = (out / "config.toml").read_text()  # a run from Python has no factory to load it by
    (out / "config.toml").write_text(f'model = "{coppice.demo.__file__}:digits_net"\n{config}')
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["config.toml"] = coppice.config.sha256(out / "config.toml")
    (out / "manifest.json").write_text(json.dumps(manifest))
    pytest.importorskip("openvino")
    for name in ("pt2", "openvino"):
        assert run(["export", str(out), "--to", name]) == 0
        assert "random images" in capsys.readouterr().out
        assert (out / f"model{formats.FORMATS[name].suffix}").exists()
    assert (out / "model.bin").exists()
    assert run(["export", str(out)]) == 0
    capsys.readouterr()
    assert run(["measure", str(out), "--rounds", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(c["model"], c["reference"]) for c in found["comparisons"]] == [(str(out), f"{coppice.demo.__file__}:digits_net (dense)")]
