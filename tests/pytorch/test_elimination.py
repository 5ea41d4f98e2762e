"""The path of removals against least squares by hand."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice import elimination
from coppice.coupling import Coupling
from coppice.criteria import measure
from coppice.elimination import Removal
from coppice.torch.elimination import divergence, drawn, removal_losses
from coppice.torch.linear import Recorded


def removal_paths(
    model: nn.Module, coupling: Coupling, batches: list[Tensor], orders: Mapping[int, Sequence[int]] | None = None
) -> dict[int, Removal]:
    return elimination.removal_paths(Recorded(model, batches), coupling, drawn(0), orders)


def linear_net(width: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3, bias=False)).double()


def without(model: nn.Sequential, x: Tensor, gone: list[int]) -> tuple[Tensor, float]:
    """The best second weight with zeros at ``gone``, by ``lstsq``, and its error relative to the response's energy."""
    hidden = model[:2](x).detach()
    stays = [k for k in range(hidden.shape[1]) if k not in gone]
    goal = hidden @ model[2].weight.detach().T
    weight = torch.zeros_like(model[2].weight)
    weight[:, stays] = torch.linalg.lstsq(hidden[:, stays], goal).solution.T
    return weight, float((hidden @ weight.T - goal).square().sum() / goal.square().sum())


def test_the_path_is_the_greedy_one_and_its_refits_are_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "RIDGE", 1e-9)
    monkeypatch.setattr(elimination, "SCARCITY", 0.0)
    monkeypatch.setattr(elimination, "SAMPLES_A_FEATURE", 1000)
    model, x = linear_net(), torch.randn(400, 5, dtype=torch.float64)
    coupling = coppice.couple(coppice.capture(model, x[:1]))
    (path,) = removal_paths(model, coupling, [x]).values()
    first = [without(model, x, [k])[1] for k in range(6)]
    assert path.order[0] == int(np.argmin(first))
    assert path.added[0] == pytest.approx(min(first), rel=1e-4)
    assert path.added == sorted(path.added)
    assert sorted(path.order) == list(range(6))
    for level, edits in path.edits.items():
        torch.testing.assert_close(torch.from_numpy(edits["2.weight"]), without(model, x, path.order[:level])[0], rtol=1e-3, atol=1e-5)


class Twins(nn.Module):
    """A convolution, BatchNorm, and channels 2 and 5 that are the same; grouped and depthwise layers read it too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.out = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)
        for weight in (self.conv.weight, self.conv.bias, self.deep.weight, self.deep.bias):
            assert weight is not None
            weight.data[5] = weight.data[2]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.out(torch.relu(self.deep(torch.relu(self.bn(self.conv(x)))))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def test_what_another_channel_can_stand_in_for_goes_first_and_costs_next_to_nothing() -> None:
    torch.manual_seed(0)
    model = Twins().eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 10, 10)))
    axis = next(a for a in coupling.prunable if ("conv.weight", 0) in a.sites)
    batches = [torch.randn(16, 3, 10, 10) for _ in range(8)]
    path = removal_paths(model, coupling, batches)[axis.id]
    assert path.order[0] in (2, 5)
    assert path.added[0] < 0.3 * path.added[1]
    losses = removal_losses(model, coupling, batches)[axis.id]
    assert np.argsort(losses, kind="stable").tolist()[0] == path.order[0]


def test_an_axis_that_only_activations_sum_over_goes_by_the_norm_of_its_weights() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x)
            scores: Tensor = self.head(y.mean(1))
            return scores

    torch.manual_seed(0)
    model = Attention().eval()
    model.q.weight.data[3] *= 1e-3
    model.q.bias.data[3] *= 1e-3
    model.k.weight.data[3] *= 1e-3
    model.k.bias.data[3] *= 1e-3
    coupling = coppice.couple(coppice.capture(model, torch.randn(2, 5, 6)))
    axis = next(a for a in coupling.prunable if ("q.weight", 0) in a.sites)
    batches = [torch.randn(16, 5, 6) for _ in range(4)]
    path = removal_paths(model, coupling, batches)[axis.id]
    assert path.order[0] == 3
    assert set(path.edits[2]) == {"q.weight", "q.bias", "k.weight", "k.bias"}
    assert not path.edits[2]["q.weight"][path.order[:2]].any()
    losses = removal_losses(model, coupling, batches)[axis.id]
    assert np.isfinite(losses).all()
    assert losses[3] == losses.min()


def test_an_order_that_another_criterion_chose_is_followed_and_measured() -> None:
    torch.manual_seed(0)
    model = Twins().eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 10, 10)))
    batches = [torch.randn(16, 3, 10, 10) for _ in range(8)]
    random = coppice.score(model, coupling, "random", seed=5)
    orders = {axis.id: np.argsort(random[axis.id]).tolist() for axis in coupling.prunable}
    for axis, path in removal_paths(model, coupling, batches, orders=orders).items():
        assert path.order == orders[axis]
    measured = measure(model, coupling, random, [(batch, None) for batch in batches])
    assert measured.additive
    greedy = removal_losses(model, coupling, batches)
    for axis in coupling.prunable:
        assert np.argsort(measured[axis.id], kind="stable").tolist() == orders[axis.id]
        assert measured[axis.id].sum() > 0
    assert sum(measured[a.id].sum() for a in coupling.prunable) >= 0.5 * sum(greedy[a.id].sum() for a in coupling.prunable)


def test_too_many_features_are_seen_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "LARGEST", 3)
    model, x = linear_net(), torch.randn(400, 5, dtype=torch.float64)
    coupling = coppice.couple(coppice.capture(model, x[:1]))
    (path,) = removal_paths(model, coupling, [x]).values()
    assert sorted(path.order) == list(range(6))
    last = path.edits[max(path.edits)]["2.weight"]
    assert last.shape == model[2].weight.shape
    assert not last[:, path.order[: max(path.edits)]].any()


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = Twins().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 10, 10)))
    removal_losses(model, coupling, [torch.randn(4, 3, 10, 10)])
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_divergence_is_nought_for_the_same_and_more_for_what_is_further_off() -> None:
    scores, maps = torch.randn(5, 4), torch.randn(5, 4, 3, 3)
    for dense in (scores, maps):
        noise = torch.randn_like(dense)
        near, far = (divergence(dense + size * noise, dense) for size in (0.01, 0.5))
        assert abs(divergence(dense, dense)) < 1e-9
        assert 0 < near < far
