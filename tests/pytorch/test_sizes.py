"""Sizes that the user's code holds: bound where an attribute holds them, tied where the code divides them, pinned where it freezes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coppice
import coppice.torch.shapes
from coppice.axes import atoms, find
from coppice.coupling import Coupling
from coppice.testing import random_plan
from coppice.testing.blocks import Residual, Split
from coppice.testing.map_blocks import WindowAttention
from coppice.testing.token_blocks import ClassicAttention, StoredAttention


@pytest.fixture(autouse=True, params=["real", "fake"])
def tensors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs twice: the code is recorded and tried on real tensors, and on ones without values."""
    monkeypatch.setattr(coppice.torch.shapes, "USED", request.param != "real")


def coupled(model: nn.Module, *inputs: Tensor) -> Coupling:
    """The coupling, after a few random plans have been applied and verified."""
    coupling = coppice.couple(coppice.capture(model, inputs))
    for seed in range(4):
        plan = random_plan(coupling, seed)
        coppice.verify(model, coppice.apply(model, plan), coupling, plan)
    return coupling


def tokens(block: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), Residual(block), nn.Linear(width, 3))


def by_name(coupling: Coupling, name: str) -> object:
    return find(next(a.atom for a in coupling.axes if a.name == name))


def test_stored_sizes_are_bound() -> None:
    coupling = coupled(tokens(StoredAttention(12, 3, 8, True, True), 12), torch.randn(2, 4, 5))
    heads, keys, values = (by_name(coupling, f"1.body.qkv.weight:0{k}") for k in ("", ".2", ".3"))
    assert find(coupling.bindings["1.body", "num_heads", None]) is heads
    assert set(atoms(coupling.bindings["1.body", "head_dim", None])) <= {keys, values}
    assert set(atoms(coupling.bindings["1.body", "attn_dim", None])) <= {heads, keys, values}
    assert [set(bundle) for bundle in coupling.bundles() if keys in bundle] == [{keys, values}]


def test_head_width_computed_from_the_input_is_tied() -> None:
    """``c // num_heads``: the stream and the head width stay in proportion, the number of heads stays."""
    coupling = coupled(tokens(ClassicAttention(24, 3, True), 24), torch.randn(2, 4, 5))
    (bundle,) = coupling.bundles()
    assert sorted(a.size for a in bundle) == [8, 8, 24]  # the stream, the queries and keys of a head, its values
    assert coupling.pins["the code works its size out from other widths"] == ["1.body.qkv.weight:0"]


def test_windows_with_a_bias_for_each_head() -> None:
    """Swin's block: heads may go, with their column of the bias table."""
    model = nn.Sequential(nn.Conv2d(3, 24, 1), WindowAttention(24, 3, 2, 1), nn.Conv2d(24, 4, 1))
    coupling = coupled(model, torch.randn(2, 3, 4, 4))
    heads = next(a for a in coupling.axes if a.name == "1.bias_table:1")
    assert heads.pinned is None
    assert ("1.qkv.weight", 0) in heads.sites
    assert find(coupling.bindings["1", "num_heads", None]) is heads.atom


