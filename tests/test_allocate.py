"""Allocation: targets met exactly as counted, on the grid, and the least important indices go."""

import numpy as np
import pytest
import torch
from torch import nn

import coppice
from coppice.allocate import smallest
from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.planning import Plan
from coppice.saliency import Scores


class Residual(nn.Module):
    """A stem of 32, two residual blocks of inner width 48 and 64, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 32, 3, padding=1))
        self.b = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.a(x)
        x = x + self.b(x)
        return self.head(x.mean((2, 3)))


class Halves(nn.Module):
    """The code chunks a projection in equal halves: the two parts' widths are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 96), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * 2 + gate.sigmoid())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


@pytest.fixture(scope="module")
def coupling(model: nn.Module) -> Coupling:
    return coppice.couple(coppice.capture(model, torch.randn(1, 3, 16, 16)))


def kept(coupling: Coupling, plan: Plan) -> dict[int, int]:
    return {axis.id: len(planned.keep) for axis, planned in zip(coupling.prunable, plan.axes, strict=True)}


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.6}, {"bytes": 0.4}, {"macs": 0.7, "params": 0.5}])
@pytest.mark.parametrize("round_to", [1, 8])
def test_the_target_holds_and_equals_counting(
    model: nn.Module, coupling: Coupling, allocation: str, target: dict[str, float], round_to: int
) -> None:
    dense = coupling.cost()
    budgets = {k: f * getattr(dense, k) for k, f in target.items()}
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l1"), budgets, allocation, round_to)
    cost = coupling.cost(kept(coupling, plan))
    pruned = coppice.apply(model, plan)
    assert all(getattr(cost, k) <= budget for k, budget in budgets.items())
    close = 0.85 if round_to == 1 or allocation == "global" else 0.6  # one uniform share, on a grid of 8 and widths of 32 to 64, is coarse
    assert any(getattr(cost, k) > close * budget for k, budget in budgets.items()), "far more was cut than the target asks for"
    assert cost.params == sum(p.numel() for p in pruned.parameters())
    assert cost.bytes == sum(t.numel() * t.element_size() for t in pruned.state_dict().values())
    assert cost == coppice.couple(coppice.capture(pruned, torch.randn(1, 3, 16, 16))).cost()
    assert all(len(axis.keep) % round_to == 0 for axis in plan.axes)


def test_the_lowest_scores_go(coupling: Coupling) -> None:
    rng = np.random.default_rng(0)
    scores = Scores({a.id: rng.random(a.width) for a in coupling.prunable}, additive=False)
    plan = coppice.plan(coupling, scores, {"macs": 0.5 * coupling.cost().macs})
    for axis, planned in zip(coupling.prunable, plan.axes, strict=True):
        gone = np.setdiff1d(np.arange(axis.width), planned.keep)
        if len(gone):
            assert scores[axis.id][gone].max() <= scores[axis.id][list(planned.keep)].min()


def test_additive_scores_are_weighed_against_cost(coupling: Coupling) -> None:
    """Two inner axes with equal scores: the one whose indices cost more (3x3) goes first."""
    scores = Scores({a.id: np.full(a.width, 1.0 if a.width > 32 else 1e6) for a in coupling.prunable}, additive=True)
    plan = coppice.plan(coupling, scores, {"macs": 0.8 * coupling.cost().macs})
    widths = {axis.width: len(axis.keep) for axis in plan.axes}
    assert widths[48] < 48
    assert widths[64] == 64


def test_tied_axes_move_together() -> None:
    model = Halves()
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 16)))
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": 0.5 * coupling.cost().macs})
    pruned = coppice.apply(model, plan)
    coppice.verify(model, pruned, coupling, plan)
    assert len(plan.axes[0].keep) <= 24


def test_what_cannot_be_reached_names_the_smallest(model: nn.Module, coupling: Coupling) -> None:
    least = smallest(coupling)
    scores = coppice.score(model, coupling, "l1")
    with pytest.raises(CoppiceError, match=f"macs=.* can't be reached: the smallest this model gets is {least.macs:,}"):
        coppice.plan(coupling, scores, {"macs": least.macs - 1})
    plan = coppice.plan(coupling, scores, {"macs": least.macs})
    assert coupling.cost(kept(coupling, plan)) == least


def test_unknown_allocation(coupling: Coupling, model: nn.Module) -> None:
    with pytest.raises(CoppiceError, match="unknown allocation 'greedy'"):
        coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": 1e5}, "greedy")


def test_sparing_takes_back_a_wide_step_that_narrow_ones_make_needless() -> None:
    """A greedy cut takes the wide axis first, for it saves most for its loss, and then far more has gone than the target asks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    coupling = coppice.couple(coppice.capture(model, torch.ones(1, 4)))
    rng = np.random.default_rng(0)
    for seed in range(20):
        scores = Scores({a.id: np.sort(np.random.default_rng(seed + a.id).random(a.width)) * rng.random() for a in coupling.prunable}, True)
        lost = []
        for spare in (False, True):
            plan = coppice.plan(coupling, scores, {"macs": 0.55 * coupling.cost().macs}, round_to=4, min_width=4, spare=spare)
            keep = {axis.name: list(axis.keep) for axis in plan.axes}
            lost.append(sum(np.delete(scores[a.id], keep[a.name]).sum() for a in coupling.prunable))
            assert coupling.cost({a.id: len(keep[a.name]) for a in coupling.prunable}).macs <= 0.55 * coupling.cost().macs
        assert lost[1] <= lost[0] + 1e-12
