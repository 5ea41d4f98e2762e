"""Whole modules that go: each kind on a minimal network, found, removed, and proven in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coppice
from coppice.coupling import Coupling
from coppice.errors import CoppiceError, VerificationError
from coppice.exporting import export_onnx
from coppice.planning import Plan, compose
from coppice.testing.networks import randomise
from coppice.torch.apply import build, slice_optimizer_state
from known_nets import AWKWARD


class Residual(nn.Module):
    """Two residual blocks with a shared activation, as torchvision writes them; the first has a convolution as its shortcut."""

    class Block(nn.Module):
        def __init__(self, before: int, after: int, in_place: bool) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
            self.conv2, self.bn2 = nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
            self.relu = nn.ReLU(inplace=True)
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1), nn.BatchNorm2d(after)) if before != after else None
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            x = x if self.shortcut is None else self.shortcut(x)
            if self.in_place:
                y += x
            else:
                y = y + x
            return self.relu(y)

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(self.Block(4, 6, in_place), self.Block(6, 6, in_place))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PreNorm(nn.Module):
    """A transformer block; what it is given has not gone through an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + self.drop(y)
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Branches(nn.Module):
    """Three branches and their concat, normalised before it is read: what is removed is zero only where it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.middle1, self.middle2 = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(14)
        self.out = nn.Conv2d(14, 7, 3, padding=1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.left(x), self.middle2(torch.relu(self.middle1(x))), self.right(F.avg_pool2d(x, 3, 1, 1))]
        y = torch.relu(self.out(torch.sigmoid(self.norm(torch.cat(parts, 1)))))
        return self.head(y.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze-and-excitation as a module, and the same written into the code."""

    class Excite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))) * x

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.excite = nn.Conv2d(3, 6, 3, padding=1), self.Excite()
        self.squeeze, self.gate, self.head = nn.Conv2d(6, 6, 1), nn.Hardsigmoid(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.excite(torch.relu(self.stem(x)))
        x = x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


class Layers(nn.Module):
    """A layer that gives what it is given, in shape, between two that don't."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)).mean((2, 3)))


class Pooled(nn.Module):
    """Three pooling layers: after a convolution, after a sum and before a convolution, and before what takes any size."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.pool1 = {"max": nn.MaxPool2d(3, 2, 1), "avg": nn.AvgPool2d(2)}[kind]
        self.left, self.right, self.pool2 = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.MaxPool2d(2)
        self.conv, self.norm, self.pool3 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.MaxPool2d(2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.bn(self.stem(x))))
        x = self.conv(self.norm(self.pool2(self.left(x) + torch.tanh(self.right(x)))))
        return self.head(F.adaptive_avg_pool2d(torch.relu(self.pool3(torch.cat((x, x), 1)[:, 3:9])), 1).flatten(1))


