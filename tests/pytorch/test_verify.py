"""Verification must refuse what is wrong, and say where. Each test breaks one thing that the others leave right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coppice
import coppice.testing
from coppice import Plan, VerificationError
from coppice.coupling import Coupling
from coppice.planning import make_plan
from coppice.rules import LINES, Rule
from coppice.testing import MismatchError, check_model, random_plan
from known_nets import TRAPS


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Conv2d(8, 12, 3)
        self.fc = nn.Linear(12, 4)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.scale * F.relu(self.body(torch.sigmoid(self.stem(x)))).mean((2, 3)))


def made() -> tuple[nn.Module, Coupling, Plan]:
    """The net and the plan that keeps the even channels."""
    model = Net().eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(2, 3, 8, 8)))
    return model, coupling, make_plan(coupling, {a.id: np.arange(a.width) % 2 == 0 for a in coupling.prunable})


def test_what_is_right_passes() -> None:
    model, coupling, plan = made()
    found = coppice.verify(model, coppice.apply(model, plan), coupling, plan)
    assert found.max_error < 1e-12
    assert found.detour is None
    assert len(found.checked) == 4


def test_a_tampered_weight() -> None:
    model, coupling, plan = made()
    pruned = coppice.apply(model, plan)
    with torch.no_grad():
        pruned.body.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(VerificationError, match=r"body\.weight does not hold the dense model's kept values"):
        coppice.verify(model, pruned, coupling, plan)


def test_a_wrong_slice() -> None:
    """The right number of filters, but other ones."""
    model, coupling, plan = made()
    pruned = coppice.apply(model, plan)
    pruned.stem.weight = nn.Parameter(model.stem.weight[1::2].clone())
    with pytest.raises(VerificationError, match=r"stem\.weight does not hold"):
        coppice.verify(model, pruned, coupling, plan)


def test_a_slice_of_another_size() -> None:
    model, coupling, plan = made()
    pruned = coppice.apply(model, plan)
    pruned.fc.weight = nn.Parameter(model.fc.weight.clone())
    with pytest.raises(VerificationError, match=r"fc\.weight has shape \(4, 12\), the plan says \(4, 6\)"):
        coppice.verify(model, pruned, coupling, plan)


def test_a_plan_that_forgets_a_consumer() -> None:
    """The tensors agree with the plan, but not with each other: named by op, module and axis."""
    model, coupling, plan = made()
    forgetful = Plan(plan.axes, {**plan.tensors, "body.weight": (plan.tensors["body.weight"][0], "8", "3", "3")}, plan.attributes)
    with pytest.raises(VerificationError, match=r"fails at aten\.convolution in body \(axes body\.weight:0\)"):
        coppice.verify(model, coppice.apply(model, forgetful), coupling, forgetful)


def test_a_plan_that_keeps_other_indices_of_one_tensor() -> None:
    """Shapes all agree; only the values show that the consumer reads the wrong channels."""
    model, coupling, plan = made()
    (stem,) = [a for a in plan.axes if a.name == "stem.weight:0"]
    shifted = coppice.planning.PlannedAxis("shifted", 8, tuple(k + 1 for k in stem.keep))
    other = f"a{len(plan.axes)}"
    tensors = {**plan.tensors, "body.weight": (plan.tensors["body.weight"][0], other, "3", "3")}
    wrong = Plan((*plan.axes, shifted), tensors, plan.attributes)
    pruned = coppice.apply(model, wrong)
    right = Plan(plan.axes, plan.tensors, plan.attributes)
    with pytest.raises(VerificationError, match=r"body\.weight does not hold"):
        coppice.verify(model, pruned, coupling, right)


def test_code_that_computes_something_else() -> None:
    """The tensors are right; the pruned model's own code is not: the first op that differs is named."""
    model, coupling, plan = made()
    pruned = coppice.apply(model, plan)
    pruned.stem.padding, pruned.body.dilation = (1, 1), (2, 2)  # the same output size, other pixels
    with pytest.raises(VerificationError, match=r"aten\.convolution in stem gives .* the plan says"):
        coppice.verify(model, pruned, coupling, plan)
    pruned = coppice.apply(model, plan)
    pruned.body.register_forward_hook(lambda module, args, out: out.flip(1))
    with pytest.raises(VerificationError, match=r"off by .* first op that differs is aten\.(relu|mean|mul|addmm)"):
        coppice.verify(model, pruned, coupling, plan)