@pytest.mark.parametrize("heads", [2, 3])
def test_torch_attention(heads: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(12, heads, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x, need_weights=False)[0]

    coupling = coupled(tokens(Block(), 12), torch.randn(2, 4, 5))
    assert {a.size for bundle in coupling.bundles() for a in bundle} == {12, 12 // heads}


def test_split_sizes_of_equal_numbers() -> None:
    """Both pieces are 8 wide: each of the numbers belongs to its own piece."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.split, self.b, self.c = nn.Linear(5, 16), Split((8, 8), -1), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.split(x if x.dim() == 1 else self.a(x))
            return self.b(torch.relu(first)) + self.c(torch.sigmoid(second))

    coupling = coupled(Two(), torch.randn(4, 5))
    first, second = (find(coupling.bindings["split", "sizes", k]) for k in (0, 1))
    assert first is by_name(coupling, "a.weight:0")
    assert second is by_name(coupling, "a.weight:0.2")


def test_where_a_slice_starts_is_a_size_too() -> None:
    """No shape shows it: a wrong start gives the right shape and the wrong channels."""

    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.start = nn.Linear(5, 12), nn.Linear(7, 3), 5

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x))[:, self.start :])

    coupling = coupled(Tail(), torch.randn(4, 5))
    assert find(coupling.bindings["", "start", None]).size == 5
    assert len(coupling.prunable) == 2


def test_a_frozen_number_pins_what_it_fixes_and_no_more() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.b(F.relu(self.a(x))))
            return self.c(x.view(-1, 24))

    coupling = coupled(Frozen(), torch.randn(4, 5))
    assert [a.name for a in coupling.prunable] == ["a.weight:0"]
    assert coupling.pins["its size is frozen in the code of Frozen"] == ["b.weight:0"]


def test_a_frozen_number_of_heads_leaves_their_width() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 24), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(x.shape[0], 4, -1).softmax(-1).flatten(1))

    coupling = coupled(Heads(), torch.randn(2, 5))
    assert [(a.width, a.pinned) for a in coupling.axes if a.name.startswith("a.weight:0")] == [
        (4, "its size is frozen in the code of Heads"),
        (6, None),
    ]


def test_halves_of_a_chunk_are_tied() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 16), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.a(x).chunk(2, -1)
            return self.b(first) - self.c(second)

    (bundle,) = coupled(Halves(), torch.randn(2, 5)).bundles()
    assert [a.size for a in bundle] == [8, 8]


def test_code_that_looks_at_values_is_tried_on_real_tensors() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y if bool(x.sum() > 1e9) else torch.relu(y))

    assert len(coupled(Looks(), torch.randn(2, 5)).prunable) == 1


class Restless(nn.Module):
    """Takes another way now and then: ``turns`` says at which call."""

    def __init__(self, turns: Callable[[int], bool]) -> None:
        super().__init__()
        self.a, self.b, self.calls, self.turns = nn.Linear(5, 12), nn.Linear(12, 3), [], turns

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        y = self.a(x)
        return self.b(torch.relu(y) if self.turns(len(self.calls)) else torch.tanh(y))


def test_code_that_never_runs_the_same_ops_is_pinned_and_says_so() -> None:
    coupling = coppice.couple(coppice.capture(Restless(lambda calls: calls % 2 == 0), torch.randn(2, 5)))
    assert not coupling.prunable
    assert any("does not run the same ops twice" in reason for reason in coupling.pins)


def test_code_that_sets_something_up_when_first_called_is_recorded_again() -> None:
    coupling = coupled(Restless(lambda calls: calls == 1), torch.randn(2, 5))
    assert [a.name for a in coupling.prunable] == ["a.weight:0"]
    assert "aten.tanh" in [op.name for op in coupling.graph.ops]


class Keeps(nn.Module):
    """Keeps what it works out from a weight between passes in evaluation, and drops it when the mode is set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.table, self.kept = nn.Linear(5, 12), nn.Linear(12, 3), nn.Parameter(torch.randn(2, 12)), {}
        self.register_buffer("index", torch.tensor([1, 0]))

    def train(self, mode: bool = True) -> Keeps:
        super().train(mode)
        self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training or "bias" not in self.kept:
            self.kept["bias"] = self.table[self.index]
        return self.b(self.a(x) + self.kept["bias"])


def test_what_is_kept_of_a_weight_follows_its_axis() -> None:
    model, x = Keeps().eval(), torch.randn(2, 5)
    model(x)
    coupling = coupled(model, x)
    assert ("table", 1) in coupling.axis("a.weight:0").sites
    plan = random_plan(coupling, 0)
    assert coppice.apply(model, plan)(x).shape == (2, 3)  # what the dense one has kept is not in the way


class MadeFirst(nn.Module):
    """Works something out of its own before it looks at its input, whose width it then divides by the number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v, self.proj, self.gate = nn.Linear(24, 48), nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        near = (torch.arange(n).view(1, n) - torch.arange(n).view(n, 1)).abs().view(1, n, n, 1) / n
        q, k = self.qk(x).reshape(b, n, 2, 3, c // 3).permute(2, 0, 3, 1, 4)
        near = self.gate(near).permute(0, 3, 1, 2)
        v = self.v(x).reshape(b, n, 3, c // 3).permute(0, 2, 1, 3)
        y = (q @ k.transpose(-2, -1) * 0.3 + near).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


def test_a_width_that_is_read_late_is_tied() -> None:
    model = nn.Sequential(nn.Linear(5, 24), *(Residual(MadeFirst()) for _ in range(2)), nn.Linear(24, 3))
    coupling = coupled(model, torch.randn(2, 4, 5))
    assert {a.size for bundle in coupling.bundles() for a in bundle} == {24, 8}
    assert "1.body.v.weight:0" in {a.name for a in coupling.prunable}


def test_places_of_a_pointwise_convolution_are_an_axis() -> None:
    """Tokens summed up by a convolution over them: its places are the tokens' channels."""
    model = nn.Sequential(nn.Linear(5, 12), nn.Conv1d(4, 1, 1), nn.Flatten(), nn.Linear(12, 3))
    assert [a.name for a in coupled(model, torch.randn(2, 4, 5)).prunable] == ["0.weight:0"]