class Merged(nn.Module):
    """Convolutions in a row: with their own activation, with one that is shared, grouped, strided, and one that pads and so stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn1, self.act, self.b = nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 8, 2, 2)
        self.bn2, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.c, self.bn3, self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1, bias=False)
        self.e, self.f = nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(6, 4, 1, groups=2)
        self.g, self.h = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.i, self.j = nn.Conv2d(4, 5, 1, bias=False), nn.Conv2d(5, 4, 3, padding=1)
        self.shortcut = self.Shortcut()
        self.head = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 5, bias=False))

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bn(self.conv(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn2(self.b(self.act(self.bn1(self.a(x))))))
        x = torch.tanh(self.d(self.relu(self.bn3(self.c(x)))))
        x = torch.tanh(self.h(self.g(torch.tanh(self.f(self.e(x))))))
        x = torch.tanh(self.j(self.i(x)))
        return self.head(torch.tanh(self.shortcut(x)).mean((2, 3)))


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 6)
Case = tuple[Callable[[], nn.Module], tuple[int, ...], str, str]
CASES: dict[str, Case] = {
    "residual": (Residual, IMAGE, "blocks.1", "residual"),
    "beside a shortcut with weights": (Residual, IMAGE, "blocks.0:residual", "residual"),
    "not in place": (lambda: Residual(False), IMAGE, "blocks.0:residual", "residual"),
    "a shortcut's own weights": (Residual, IMAGE, "blocks.0.conv2", "layer"),
    "attention": (PreNorm, TOKENS, "attention", "attention"),
    "mlp": (PreNorm, TOKENS, "mlp", "mlp"),
    "branch": (Branches, IMAGE, "left", "branch"),
    "branch of two layers": (Branches, IMAGE, "middle2", "branch"),
    "branch behind a pooling in the code": (Branches, IMAGE, "right", "branch"),
    "gate": (Gated, IMAGE, "excite", "gate"),
    "gate in the code": (Gated, IMAGE, "gate", "gate"),
    "layer": (Layers, IMAGE, "middle", "layer"),
    "maximum, its stride moved forward": (lambda: Pooled("max"), (2, 3, 16, 16), "pool1", "pool"),
    "mean, its stride moved forward": (lambda: Pooled("avg"), (2, 3, 16, 16), "pool1", "pool"),
    "merge: strided, with BatchNorm": (Merged, (2, 3, 16, 16), "a+b", "merge"),
    "merge: a shared activation": (Merged, (2, 3, 16, 16), "c+d", "merge"),
    "merge: groups": (Merged, (2, 3, 16, 16), "e+f", "merge"),
    "merge: padded after no bias": (Merged, (2, 3, 16, 16), "i+j", "merge"),
    "merge: linear": (Merged, (2, 3, 16, 16), "head.0+2", "merge"),
}
EXACT = {"merge: groups", "merge: padded after no bias"}  # nothing else than the two layers goes


def made(build_it: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Coupling]:
    torch.manual_seed(0)
    model, x = build_it(), torch.randn(shape)
    randomise(model, 0)
    return model.eval(), x, coppice.couple(coppice.capture(model, x))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_each_kind(case: str) -> None:
    build_it, shape, name, kind = CASES[case]
    model, x, coupling = made(build_it, shape)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    candidate = {c.name: c for c in coppice.removable(coupling)}[name]
    assert candidate.kind == kind
    plan = coppice.remove_modules(coupling, [name])
    pruned = coppice.apply(model, plan)
    assert coppice.verify(model, pruned, coupling, plan).max_error < 1e-12
    assert type(pruned) is type(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    after = coppice.couple(coppice.capture(pruned, x)).cost()
    assert coupling.cost().macs - after.macs == candidate.macs
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in pruned.parameters()) == candidate.params
    assert kind == "merge" or candidate.macs > 0
    again = build(build_it().eval(), Plan.from_json(plan.to_json()), pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))
        assert torch.allclose(pruned(x), model(x), atol=1e-5) == (case in EXACT)
    pruned.train()
    pruned(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", ["attention", "branch behind a pooling in the code"])
def test_what_stands_in_is_exported(case: str, tmp_path: Path) -> None:
    build_it, shape, name, _ = CASES[case]
    model, _, coupling = made(build_it, shape)
    pruned = coppice.apply(model, coppice.remove_modules(coupling, [name]))
    assert export_onnx(pruned, torch.randn(4, *shape[1:]), tmp_path / "model.onnx").error < 1e-5


@pytest.mark.usefixtures("one_thread")
def test_a_residual_branch_is_zero_for_the_model_too() -> None:
    """Without any part of coppice but the removal: the branch's last scale and shift at zero."""
    model, x, coupling = made(Residual, IMAGE)
    pruned = coppice.apply(model, coppice.remove_modules(coupling, ["blocks.1"]))
    with torch.no_grad():
        model.blocks[1].bn2.weight.zero_()
        model.blocks[1].bn2.bias.zero_()
        assert torch.equal(pruned(x), model(x))


@pytest.mark.usefixtures("one_thread")
def test_what_saves_no_product_but_a_layer() -> None:
    model, x, coupling = made(Merged, (2, 3, 16, 16))
    plan = coppice.remove_modules(coupling, ["shortcut:merge"])
    pruned = coppice.apply(model, plan)
    assert coppice.verify(model, pruned, coupling, plan).max_error < 1e-12
    assert isinstance(pruned.shortcut, nn.Conv2d)
    with torch.no_grad():
        assert torch.allclose(pruned(x), model(x), atol=1e-5)
    model, x, coupling = made(lambda: Pooled("max"), (2, 3, 16, 16))
    plan = coppice.remove_modules(coupling, ["pool2", "pool3"])
    pruned = coppice.apply(model, plan)
    assert coppice.verify(model, pruned, coupling, plan).max_error < 1e-12
    assert pruned.conv.stride == (2, 2)


def test_a_convolution_that_pads_is_not_merged_into_one_that_answers_zeros() -> None:
    _, _, coupling = made(Merged, (2, 3, 16, 16))
    merges = {c.name for c in coppice.removable(coupling) if c.kind == "merge"}
    assert merges == {"a+b", "c+d", "e+f", "i+j", "head.0+2", "shortcut:merge"}


