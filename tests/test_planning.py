"""The low-level interface: axes by name, what goes with them, and plans by hand that are refused where they can't be."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice import CoppiceError
from coppice.coupling import Coupling
from known_nets import AWKWARD


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))


@pytest.fixture
def coupling() -> Coupling:
    return coppice.couple(coppice.capture(TwoBranches(), torch.randn(1, 3, 4, 4)))


def test_a_dim_names_the_axis_that_lies_on_it(coupling: Coupling) -> None:
    assert coupling.axis("fc.weight:1") is coupling.axis("c.weight:0")
    assert [a.name for a in coupling.on("c.weight", 1)] == ["a.weight:0", "b.weight:0"]
    assert [a.name for a in coupling.on("c.weight", -4)] == ["c.weight:0"]


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        ({"c.weight:1": [0]}, "c.weight:1 is made of 2 axes: a.weight:0, b.weight:0; name one of them"),
        ({"c.weight:2": [0]}, "c.weight:2 is made of 0 axes: its size is 1"),
        ({"d.weight:1": [0]}, "there is no dim 1 of a tensor 'd.weight'"),
        ({"c.weight:4": [0]}, "there is no dim 4 of a tensor 'c.weight'"),
        ({"c.weight": [0]}, "'c.weight' names no axis"),
        ({"a.weight:0": [4]}, "a.weight:0 has indices 0 to 3, not 4"),
        ({"a.weight:0": [-1]}, "a.weight:0 has indices 0 to 3, not -1"),
        ({"a.weight:0": range(4)}, "all 4 indices of a.weight:0 would go; leave one"),
        ({"fc.bias:0": [1]}, "fc.bias:0 can't be cut: model output"),
    ],
)
def test_what_cant_be_is_refused(coupling: Coupling, indices: dict[str, Iterable[int]], says: str) -> None:
    with pytest.raises(CoppiceError) as raised:
        coppice.remove(coupling, indices)
    assert says in str(raised.value)


def test_indices_given_under_two_names_go_together(coupling: Coupling) -> None:
    plan = coppice.remove(coupling, {"c.weight:0": [1], "fc.weight:1": [5, 1]})
    assert {a.name: a.keep for a in plan.axes}["c.weight:0"] == (0, 2, 3, 4, 6, 7)


def test_tied_axes_are_cut_in_proportion() -> None:
    model, inputs = AWKWARD["torch_multihead_attention"]()
    coupling = coppice.couple(coppice.capture(model, inputs))
    stream, head = coupling.axis("embed.weight:0"), coupling.axis("attn.in_proj_weight:0.3")
    assert head in coupling.tied_to(stream)
    with pytest.raises(CoppiceError, match="in proportion"):
        coppice.remove(coupling, {head.name: [0]})
    names = [stream.name, *(a.name for a in coupling.tied_to(stream))]
    plan = coppice.remove(coupling, {name: range(coupling.axis(name).width // 4) for name in names})
    assert coppice.verify(model, coppice.apply(model, plan), coupling, plan).max_error < 1e-10