class TwoAnswers(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y * 2


def test_nan_in_the_last_output_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own max would pass over it."""
    model = TwoAnswers().eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(2, 3, 8, 8)))
    plan = make_plan(coupling, {a.id: np.arange(a.width) % 2 == 0 for a in coupling.prunable})
    errors = iter([0.0, float("nan"), 0.0, 0.0])
    monkeypatch.setattr("coppice.torch.verify.relative_error", lambda a, b: next(errors, 0.0))
    with pytest.raises(VerificationError, match="off by nan"):
        coppice.verify(model, coppice.apply(model, plan), coupling, plan)


def check_some(net: str, *, zeroed: bool = False) -> None:
    for seed in range(8):
        check_model(*TRAPS[net](), seed, zeroed=zeroed)


@pytest.mark.parametrize(
    ("rule", "line", "net"),
    [
        ("pixel_shuffle", "... (~ c) ~ ~ -> ... c ~ ~", "pixel_shuffle_between_convs"),  # the factors the wrong way round
        ("group_norm", "n (g c) ~..., (g c), (g c) -> n (g c) ~..., n g, n g", "ops_that_mix_the_channels"),  # mixing unsaid
        ("batch_norm", "n c ..., c, c, c, d -> n c ...", "batch_norm_bias_through_sigmoid_and_exp"),  # an operand forgotten
    ],
)
def test_a_wrong_rule_is_caught(monkeypatch: pytest.MonkeyPatch, rule: str, line: str, net: str) -> None:
    """Mutations of the rule table: some random plan must fail, in words, and none may pass for right that isn't."""
    monkeypatch.setitem(LINES, rule, Rule(line))
    with pytest.raises((VerificationError, MismatchError)):
        check_some(net)


def test_the_independent_check_does_not_need_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """With verification switched off, the dense model with its removed weights at zero still shows the wrong rule."""
    monkeypatch.setitem(LINES, "pixel_shuffle", Rule("... (~ c) ~ ~ -> ... c ~ ~"))
    model, inputs = TRAPS["pixel_shuffle_between_convs"]()
    right = coppice.couple(coppice.capture(model, inputs))
    assert any(len(a.keep) < a.width for a in random_plan(right, 0).axes)
    monkeypatch.setattr(coppice, "verify", lambda *_: coppice.torch.verify.Verification(0.0, (), 0.0))
    with pytest.raises(MismatchError, match="differs from the dense model"):
        check_some("pixel_shuffle_between_convs", zeroed=True)


def test_a_number_of_the_code_made_into_a_tensor_follows_the_width() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.a(x), self.b(x)
            return self.c(q @ k.transpose(1, 2) / torch.sqrt(torch.tensor(q.shape[-1])))

    model = Scaled().eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(2, 5, 4)))
    assert coupling.prunable
    for seed in range(3):
        plan = random_plan(coupling, seed)
        coppice.verify(model, coppice.apply(model, plan), coupling, plan)


def test_a_standardised_weight_mixes_its_inputs() -> None:
    """Norm-free networks standardise a weight by running it through ``batch_norm``: over the channels that it reads."""

    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            return F.conv2d(x, F.batch_norm(flat, None, None, training=True).reshape_as(self.weight), self.bias)

    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 8, 8)))
    assert [a.width for a in coupling.prunable] == [8, 6]
    for seed in range(3):
        plan = random_plan(coupling, seed)
        coppice.verify(model, coppice.apply(model, plan), coupling, plan)
