"""Regularised training: what has to go is shrunk, on the axes of the analysis, and little is lost when it goes."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import coppice
from coppice.cli import run
from coppice.coupling import Coupling, keep_mask
from coppice.data import ImageData, load_data
from coppice.demo import digits_net
from coppice.errors import CoppiceError
from coppice.recipe import Recipe
from coppice.run import read_json
from coppice.saliency import Scores, per_index
from coppice.seeding import seeded
from coppice.torch.regularise import NEAR_ZERO, Regulariser, regulariser
from coppice.train import fine_tune, steps_per_epoch

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(epochs=3, lr=0.05, batch_size=64, precision="fp32")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits")


@pytest.fixture(scope="module")
def trained(digits: ImageData) -> tuple[nn.Module, Coupling]:
    with seeded(0, "test"):
        model = digits_net()
    fine_tune(model, digits, replace(RECIPE, epochs=4, lr=0.1))
    return model, coppice.couple(coppice.capture(model.eval(), torch.zeros(1, 1, 8, 8)))


class Heads(nn.Module):
    """Axes below sums and products: two branches that are concatenated, flattened with their places, and read as heads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(1, 10, 1)
        self.fc, self.out = nn.Linear(16 * 4, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1).relu().flatten(1)
        out: torch.Tensor = self.out(self.fc(x).relu())
        return out


def test_groups_are_everything_an_index_touches() -> None:
    torch.manual_seed(0)
    model = Heads()
    coupling = coppice.couple(coppice.capture(model, torch.zeros(2, 1, 2, 2)))
    reg = regulariser(model, coupling, steps=1, strength=1.0)
    squares = {name: p.detach().double().square().numpy() for name, p in model.named_parameters()}
    want = per_index(coupling, squares)
    count = per_index(coupling, {name: np.ones(tuple(p.shape)) for name, p in model.named_parameters()})
    scores = reg.scores()
    for axis in coupling.prunable:
        rms = np.sqrt(want[axis.id] / count[axis.id])
        assert np.allclose(scores[axis.id], rms / rms.mean())


def test_an_index_that_is_taken_down_is_zero_wherever_it_lies() -> None:
    torch.manual_seed(0)
    model = Heads()
    coupling = coppice.couple(coppice.capture(model, torch.zeros(2, 1, 2, 2)))
    with torch.no_grad():
        model.b.weight[3] = 1e-6
        model.b.bias[3] = 1e-6
        model.fc.weight.view(24, 16, 4)[:, 9] = 1e-6
    others = model.fc.weight.detach().view(24, 16, 4)[:, :6].clone()
    regulariser(model, coupling, steps=1, strength=0.05, target={"macs": 0.95 * coupling.cost().macs}, round_to=1, min_width=1).step()
    assert not model.b.weight[3].any()
    assert not model.b.bias[3].any()
    assert not model.fc.weight.view(24, 16, 4)[:, 9].any()
    assert bool(others.any())


def closeness(model: nn.Module, coupling: Coupling, scores: Scores, digits: ImageData) -> float:
    """Validation top-1 right after a cut to half the MACs."""
    from coppice.evaluate import evaluate

    plan = coppice.plan(coupling, scores, {"macs": 0.5 * coupling.cost().macs})
    return evaluate(coppice.apply(model, plan), digits.val, digits.preprocess).top1


@pytest.mark.parametrize("kind", ["group-lasso", "l1", "l2", "growing"])
def test_little_is_lost_when_it_goes(kind: str, trained: tuple[nn.Module, Coupling], digits: ImageData) -> None:
    dense, coupling = trained
    bare = closeness(dense, coupling, coppice.score(dense, coupling, "l2"), digits)
    model = copy.deepcopy(dense)
    reg = regulariser(model, coupling, kind, steps=3 * steps_per_epoch(digits, RECIPE), target={"macs": 0.5 * coupling.cost().macs})
    fine_tune(model, digits, RECIPE, along=reg)
    assert closeness(model, coupling, reg.scores(), digits) > bare + 20
    if kind in ("group-lasso", "growing"):
        plan = reg.plan()
        assert "of the indices are near zero" in reg.said()
        smaller = coppice.apply(model, plan)
        coppice.verify(model, smaller, coupling, plan)
        assert coppice.couple(coppice.capture(smaller, torch.zeros(1, 1, 8, 8))).cost().macs < 0.7 * coupling.cost().macs


def test_slimming_shrinks_scales_and_nothing_else(trained: tuple[nn.Module, Coupling]) -> None:
    dense, coupling = trained
    model = copy.deepcopy(dense)
    reg = regulariser(model, coupling, "slimming", steps=1, strength=0.1)
    reg.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, dict(dense.named_parameters())[name])}
    scales = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert changed == scales


