"""Scores: each criterion on a network small enough to work out by hand, and what they share."""

import numpy as np
import pytest
import torch
from torch import nn

import coppice
from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.saliency import CRITERIA, Scores


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def scored(model: nn.Module, criterion: str, **given: object) -> tuple[Coupling, Scores]:
    coupling = coppice.couple(coppice.capture(model, torch.ones(1, 3)))
    return coupling, coppice.score(model, coupling, criterion, **given)  # type: ignore[arg-type]


def by_hand(model: nn.Sequential, element: list[torch.Tensor]) -> np.ndarray:
    """The hidden unit's score: its row of the first weight, its bias, its column of the second weight."""
    first, bias, second = element
    return (first.sum(1) + bias + second.sum(0)).detach().numpy()


def hidden_parameters(model: nn.Sequential) -> list[nn.Parameter]:
    return [model[0].weight, model[0].bias, model[2].weight]  # type: ignore[list-item]


@pytest.mark.parametrize(("criterion", "element"), [("l1", torch.abs), ("l2", torch.square)])
def test_magnitudes_sum_over_all_that_an_index_touches(criterion: str, element: object) -> None:
    model = small()
    coupling, scores = scored(model, criterion)
    want = by_hand(model, [element(p) for p in hidden_parameters(model)])  # type: ignore[operator]
    np.testing.assert_allclose(scores[coupling.prunable[0].id], want / want.mean(), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["gradient", "taylor"])
def test_gradients_are_averaged_over_batches(criterion: str) -> None:
    model = small()
    batches = [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])), (torch.randn(5, 3), torch.tensor([1, 1, 0, 0, 1]))]
    coupling, scores = scored(model, criterion, batches=batches)
    want = np.zeros(4)
    for x, y in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        parameters = hidden_parameters(model)
        elements = [p.grad.abs() if criterion == "gradient" else (p * p.grad).square() for p in parameters if p.grad is not None]
        want += by_hand(model, elements) / len(batches)
    if CRITERIA[criterion].per_axis:
        want /= want.mean()
    np.testing.assert_allclose(scores[coupling.prunable[0].id], want, rtol=1e-4)


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = small().train()
    model[0].weight.requires_grad_(False)
    scored(model, "taylor", batches=[(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))])
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_random_depends_on_the_seed_alone() -> None:
    (coupling, one), (_, same), (_, other) = (scored(small(), "random", seed=seed) for seed in (1, 1, 2))
    axis = coupling.prunable[0].id
    assert np.array_equal(one[axis], same[axis])
    assert not np.array_equal(one[axis], other[axis])


@pytest.mark.parametrize(
    ("criterion", "given", "says"),
    [
        ("magnitude", {}, "unknown criterion 'magnitude'"),
        ("taylor", {}, "needs calibration batches"),
        ("taylor", {"batches": []}, "no calibration batches"),
        ("gradient", {"batches": [(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))]}, "the loss on calibration batch 0 is nan"),
    ],
)
def test_what_is_missing_is_said(criterion: str, given: dict[str, object], says: str) -> None:
    with pytest.raises(CoppiceError, match=says):
        scored(small(), criterion, **given)


def test_weights_that_are_not_finite_are_named() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight[0, 0] = torch.inf
    with pytest.raises(CoppiceError, match=r"l1 scores of 0\.weight:0 are not finite"):
        scored(model, "l1")
