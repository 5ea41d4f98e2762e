"""Heads that only training runs read channels of the body: these may go, and the heads' weights follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice.testing import random_plan


class WithHead(nn.Module):
    """An auxiliary head, as in GoogLeNet; ``frozen``: its code holds the body's width as a number."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 10, 3), nn.Linear(10, 4)
        self.aux, self.aux_norm, self.aux_fc = nn.Conv2d(12, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        y = self.fc(self.body(x).mean((2, 3)))
        if not self.training:
            return y
        if self.frozen:
            x = x.reshape(x.shape[0], 12, -1, 1)
        return y, self.aux_fc(self.aux_norm(self.aux(x)).mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
def test_training_runs_after_pruning(frozen: bool) -> None:
    model = WithHead(frozen).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 8, 8)))
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {a.name for a in coupling.prunable} == ({"body.weight:0"} if frozen else {"stem.weight:0", "body.weight:0", "aux.weight:0"})
    assert "aux_fc.weight:0" in coupling.pins["model output"]
    assert coupling.cost().macs == 36 * 12 * 27 + 16 * 12 * 10 * 9 + 40  # the head costs nothing in evaluation
    for seed in range(4):
        plan = random_plan(coupling, seed)
        pruned = coppice.apply(model, plan)
        coppice.verify(model, pruned, coupling, plan)
        y, aux = pruned.train()(torch.randn(2, 3, 8, 8))
        (y.sum() + aux.sum()).backward()
        assert all(p.grad is not None for p in pruned.parameters())


def test_a_module_that_asks_for_its_version_is_rebuilt() -> None:
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, metadata: dict[str, object], *rest: object) -> None:
            assert metadata.get("version") == 2
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    model = nn.Sequential(Versioned(3, 8), nn.Linear(8, 2))
    plan = random_plan(coppice.couple(coppice.capture(model, torch.randn(1, 3))), 0)
    pruned = coppice.apply(model, plan)
    coppice.torch.apply.build(model, plan, {name: tensor.clone() for name, tensor in pruned.state_dict().items()})
