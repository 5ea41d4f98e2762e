"""Apply: an edited copy of the user's own class, and the dense model untouched."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice import CoppiceError, Plan
from coppice.planning import PlannedAxis, make_plan
from coppice.testing import random_plan
from coppice.torch.apply import build, slice_optimizer_state


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        self.note = {"anything": [1, 2]}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def small() -> tuple[nn.Module, Plan]:
    """The model and the plan that keeps channels 1, 4 and 6."""
    model = Small().eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(2, 3, 6, 6)))
    (axis,) = coupling.prunable
    mask = np.zeros(8, bool)
    mask[[1, 4, 6]] = True
    return model, make_plan(coupling, {axis.id: mask})


def test_kept_values_attributes_and_class() -> None:
    model, plan = small()
    model.conv.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    pruned = coppice.apply(model, plan)
    assert type(pruned) is Small
    assert torch.equal(pruned.conv.weight, model.conv.weight[[1, 4, 6]])
    assert torch.equal(pruned.bn.running_var, model.bn.running_var[[1, 4, 6]])
    assert torch.equal(pruned.fc.weight, model.fc.weight[:, [1, 4, 6]])
    assert (pruned.conv.out_channels, pruned.bn.num_features, pruned.fc.in_features, pruned.fc.out_features) == (3, 3, 3, 5)
    assert not pruned.conv.weight.requires_grad
    assert pruned.fc.weight.requires_grad
    assert pruned.note == model.note
    assert pruned.note is not model.note
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {p.data_ptr() for p in pruned.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    model, plan = small()
    assert {p.dtype for p in coppice.apply(model.to(dtype), plan).parameters()} == {dtype}


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2))
    model[3].weight = model[1].weight
    coupling = coppice.couple(coppice.capture(model, torch.randn(3, 4)))
    pruned = coppice.apply(model, random_plan(coupling, 1))
    assert pruned[3].weight is pruned[1].weight


def test_a_plan_for_another_model() -> None:
    _, plan = small()
    with pytest.raises(CoppiceError, match=r"the plan names conv\.weight, which this model does not have"):
        coppice.apply(nn.Linear(3, 2), plan)
    wider = Small()
    wider.conv, wider.bn, wider.fc = nn.Conv2d(3, 9, 3, bias=False), nn.BatchNorm2d(9), nn.Linear(9, 5)
    with pytest.raises(CoppiceError, match=r"made for conv\.weight of shape \(8, 3, 3, 3\), this model's is \(9, 3, 3, 3\)"):
        coppice.apply(wider, plan)


def test_build_is_bit_identical_and_says_what_does_not_fit() -> None:
    model, plan = small()
    pruned = coppice.apply(model, plan)
    again = build(Small(), Plan.from_json(plan.to_json()), pruned.state_dict()).eval()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(again(x), pruned(x))
    state = dict(pruned.state_dict())
    with pytest.raises(CoppiceError, match=r"fc\.weight has shape \(5, 8\), expected \(5, 3\)"):
        build(Small(), plan, {**state, "fc.weight": model.fc.weight})
    with pytest.raises(CoppiceError, match="extra is not a name of this model"):
        build(Small(), plan, {**state, "extra": torch.ones(1)})
    del state["bn.bias"]
    with pytest.raises(CoppiceError, match=r"bn\.bias is missing"):
        build(Small(), plan, state)


def test_a_plan_of_unknown_expression() -> None:
    model, plan = small()
    broken = Plan(plan.axes, {**plan.tensors, "conv.weight": ("a0 +", "3", "3", "3")}, plan.attributes)
    with pytest.raises(CoppiceError, match="can't be read"):
        coppice.apply(model, broken)
    with pytest.raises(CoppiceError, match="not increasing within"):
        Plan.from_json(Plan((PlannedAxis("conv.weight:0", 8, (3, 3)),), {}, {}).to_json())


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1)])
def test_optimiser_state_goes_along(make: object) -> None:
    model, plan = small()
    optimiser = make(model.parameters())  # type: ignore[operator]
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    optimiser.step()
    pruned = coppice.apply(model, plan)
    new = make(pruned.parameters())  # type: ignore[operator]
    new.load_state_dict(slice_optimizer_state(optimiser, model, pruned, plan))
    for old_p, new_p, rows in ((model.conv.weight, pruned.conv.weight, [1, 4, 6]), (model.fc.bias, pruned.fc.bias, range(5))):
        for key, value in optimiser.state[old_p].items():
            wanted = value[list(rows)] if isinstance(value, Tensor) and value.dim() else value
            assert torch.equal(torch.as_tensor(new.state[new_p][key]), torch.as_tensor(wanted))
    pruned(torch.randn(2, 3, 6, 6)).square().sum().backward()
    new.step()