def test_a_numeric_strength_is_hardest_on_the_smallest(trained: tuple[nn.Module, Coupling]) -> None:
    dense, coupling = trained
    model = copy.deepcopy(dense)
    reg = regulariser(model, coupling, steps=10, strength=0.3)
    before = reg.scores()
    for _ in range(10):
        reg.step()
    after = reg.scores()
    for axis in coupling.prunable:
        lost = before[axis.id] - after[axis.id]
        assert (lost >= 0).all()
        assert lost[before[axis.id].argmin()] > 2 * lost[before[axis.id].argmax()]


def test_the_threshold_says_what_goes_and_the_grid_how_much(trained: tuple[nn.Module, Coupling]) -> None:
    dense, coupling = trained
    model = copy.deepcopy(dense)
    axis = coupling.axis("block1.0.weight:0")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            for dim in [d for n, d in axis.sites if n == name]:
                value = next(v for v in coupling.graph.weights() if name in v.names)
                keep = keep_mask(coupling.dims[value.id][dim], {axis.atom: np.arange(axis.width) >= 11})
                tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(~keep)), 0)
    reg = Regulariser(model, coupling, "group-lasso", 1.0, 1)
    kept = {a.name: a.keep for a in reg.plan(round_to=8).axes}
    assert len(kept[axis.name]) == 24
    assert set(range(11, 32)) <= set(kept[axis.name])
    assert len({a.name: a.keep for a in reg.plan(round_to=1).axes}[axis.name]) == 21
    assert NEAR_ZERO < 1


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("kind", ["group-lasso", "growing"])
def test_it_resumes_bit_for_bit(kind: str, trained: tuple[nn.Module, Coupling], digits: ImageData, tmp_path: Path) -> None:
    dense, coupling = trained
    small = replace(digits, train=digits.train.subset(range(256)), val=digits.val.subset(range(32)))

    def start() -> tuple[nn.Module, Regulariser]:
        model = copy.deepcopy(dense)
        steps = 3 * steps_per_epoch(small, RECIPE)
        return model, regulariser(model, coupling, kind, steps=steps, target={"macs": 0.5 * coupling.cost().macs})

    def stop(result: object) -> None:
        raise InterruptError

    undisturbed, reg = start()
    fine_tune(undisturbed, small, RECIPE, along=reg)
    model, again = start()
    with pytest.raises(InterruptError):
        fine_tune(model, small, RECIPE, along=again, checkpoint=tmp_path / "c", on_epoch=stop)
    model, again = start()
    fine_tune(model, small, RECIPE, along=again, checkpoint=tmp_path / "c")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), undisturbed.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"kind": "ridge", "steps": 1}, "choose one of"),
        ({"steps": 0}, "1 or more"),
        ({"steps": 1}, "give it a target"),
        ({"steps": 1, "strength": -1.0}, "the strength is -1.0"),
        ({"steps": 1, "strength": "strong"}, "write auto"),
        ({"steps": 1, "strength": float("nan")}, "write auto"),
        ({"kind": "growing", "steps": 1, "strength": 1.0}, "give it a target"),
    ],
)
def test_what_can_not_be(given: dict[str, object], says: str, trained: tuple[nn.Module, Coupling]) -> None:
    with pytest.raises(CoppiceError, match=says):
        regulariser(*trained, **given)  # type: ignore[arg-type]


def test_no_batch_norm_to_slim() -> None:
    model = Heads()
    with pytest.raises(CoppiceError, match="no BatchNorm"):
        regulariser(model, coppice.couple(coppice.capture(model, torch.zeros(2, 1, 2, 2))), "slimming", steps=1, strength=1.0)


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "prune", "--model", f"{Path(coppice.__file__).parent / 'demo.py'}:digits_net", "--data", "digits", "--target", "macs=0.6",
        "--regularise", "group-lasso", "--epochs", "2", "--criterion", "l1", "--allocation", "global", "--no-repair", "--rounds", "1",
        "--calibration", "64", "--threads", "1", "--precision", "fp32", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert run(arguments) == 0
    said = capsys.readouterr().err
    assert "group-lasso of strength" in said
    assert "of the indices are near zero" in said
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["regularised"]["kind"] == "group-lasso"
    assert [step["epochs"] for step in metrics["history"]] == [0, 1, 0, 1]
    assert [bool(step["optimizer"]) for step in metrics["history"]] == [False, True, False, True]
    for extra, says in (
        (["--strength", "-1"], "--strength -1"),
        (["--epochs", "0"], "needs --epochs"),
        (["--regularise", "x"], "choose one"),
    ):
        assert run([*arguments[:-1], str(tmp_path / "other"), *extra]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
