"""Cuts in the midst of a training, and weights put back to earlier values."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import coppice
from coppice.cli import run
from coppice.data import ImageData, load_data
from coppice.demo import digits_net
from coppice.errors import CoppiceError
from coppice.evaluate import evaluate
from coppice.masks import MaskRecipe
from coppice.planning import Plan, compose
from coppice.recipe import Recipe
from coppice.run import read_json
from coppice.torch.regularise import regulariser
from coppice.train import EpochResult, fine_tune, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(epochs=3, lr=0.1, batch_size=64, precision="fp32")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data = load_data("digits")
    return replace(data, train=data.train.subset(range(640)), val=data.val.subset(range(100)))


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return digits_net()


def macs(model: nn.Module) -> int:
    return coppice.couple(coppice.capture(model.eval(), torch.zeros(1, 1, 8, 8))).cost().macs


@pytest.mark.parametrize("at", [(1 / 3,), (1 / 3, 2 / 3)])
def test_a_training_goes_on_with_the_smaller_model(at: tuple[float, ...], digits: ImageData) -> None:
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    found = coppice.train_and_prune(model, digits, RECIPE, "macs=0.5", at=at)
    assert [result.epoch for result in found.history] == [1, 2, 3]
    assert macs(found.model) <= 0.5 * macs(model)
    assert evaluate(found.model, digits.test, digits.preprocess).top1 > 40
    assert sum("relative error" in line for line in found.checks) == 2 * len(at)
    assert [t.shape for t in coppice.apply(model, found.plan).state_dict().values()] == [t.shape for t in found.model.state_dict().values()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_without_a_cut_two_parts_are_one_training(digits: ImageData) -> None:
    whole, parts = fresh(), fresh()
    expected = fine_tune(whole, digits, RECIPE)
    optimizer = make_optimizer(parts, RECIPE)
    found = fine_tune(parts, digits, RECIPE, span=(0, 1), optimizer=optimizer) + fine_tune(
        parts, digits, RECIPE, span=(1, 3), optimizer=optimizer
    )
    assert [replace(r, seconds=0.0) for r in found] == [replace(r, seconds=0.0) for r in expected]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"target": "latency=0.5@onnxruntime"}, "MACs, parameters or bytes"),
        ({"target": "macs=0.5", "at": (0.01,)}, "an epoch before and after"),
        ({"target": "macs=0.5", "at": (0.99,)}, "an epoch before and after"),
        ({"target": "macs=0.5", "at": (0.6, 0.6)}, "an epoch before and after"),
        ({"target": "macs=0.5", "at": ()}, "an epoch before and after"),
    ],
)
def test_what_can_not_be(given: dict[str, object], says: str, digits: ImageData) -> None:
    with pytest.raises(CoppiceError, match=says):
        coppice.train_and_prune(fresh(), digits, RECIPE, **given)  # type: ignore[arg-type]


def test_a_lottery_ticket_has_the_earlier_values_of_what_stays(digits: ImageData) -> None:
    model = fresh()
    early = copy.deepcopy(model.state_dict())
    fine_tune(model, digits, replace(RECIPE, epochs=1))
    coupling = coppice.couple(coppice.capture(model.eval(), torch.zeros(1, 1, 8, 8)))
    first = coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": 0.6 * coupling.cost().macs})
    smaller = coppice.apply(model, first)
    masked, step = coppice.mask(smaller, coppice.couple(coppice.capture(smaller, torch.zeros(1, 1, 8, 8))), MaskRecipe(0.5))
    plan = compose(first, step)
    ticket = coppice.rewind(masked, plan, model, early)
    want = coppice.apply(fresh(), plan)
    assert all(torch.equal(a, b) for a, b in zip(ticket.state_dict().values(), want.state_dict().values(), strict=True))
    with pytest.raises(CoppiceError, match="not those of the dense model"):
        coppice.rewind(masked, plan, model, smaller.state_dict())
    with pytest.raises(CoppiceError, match="not what made"):
        coppice.rewind(masked, Plan((), {}, {}), model, early)


def test_soft_pruning_lets_what_it_took_grow_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))
    nn.init.constant_(model[1].bias, 0.5)  # a ReLU passes no gradient at zero
    coupling = coppice.couple(coppice.capture(model, torch.zeros(2, 1, 8, 8)))
    reg = regulariser(model, coupling, "soft", steps=20, target={"macs": 0.6 * coupling.cost().macs}, min_width=4, round_to=4)
    readers, scale = model[3].weight.detach().clone(), model[1].weight.detach().clone()
    reg.step()
    gone = (model[0].weight.detach().flatten(1) == 0).all(1)
    assert 0 < int(gone.sum()) < 16
    assert torch.equal(model[1].weight, scale)
    assert bool((model[3].weight[:, gone] == readers[:, gone])[(model[3].weight != 0).flatten(1).any(1)].all())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3).backward()
    optimizer.step()
    assert bool(model[0].weight.detach()[gone].flatten(1).any(1).all())


def test_what_grows_back_before_a_norm_is_no_larger_than_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))
    nn.init.constant_(model[1].bias, 0.5)
    coupling = coppice.couple(coppice.capture(model.eval(), torch.zeros(2, 1, 8, 8)))
    reg = regulariser(model, coupling, "soft", steps=40, target={"macs": 0.6 * coupling.cost().macs}, min_width=4, round_to=4)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9)
    began, largest = model[0].weight.detach().flatten(1).norm(dim=1), 0.0
    x, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 3
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        largest = max(largest, float((model[0].weight.detach().flatten(1).norm(dim=1) / began).max()))
        reg.step()
        assert bool((model[0].weight.detach().flatten(1).norm(dim=1) <= began * 1.0001).all())
    assert largest > 2  # there was something to hold down


class InterruptError(Exception):
    pass


def test_a_training_with_a_cut_goes_on_where_it_was_stopped(digits: ImageData, tmp_path: Path) -> None:
    expected = coppice.train_and_prune(fresh(), digits, RECIPE, "macs=0.5")

    def stop(result: EpochResult) -> None:
        if result.epoch == 2:
            raise InterruptError

    with pytest.raises(InterruptError):
        coppice.train_and_prune(fresh(), digits, RECIPE, "macs=0.5", checkpoint=tmp_path / "c.safetensors", on_epoch=stop)
    epochs: list[int] = []
    found = coppice.train_and_prune(
        fresh(), digits, RECIPE, "macs=0.5", checkpoint=tmp_path / "c.safetensors", on_epoch=lambda result: epochs.append(result.epoch)
    )
    assert epochs == [3]
    assert all(torch.equal(a, b) for a, b in zip(found.model.state_dict().values(), expected.model.state_dict().values(), strict=True))


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "prune", "--model", f"{Path(coppice.__file__).parent / 'demo.py'}:digits_net", "--data", "digits", "--target", "macs=0.5",
        "--cut-after", "0.5", "--epochs", "2", "--lr", "0.1", "--criterion", "l2", "--optimizer", "sgd", "--threads", "1",
        "--precision", "fp32", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert run(arguments) == 0
    assert "cuts after 50% of 2 epochs" in capsys.readouterr().err
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics["pruned"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    assert metrics["pruned"]["top1"] > metrics["dense"]["top1"] + 10
    assert any("cut after epoch 1" in line for line in metrics["verification"]["checks"])
    assert metrics["history"][-1]["optimizer"] == "SGD at 0.1"
    for extra, says in (
        (["--cut-after", "1.5"], "between 0 and 1"),
        (["--epochs", "1"], "before and after"),
        (["--steps", "2"], "--steps"),
    ):
        assert run([*arguments[:-1], str(tmp_path / "other"), *extra]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
