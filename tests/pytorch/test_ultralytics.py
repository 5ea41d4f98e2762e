"""Ultralytics' detectors, built from the configurations in its package: nothing is downloaded, nothing is told to coppice."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import coppice
from coppice.inspection import prunable_share
from coppice.testing import flat_outputs
from cutting import to_half_of_the_macs


@pytest.fixture
def tasks(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path_factory.mktemp("ultralytics")))
    return pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics is not installed (pip install ultralytics)")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["yolov5n", "yolov8n", "yolo11n"])
def test_half_of_the_macs(name: str, tasks: ModuleType) -> None:
    """Convolutions that are split into halves, pyramids, anchors kept between passes and, in the last, attention over a map."""
    torch.manual_seed(0)
    model, inputs = tasks.DetectionModel(f"{name}.yaml", nc=4, verbose=False).eval(), (torch.randn(2, 3, 64, 64),)
    coupling = coppice.couple(coppice.capture(model, inputs))
    honest = {"model input", "model output", "a constant made by the code", "the code works its size out from other widths"}
    assert coupling.pins.keys() <= honest  # the constant: anchors, which meet the four distances of a box
    assert prunable_share(coupling) > 0.99
    pruned = to_half_of_the_macs(model, coupling)

    trained = [p for p in pruned.train().parameters() if p.requires_grad]
    torch.stack([y.square().mean() for y in flat_outputs(pruned(*inputs))]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    torch.optim.SGD(trained, lr=1e-3).step()
    with torch.no_grad():
        assert all(y.isfinite().all() for y in flat_outputs(pruned.eval()(*inputs)))