@pytest.mark.usefixtures("one_thread")
def test_several_and_then_widths() -> None:
    model, x, coupling = made(Branches, IMAGE)
    plan = coppice.remove_modules(coupling, ["left", "right"])
    shallow = coppice.apply(model, plan)
    inner = coppice.couple(coppice.capture(shallow, x))
    narrow = coppice.remove(inner, {"middle1.weight:0": [1], "out.weight:0": [0, 3]})
    whole = replace(narrow, removed=plan.removed)
    pruned = coppice.apply(model, whole)
    assert coppice.verify(model, pruned, coupling, whole).max_error < 1e-12
    assert pruned.out.weight.shape == (5, 6, 3, 3)
    assert Plan.from_json(whole.to_json()) == whole
    assert whole.modules == {"left": "branch", "right": "branch"}


@pytest.mark.usefixtures("one_thread")
def test_widths_and_then_a_module() -> None:
    model, x, coupling = made(Branches, IMAGE)
    first = coppice.remove(coupling, {"middle2.weight:0": [0, 5], "out.weight:0": [2]})
    narrow = coppice.apply(model, first)
    second = coppice.remove_modules(coppice.couple(coppice.capture(narrow, x)), ["left"])
    whole = compose(first, second)
    pruned = coppice.apply(model, whole)
    assert coppice.verify(model, pruned, coupling, whole).max_error < 1e-12
    assert torch.equal(pruned(x), coppice.apply(narrow, second)(x))
    assert Plan.from_json(whole.to_json()) == whole


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_removal_is_found() -> None:
    model, _, coupling = made(Residual, IMAGE)
    plan = coppice.remove_modules(coupling, ["blocks.1"])
    pruned = coppice.apply(model, plan)
    assert plan.removed is not None
    other = replace(plan, removed=replace(plan.removed, edits=coppice.remove_modules(coupling, ["blocks.1.conv1"]).removed.edits))
    with pytest.raises(VerificationError, match="off by"):
        coppice.verify(model, coppice.apply(model, other), coupling, other)
    changed = copy.deepcopy(pruned)
    with torch.no_grad():
        changed.head.weight[0, 0] += 1
    with pytest.raises(VerificationError, match=r"head\.weight"):
        coppice.verify(model, changed, coupling, plan)


def test_attention_that_the_block_itself_reshapes_is_no_candidate() -> None:
    """A projection that passes on its input would give the code another shape than it asks for."""
    model, inputs = AWKWARD["three_numbers_in_one_view"]()
    found = {c.kind for c in coppice.removable(coppice.couple(coppice.capture(model, inputs)))}
    assert "attention" not in found


def test_what_can_not_go_is_refused_in_a_sentence() -> None:
    _, _, coupling = made(Residual, IMAGE)
    with pytest.raises(CoppiceError, match=r"'blocks\.7' is no module that can go.*blocks\.1"):
        coppice.remove_modules(coupling, ["blocks.7"])
    with pytest.raises(CoppiceError, match="can't both go: one lies in the other"):
        coppice.remove_modules(coupling, ["blocks.1", "blocks.1.conv1"])
    with pytest.raises(CoppiceError, match="no module is named"):
        coppice.remove_modules(coupling, [])
    _, _, branches = made(Branches, IMAGE)
    with pytest.raises(CoppiceError, match="nothing would be left"):
        coppice.remove_modules(branches, ["left", "middle2", "right"])


@pytest.mark.usefixtures("one_thread")
def test_the_state_of_an_optimiser_follows() -> None:
    model, x, coupling = made(Branches, IMAGE)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    plan = coppice.remove_modules(coupling, ["left"])
    pruned = coppice.apply(model, plan)
    after = torch.optim.Adam(pruned.parameters())
    after.load_state_dict(slice_optimizer_state(optimizer, model, pruned, plan))
    assert torch.equal(after.state[pruned.out.weight]["exp_avg"], optimizer.state[model.out.weight]["exp_avg"][:, 4:])
    assert torch.equal(after.state[pruned.head.bias]["exp_avg"], optimizer.state[model.head.bias]["exp_avg"])
    model, x, coupling = made(Merged, (2, 3, 16, 16))  # a merged kernel is a new parameter, and so is its bias
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    plan = coppice.remove_modules(coupling, ["c+d", "a+b"])
    pruned = coppice.apply(model, plan)
    after = torch.optim.Adam(pruned.parameters())
    after.load_state_dict(slice_optimizer_state(optimizer, model, pruned, plan))
    assert pruned.a.weight not in after.state
    assert pruned.d.bias not in after.state
    assert torch.equal(after.state[pruned.e.weight]["exp_avg"], optimizer.state[model.e.weight]["exp_avg"])
    assert torch.equal(after.state[pruned.j.bias]["exp_avg"], optimizer.state[model.j.bias]["exp_avg"])
