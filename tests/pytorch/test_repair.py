"""Refitting: what can be made good is made good to rounding; what can't is never made worse on held-out images."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice.coupling import Coupling
from coppice.evaluate import reestimate_batchnorm
from coppice.planning import Plan, make_plan
from coppice.recovery import recover
from coppice.torch.apply import apply
from coppice.torch.repair import repair


class Redundant(nn.Module):
    """Channels 4 to 7 of the first layer are its channels 0 to 3 again: half of them can go without a loss. Then a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.bn1 = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.two, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.one(torch.relu(self.bn(self.conv(x))))))
        x = torch.relu(self.bn2(self.two(x)) + x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def redundant() -> Redundant:
    torch.manual_seed(0)
    model = Redundant()
    model(torch.randn(64, 3, 8, 8))  # BatchNorm statistics that are not trivial
    for module in (model.bn, model.bn1, model.bn2):
        nn.init.uniform_(module.weight, 0.5, 1.5)
        nn.init.uniform_(module.bias, -0.5, 0.5)
    for tensor in (model.conv.weight, model.bn.weight, model.bn.bias, model.bn.running_mean, model.bn.running_var):
        assert tensor is not None
        tensor.data[4:] = tensor.data[:4]
    return model.eval()


def cut(model: nn.Module, example: Tensor, site: tuple[str, int], gone: list[int]) -> tuple[Coupling, Plan, nn.Module]:
    coupling = coppice.couple(coppice.capture(model, example))
    axis = next(a for a in coupling.prunable if site in a.sites)
    plan = make_plan(coupling, {axis.id: ~np.isin(np.arange(axis.width), gone)})
    return coupling, plan, apply(model, plan).eval()


def error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean() / dense(x).var())


def test_a_redundant_channel_is_made_good_to_rounding() -> None:
    model = redundant()
    batches, fresh = [torch.randn(32, 3, 8, 8) for _ in range(8)], torch.randn(64, 3, 8, 8)
    coupling, plan, pruned = cut(model, batches[0][:1], ("conv.weight", 0), [4, 5, 6, 7])
    bare = error(pruned, model, fresh)
    done = repair(model, pruned, coupling, plan, batches)
    assert bare > 1e-2
    assert error(pruned, model, fresh) < 1e-5 * bare
    assert all(refit.after <= refit.before for refit in done)
    assert {refit.weight for refit in done} == {"conv.weight", "one.weight", "two.weight", "head.weight"}


def test_the_error_of_the_residual_stream_is_corrected() -> None:
    """Channels of the block's inside go; a constant that they gave is then only in the sum's goal, not in any input."""
    model = redundant()
    batches, fresh = [torch.randn(32, 3, 8, 8) for _ in range(8)], torch.randn(64, 3, 8, 8)
    coupling, plan, pruned = cut(model, batches[0][:1], ("conv.weight", 0), [0, 1, 2, 4])
    bare = error(pruned, model, fresh)
    repair(model, pruned, coupling, plan, batches)
    assert error(pruned, model, fresh) < 0.6 * bare


@pytest.mark.parametrize("kind", ["depthwise", "tokens", "conv1d"])
def test_other_layers_are_repaired_too(kind: str) -> None:
    torch.manual_seed(0)
    shape: tuple[int, ...]
    if kind == "depthwise":
        inner: list[nn.Module] = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
        model, shape = nn.Sequential(*inner, nn.Flatten(2)), (3, 6, 6)
    elif kind == "tokens":
        model, shape = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4)), (7, 5)
    else:
        model, shape = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)), (3, 12)
    model.eval()
    batches, fresh = [torch.randn(16, *shape) for _ in range(8)], torch.randn(32, *shape)
    coupling, plan, pruned = cut(model, batches[0][:1], ("0.weight", 0), [1, 2, 5])
    bare = error(pruned, model, fresh)
    repair(model, pruned, coupling, plan, batches)
    assert error(pruned, model, fresh) < 0.8 * bare


def test_recovery_keeps_the_best_and_leaves_what_it_was_given() -> None:
    model = redundant()
    batches = [torch.randn(32, 3, 8, 8) for _ in range(8)]
    coupling, plan, pruned = cut(model, batches[0][:1], ("conv.weight", 0), [4, 5, 6, 7])
    before = copy.deepcopy(pruned.state_dict())

    def reestimate(edited: nn.Module) -> None:
        reestimate_batchnorm(edited, [(b, torch.zeros(len(b), dtype=torch.long)) for b in batches], None)

    best, recovery = recover(model, pruned, coupling, plan, batches, reestimate)
    tried = dict(recovery.tried)
    assert recovery.kept == "layers refitted"
    assert tried[recovery.kept] == min(tried.values())
    assert recovery.refitted >= 1
    assert error(best, model, batches[0]) < 1e-5
    assert all(torch.equal(t, before[name]) for name, t in pruned.state_dict().items())
    _, recovery = recover(model, pruned, coupling, plan, batches, reestimate, refit=False)
    assert {name for name, _ in recovery.tried} == {"as cut", "BatchNorm re-estimated"}


class SequenceFirst(nn.Module):
    """Tokens before samples: with one sample a view and one fused linear op, with several a copy, a product and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.wide, self.narrow, self.head = nn.Linear(6, 6), nn.Linear(6, 16), nn.Linear(16, 6), nn.Linear(6, 4)
        self.unused = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x.transpose(0, 1))
        self.unused(x)
        x = x + self.narrow(torch.relu(self.wide(x)))
        scores: Tensor = self.head(x.mean(0))
        return scores


def test_batches_of_another_size_than_the_example_run_other_ops() -> None:
    torch.manual_seed(0)
    model = SequenceFirst().eval()
    example, batches = torch.randn(1, 5, 6), [torch.randn(16, 5, 6) for _ in range(8)]
    names = [[op.name for op in coppice.capture(model, x).ops] for x in (example, batches[0])]
    assert names[0] != names[1], "this network no longer shows what the test is about"
    coupling = coppice.couple(coppice.capture(model, example))
    pairs = [(batch, torch.zeros(16, dtype=torch.long)) for batch in batches]
    for criterion in ("obs", "wanda"):
        scores = coppice.score(model, coupling, criterion, pairs)
        plan = coppice.plan(coupling, scores, {"macs": 0.6 * coupling.cost().macs}, round_to=1, min_width=1)
        pruned = coppice.apply(model, plan).eval()
        coppice.verify(model, pruned, coupling, plan)
        fresh = torch.randn(64, 5, 6)
        bare = error(pruned, model, fresh)
        assert repair(model, pruned, coupling, plan, batches)
        assert error(pruned, model, fresh) < bare


def test_a_candidate_that_is_not_finite_is_never_kept() -> None:
    model = redundant()
    batches = [torch.randn(32, 3, 8, 8) for _ in range(8)]
    coupling, plan, pruned = cut(model, batches[0][:1], ("conv.weight", 0), [4, 5, 6, 7])
    pruned.get_parameter("head.bias").data.fill_(float("nan"))

    def reestimate(edited: nn.Module) -> None:
        edited.get_parameter("head.bias").data.zero_()

    _, recovery = recover(model, pruned, coupling, plan, batches, reestimate, refit=False)
    assert recovery.kept == "BatchNorm re-estimated"
