"""Scores: each criterion on a network small enough to work out by hand, and what they share."""

import numpy as np
import pytest
import torch
from torch import nn

import coppice
from coppice.coupling import Coupling
from coppice.criteria import CRITERIA, NORMALIZATIONS, Unit, measure
from coppice.errors import CoppiceError
from coppice.saliency import Scores, isomorphic


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
    if CRITERIA[criterion].unit is Unit.AXIS:
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


# --- the other criteria, by hand ------------------------------------------------------------------------------------


def hidden_scores(model: nn.Module, criterion: str, batches: object = None) -> np.ndarray:
    coupling, scores = scored(model, criterion, batches=batches)
    return scores[coupling.prunable[0].id]


def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(6, 3), torch.randint(0, 2, (6,))) for _ in range(3)]


def test_fisher_and_snip_are_products_with_the_gradient() -> None:
    model, (x, y) = small(), images()[0]
    batches = [(x[k : k + 1], y[k : k + 1]) for k in range(6)]
    for criterion, element in (("fisher", lambda p: (p * p.grad).square() / 2), ("snip", lambda p: (p * p.grad).abs())):
        want = np.zeros(4)
        for a, b in batches:
            model.zero_grad()
            nn.functional.cross_entropy(model(a), b).backward()
            want += by_hand(model, [element(p) for p in hidden_parameters(model)]) / 6
        want = want / want.mean() if CRITERIA[criterion].unit is Unit.AXIS else want
        np.testing.assert_allclose(hidden_scores(model, criterion, batches), want, rtol=1e-4)


def test_the_gate_of_an_index_is_the_square_of_the_sum() -> None:
    model = small()
    want = np.zeros(4)
    for x, y in images():
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        want += np.square(by_hand(model, [p * p.grad for p in hidden_parameters(model) if p.grad is not None]))
    np.testing.assert_allclose(hidden_scores(model, "taylor-gate", images()), want, rtol=1e-4)


def test_lamp_divides_by_the_norms_that_are_not_smaller() -> None:
    model = small()
    norms = by_hand(model, [p.square() for p in hidden_parameters(model)])
    want = [n / norms[norms >= n].sum() for n in norms]
    np.testing.assert_allclose(hidden_scores(model, "lamp"), want, rtol=1e-5)
    assert hidden_scores(model, "lamp").max() == pytest.approx(1.0)


def test_fpgm_sums_distances_to_the_other_filters() -> None:
    model = small()
    first, second = model[0].weight.detach(), model[2].weight.detach().T  # type: ignore[operator]
    want = (torch.cdist(first, first).sum(1) + torch.cdist(second, second).sum(1)).numpy()
    np.testing.assert_allclose(hidden_scores(model, "fpgm"), want / want.mean(), rtol=1e-3)


def test_bn_scale_looks_at_gamma_alone_and_at_weights_where_there_is_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    model[1].weight.data = torch.tensor([0.5, -2.0, 0.1, 1.0])
    coupling, scores = scored(model, "bn-scale")
    normed = next(a for a in coupling.prunable if ("1.weight", 0) in a.sites)
    plain = next(a for a in coupling.prunable if ("3.weight", 0) in a.sites)
    np.testing.assert_allclose(scores[normed.id], np.array([0.5, 2.0, 0.1, 1.0]) / 0.9, rtol=1e-5)
    assert len(set(scores[plain.id].tolist())) == 5


def test_synflow_is_the_flow_through_the_magnitudes() -> None:
    model = small()
    first, second = model[0].weight.detach().abs(), model[2].weight.detach().abs()
    inward, outward = first.sum(1) + model[0].bias.detach().abs(), second.sum(0)
    want = (2 * (inward * outward)).numpy()  # once for its row with the bias, once for its column
    np.testing.assert_allclose(hidden_scores(model, "synflow"), want / want.mean(), rtol=1e-5)


def test_activation_statistics_of_what_the_reader_reads() -> None:
    model, batches = small(), images()
    hidden = [torch.relu(model[0](x)).detach() for x, _ in batches]
    weight = model[2].weight.detach().abs().sum(0)
    want = {
        "activation": torch.stack([h.abs().mean(0) for h in hidden]).mean(0),
        "apoz": torch.stack([(h != 0).double().mean(0) for h in hidden]).mean(0),
        "wanda": torch.stack([h.square().mean(0).sqrt() * weight for h in hidden]).mean(0),
    }
    for criterion, value in want.items():
        np.testing.assert_allclose(hidden_scores(model, criterion, batches), (value / value.mean()).numpy(), rtol=1e-4)


def test_independence_is_low_where_the_others_explain_a_channel_and_rank_is_that_of_the_maps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1), nn.Flatten(2)).eval()
    model[0].weight.data[4] = model[0].weight.data[1] + model[0].weight.data[2]
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 6, 6)))
    batches = [(torch.randn(8, 3, 6, 6), torch.zeros(8, dtype=torch.long))]
    (axis,) = coupling.prunable
    independent = coppice.score(model, coupling, "independence", batches)[axis.id]
    assert set(np.argsort(independent)[:3]) == {1, 2, 4} or independent[4] < np.median(independent)
    one = torch.zeros(8, 3, 6, 6)
    one[:, :, 2, 3] = 1.0  # maps of rank one
    model[0].bias.data.zero_()
    np.testing.assert_allclose(coppice.score(model, coupling, "rank", [(one, batches[0][1])])[axis.id], 1.0)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_scores_a_network_with_norms_groups_and_a_shortcut(criterion: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.deep, self.back = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(16, 8, 1)
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.bn(self.stem(x)))
            x = x + self.back(torch.cat([x, self.deep(x)], 1))
            scores: torch.Tensor = self.head(x.mean((2, 3)))
            return scores

    torch.manual_seed(0)
    model = Net().eval()
    nn.init.uniform_(model.bn.weight, 0.5, 1.5)
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 8, 8)))
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))) for _ in range(4)]
    scores = coppice.score(model, coupling, criterion, batches)
    for axis in coupling.prunable:
        assert scores[axis.id].shape == (axis.width,)
        assert np.isfinite(scores[axis.id]).all()
        assert scores[axis.id].std() > 0 or criterion in ("rank", "apoz")
    plan = coppice.plan(coupling, scores, {"macs": 0.6 * coupling.cost().macs}, round_to=1, min_width=1)
    coppice.verify(model, coppice.apply(model, plan), coupling, plan)


