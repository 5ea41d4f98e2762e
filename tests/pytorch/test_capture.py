"""Capture: values, names, module paths and constants of one forward pass, and a model that stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coppice
from coppice import CoppiceError
from coppice.graph import Kind


class Tied(nn.Module):
    """Two names for one weight, a constant made in the forward, a dropout, and a nested module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.other = nn.Linear(4, 6)
        self.other.weight = self.inner[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.other(x) * torch.tensor([2.0])


def test_values_and_places() -> None:
    model = Tied()
    graph = coppice.capture(model, (torch.randn(3, 4),))
    names = {v.names: v for v in graph.weights()}
    assert ("inner.0.weight", "other.weight") in names
    assert names["inner.1.running_var",].kind is Kind.BUFFER
    assert [graph.values[v].kind for v in graph.inputs] == [Kind.INPUT]
    assert [graph.shape(v) for v in graph.outputs] == [(3, 6)]
    assert [(op.name, op.module) for op in graph.ops if op.rule in ("mm", "batch_norm")] == [
        ("aten.addmm", "inner.0"),
        ("aten.native_batch_norm", "inner.1"),
        ("aten.addmm", "other"),
    ]
    assert any(v.kind is Kind.CONSTANT for v in graph.values)
    assert all(a < b for op in graph.ops for a in op.inputs if a is not None for b in op.outputs if b not in op.inputs)


def test_the_model_stays_as_it_was() -> None:
    model = Tied().train()
    model.inner[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    coppice.capture(model, torch.randn(3, 4))
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


class CopiesItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        own: Tensor = self.inner(x)
        copied = copy.deepcopy(self.inner)
        nn.init.zeros_(copied.weight)
        return own + copied(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_calls_of_modules_are_followed_and_leave_no_trace(values: bool, compiled: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), CopiesItself())
    if compiled:
        model[0].compile(backend="eager")
    graph = coppice.capture(model, torch.randn(3, 4), values=values)
    assert [op.module for op in graph.ops if op.rule == "mm"] == ["0", "1.inner", "1"]  # the copy is no module of the model
    assert [call.path for call in graph.calls] == ["0", "1.inner", "1", ""]
    assert not any("_call_impl" in vars(m) for m in model.modules())
    assert (model[0]._compiled_call_impl is not None) == compiled
    assert torch.count_nonzero(model[1].inner.weight)


def test_the_batch_is_the_first_dim_of_an_image() -> None:
    model = nn.Conv2d(3, 5, 3, bias=False)
    costs = [coppice.couple(coppice.capture(model, torch.randn(n, 3, 6, 6))).cost() for n in (1, 4)]
    assert costs[0] == costs[1]
    assert costs[0].macs == 3 * 5 * 9 * 16


def test_a_forward_that_fails_is_one_sentence() -> None:
    with pytest.raises(CoppiceError, match=r"fails on the example inputs .*check their shapes"):
        coppice.capture(nn.Linear(4, 2), torch.randn(3, 5))


def test_hooks_and_flags_are_restored_after_a_failure() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 2)).train()
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(CoppiceError):
        coppice.capture(model, torch.randn(3, 5))
    assert all(m.training for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


class InPlace(nn.Module):
    """Writes into a slice of its own activation, and in place through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.a(x))
        x[:, :3] *= 2.0
        return self.b(x)


def test_writing_in_place_is_followed() -> None:
    model, x = InPlace(), torch.randn(3, 4)
    coupling = coppice.couple(coppice.capture(model, x))
    masks = {a.id: torch.arange(a.width).numpy() % 2 == 0 for a in coupling.prunable}
    from coppice.planning import make_plan

    plan = make_plan(coupling, masks)
    pruned = coppice.apply(model, plan)
    coppice.verify(model, pruned, coupling, plan)


def test_an_op_without_a_rule_pins_what_it_touches() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.fft.fft(self.a(x)).real)

    coupling = coppice.couple(coppice.capture(Odd(), torch.randn(3, 4)))
    assert coupling.pins["no rule for aten._fft_r2c"] == ["a.weight:0"]
    assert not coupling.prunable


class InInferenceMode(nn.Module):
    """PyTorch shows ops that are made of others (`linear`, `prelu`, `flatten`) whole where no gradient can ever be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Linear(64, 10)

    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.nn.functional.adaptive_avg_pool2d(self.act(self.conv(x)), 2).flatten(1))


def test_ops_made_of_others_are_taken_apart() -> None:
    graph = coppice.capture(InInferenceMode(), torch.randn(2, 3, 8, 8))
    assert "aten.linear" not in {op.name for op in graph.ops}
    coupling = coppice.couple(graph)
    assert coupling.pins.keys() == {"model input", "model output"}
    assert {site for axis in coupling.prunable for site in axis.sites} >= {("conv.weight", 0), ("act.weight", 0), ("fc.weight", 1)}


class Swallows(nn.Module):
    """Looks at a value, and goes another way where it can't."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        try:
            return torch.relu(y) if float(x.sum()) < 1e9 else y
        except Exception:
            return torch.tanh(y)


class Fills(nn.Module):
    """Writes into a tensor of its own making, and looks at what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 6)
        y[:, :3] = self.fc(x)[:, :3].square() + 1
        return torch.relu(y) if y.numpy().any() else torch.tanh(y)


@pytest.mark.parametrize("model", [Swallows(), Fills()], ids=["caught", "written"])
def test_code_that_looks_at_values_gets_them(model: nn.Module) -> None:
    graph = coppice.capture(model, torch.randn(3, 4))
    names = [op.name for op in graph.ops]
    assert "aten.relu" in names
    assert "aten.tanh" not in names
    assert graph.origin.with_values


class Attends(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def test_nothing_is_computed_where_shapes_say_all() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), Attends(36, 4, batch_first=True))
    x = torch.randn(2, 3, 8, 8)
    quick, slow = coppice.capture(model, x), coppice.capture(model, x, values=True)
    assert not quick.origin.with_values
    assert slow.origin.with_values
    assert [(op.name, op.rule, op.attrs, quick.shape(op.outputs[0])) for op in quick.ops] == [
        (op.name, op.rule, op.attrs, slow.shape(op.outputs[0])) for op in slow.ops
    ]
