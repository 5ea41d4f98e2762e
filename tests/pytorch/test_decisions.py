"""Code whose course depends on values: which rows survive, how many there are, what an ``.item()`` says. Its widths prune all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms

import coppice
import coppice.torch.shapes
from coppice.testing import random_plan


@pytest.fixture(autouse=True, params=["real", "fake"])
def tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coppice.torch.shapes, "USED", request.param != "real")


class Detector(nn.Module):
    """Two stages: rows picked by score and by overlap, then classified; an index tensor puts them back among zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.box = nn.Linear(6, 12), nn.Linear(12, 1), nn.Linear(12, 4)
        self.hidden, self.fc = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.stem(x))
        scores, boxes = self.score(y).flatten(), self.box(y).sigmoid()
        good = scores > scores.median()
        y, scores, boxes = y[good], scores[good], boxes[good]
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        kept = nms(boxes, scores, 0.6)
        out = torch.zeros(len(y), y.shape[1])
        out[kept] = y[kept] * (1 + int(scores.argmax().item()))
        return self.fc(torch.relu(self.hidden(out))), torch.nonzero(good)


def test_a_detector_prunes_and_is_verified_with_the_decisions_of_the_dense_one() -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(40, 6)))
    assert [a.name for a in coupling.prunable] == ["stem.weight:0", "hidden.weight:0"]
    for seed in range(4):
        plan = random_plan(coupling, seed)
        pruned = coppice.apply(model, plan)
        assert any("decides by its own values" in line for line in coppice.verify(model, pruned, coupling, plan).checked)


class Halved(nn.Module):
    """A number worked out from sizes by tensors is no decision: it must follow the sizes, and here it does not fit any other width."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        half = int((torch.tensor([y.shape[1]]) // 2).item())
        return self.c(torch.cat([self.b(y)[:, half:], y[:, :half]], 1))


def test_numbers_worked_out_from_sizes_are_no_decisions() -> None:
    model = Halved().eval()
    graph = coppice.capture(model, torch.randn(3, 6))
    assert all(op.call.decision is None for op in graph.ops)
    coupling = coppice.couple(graph)
    for seed in range(4):
        plan = random_plan(coupling, seed)
        pruned = coppice.apply(model, plan)
        coppice.verify(model, pruned, coupling, plan)