# --- aggregation, normalisation, initialisation ---------------------------------------------------------------------


def test_aggregation_over_the_tensors_that_an_index_touches() -> None:
    model = small()
    first, bias, second = (p.detach().abs() for p in hidden_parameters(model))
    sites = torch.stack([first.sum(1), bias, second.sum(0)])
    means = torch.stack([first.mean(1), bias, second.mean(0)])
    for aggregation, want in (("sum", sites.sum(0)), ("mean", means.mean(0)), ("max", sites.max(0).values)):
        coupling, scores = scored(model, "l1", aggregation=aggregation, normalization="none")
        np.testing.assert_allclose(scores[coupling.prunable[0].id], want.numpy(), rtol=1e-6)


def test_a_mean_is_over_the_elements_below_a_product_too() -> None:
    """A flattened map: an index of the channels has four columns of the linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 1, bias=False), nn.Flatten(), nn.Linear(12, 2, bias=False))
    coupling = coppice.couple(coppice.capture(model, torch.ones(1, 1, 2, 2)))
    (axis,) = coupling.prunable
    conv, linear = model[0].weight.detach().abs().flatten(1), model[2].weight.detach().abs().view(2, 3, 4)  # type: ignore[operator]
    scores = coppice.score(model, coupling, "l1", aggregation="mean", normalization="none")
    np.testing.assert_allclose(scores[axis.id], ((conv.mean(1) + linear.mean((0, 2))) / 2).numpy(), rtol=1e-6)


class Blocks(nn.Module):
    """Two blocks of one form on a stream, and a layer of another form at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)])
        self.down = nn.ModuleList([nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)])
        self.wide, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        scores: torch.Tensor = self.head(torch.relu(self.wide(x)).mean((2, 3)))
        return scores


def test_axes_that_lie_alike_compete_as_they_are() -> None:
    model = Blocks()
    coupling = coppice.couple(coppice.capture(model, torch.randn(1, 3, 6, 6)))
    names = sorted(sorted(axis.name for axis in group) for group in isomorphic(coupling))
    assert names == [["up.0.weight:0", "up.1.weight:0"], ["wide.weight:0"]]
    raw = coppice.score(model, coupling, "l1", normalization="none")
    alike = coppice.score(model, coupling, "l1", normalization="isomorphic")
    alone = coppice.score(model, coupling, "l1", normalization="axis")
    first, second, wide = (coupling.axis(name).id for name in ("up.0.weight:0", "up.1.weight:0", "wide.weight:0"))
    both = np.concatenate([raw[first], raw[second]]).mean()
    np.testing.assert_allclose(alike[first], raw[first] / both)
    np.testing.assert_allclose(alike[second], raw[second] / both)
    np.testing.assert_allclose(alike[wide], alone[wide])
    assert alone[first].mean() == pytest.approx(1.0)


def test_what_is_in_units_of_loss_stays_so_unless_it_is_divided() -> None:
    model, batches = small(), images()
    additive = {n: scored(model, "taylor", batches=batches, normalization=n)[1].additive for n in NORMALIZATIONS}
    assert additive == {"own": True, "axis": False, "isomorphic": False, "none": True}


@pytest.mark.parametrize(
    ("criterion", "options", "says"),
    [
        ("l1", {"aggregation": "median"}, "unknown aggregation 'median'"),
        ("l1", {"normalization": "layer"}, "unknown normalization 'layer'"),
        ("random", {"aggregation": "mean"}, "no elements to aggregate"),
    ],
)
def test_options_that_make_no_sense_are_refused(criterion: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(CoppiceError, match=says):
        scored(small(), criterion, **options)


def test_measured_losses_that_are_not_finite_are_named() -> None:
    model = small()
    coupling, scores = scored(model, "l1")
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    with pytest.raises(CoppiceError, match=r"measured losses of 0\.weight:0 are not finite"):
        measure(model, coupling, scores, images())


def test_at_initialisation_the_batch_gives_the_statistics_and_keeps_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x, y = images()[0]
    model.train()
    nn.functional.cross_entropy(model(x), y).backward()
    model.eval()
    want = {name: (p * p.grad).abs().detach() for name, p in model.named_parameters() if p.grad is not None}
    model[1].reset_running_stats()  # type: ignore[operator]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    coupling, scores = scored(model, "snip", batches=[(x, y)], normalization="none")
    found = want["0.weight"].sum(1) + want["0.bias"] + want["1.weight"] + want["1.bias"] + want["3.weight"].sum(0)
    np.testing.assert_allclose(scores[coupling.prunable[0].id], found.numpy(), rtol=1e-4, atol=1e-7)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model[1].running_mean.fill_(0.3)  # type: ignore[union-attr, operator]
    trained = scored(model, "snip", batches=[(x, y)], normalization="none")[1]
    assert not np.allclose(trained[coupling.prunable[0].id], scores[coupling.prunable[0].id])


def test_no_mean_stops_the_flow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    before = hidden_scores(model, "synflow")
    model[1].running_mean.fill_(100.0)  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(hidden_scores(model, "synflow"), before)
    assert (before > 0).all()
