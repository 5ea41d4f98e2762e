"""The two trials that settle most models, and copies of module trees: what they must notice, and that nothing is shared by mistake."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice.axes import atoms, find
from coppice.torch.capture import Origin
from coppice.torch.known import bind_known_modules
from coppice.torch.probes import agrees_at_once, fits, prime_widths
from coppice.torch.trees import copied
from coppice.torch.trial import Trials


class Two(nn.Module):
    """Two convolutions with ``between`` on what lies between them."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.between, self.second = nn.Conv2d(3, 64, 1), between, nn.Conv2d(64, 32, 1)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.between(self.first(x))))


class Frozen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 64, x.shape[2], x.shape[3])


class Threshold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.shape[1] >= 64 else x.sigmoid()


def settled(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the two trials agree with the axes of ``model``, before anything was searched."""
    answers: list[bool] = []

    def bind(origin: Origin, coupling: coppice.coupling.Coupling) -> None:
        bind_known_modules(model, coupling)
        answers.append(agrees_at_once(Trials(coupling), coupling))

    monkeypatch.setattr(Origin, "bind_sizes", bind)
    coppice.couple(coppice.capture(model.eval(), torch.randn(1, 3, 8, 8)))
    return answers[0]


def test_plain_network_is_settled_by_two_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settled(Two(nn.BatchNorm2d(64)), monkeypatch)


@pytest.mark.parametrize("between", [Frozen(), Threshold()], ids=["frozen", "threshold"])
def test_what_depends_on_a_size_is_left_to_the_search(between: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settled(Two(between), monkeypatch)


def test_prime_widths_are_in_no_simple_relation() -> None:
    coupling = coppice.couple(coppice.capture(Two(nn.BatchNorm2d(64)).eval(), torch.randn(1, 3, 8, 8)))
    widths = sorted(prime_widths(coupling).values())
    assert len(widths) == 2
    assert all(b % a and b < 2 * a for a, b in itertools.pairwise(widths))
    assert {find(a) for a in prime_widths(coupling)} == {axis.atom for axis in coupling.prunable}


class ManyFactors(nn.Module):
    """One axis as a product of nine."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *[2] * 9, *x.shape[2:]).relu().flatten(1, 9)


def test_an_axis_of_more_factors_than_a_tensor_can_count_is_left_to_the_search() -> None:
    model = nn.Sequential(nn.Conv2d(3, 512, 1), ManyFactors(), nn.Conv2d(512, 4, 1)).eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 4, 4)))
    assert not fits(coupling, dict.fromkeys((a for dims in coupling.dims for d in dims for a in atoms(d)), 257))
    assert fits(coupling, {})


class Equal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(x)
        return torch.cat([y, x], 1) if x.shape != y.shape else torch.cat([y.relu(), x], 1)


def test_sizes_that_happen_to_be_equal_are_left_to_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not settled(nn.Sequential(nn.Conv2d(3, 64, 1), Equal(), nn.Conv2d(96, 4, 1)), monkeypatch)


class Sharing(nn.Module):
    """What a copy must keep as it is: aliases, cycles, lists of modules, containers that are shared while empty."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.cache = nn.Linear(4, 4), {}
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.both = [self.a, (self.b, {"a": self.a})]
        self.a.__dict__["parent"] = self
        self.b.__dict__["cache"] = self.cache
        self.lstm = nn.LSTM(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.register_buffer("mask", torch.ones(2), persistent=False)


def test_copies_of_module_trees_are_those_of_deepcopy() -> None:
    model = Sharing()
    for made in (copied(model, {}), copy.deepcopy(model)):
        assert made.b.weight is made.a.weight is not model.a.weight
        assert [made.both[0], *made.both[1]] == [made.a, made.b, {"a": made.a}]
        assert made.a.parent is made
        assert made.b.cache is made.cache is not model.cache
        assert made.lstm._flat_weights[0] is made.lstm.weight_ih_l0
        assert made.normed.parametrizations.weight.original0 is not model.normed.parametrizations.weight.original0
        assert made.state_dict().keys() == model.state_dict().keys()
        assert made._non_persistent_buffers_set == {"mask"}
        assert made._non_persistent_buffers_set is not model._non_persistent_buffers_set
        x = torch.randn(3, 4)
        assert torch.equal(made.normed(x), model.normed(x))


def test_a_copy_takes_the_tensors_it_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    new = nn.Parameter(torch.zeros(2, 4))
    made = copied(model, {id(model[0].weight): new})
    assert made[0].weight is new
    assert made[0].bias is not model[0].bias
    assert torch.equal(made[0].bias, model[0].bias)
