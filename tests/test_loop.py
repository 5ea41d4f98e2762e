"""The whole loop in Python: on a module, loaders and a training function of the user's own, with several cuts, and by bisection."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import coppice
from coppice.cli import run as command
from coppice.config import RunConfig, load_config
from coppice.cost import Cost
from coppice.criteria import TRIED
from coppice.data import ImageData, load_data
from coppice.demo import DigitsNet, demo_config, train_dense
from coppice.errors import CoppiceError
from coppice.models import load_model
from coppice.preprocess import Preprocess
from coppice.progress import Silent
from coppice.recipe import Recipe
from coppice.stages import same_bits
from coppice.targets import interpolate

QUICK = {"recipe": Recipe(epochs=1, lr=0.02, batch_size=64, precision="fp32"), "threads": 1}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A dense network on the digits, trained once, and the settings to prune it."""
    config = demo_config(tmp_path_factory.mktemp("dense"))
    train_dense(replace(config, recipe=replace(config.recipe, epochs=4)), Silent())
    return replace(config, recipe=QUICK["recipe"])


@pytest.fixture(scope="module")
def model(config: RunConfig) -> nn.Module:
    return load_model(config.model, Path(config.weights))


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits", preprocess=Preprocess(mean=(0.3,), std=(0.38,)), val_fraction=0.2)


class Loader:
    """A user's own loader: batches that are model inputs already."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.batches = list(zip(images.split(64), labels.split(64), strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@pytest.fixture(scope="module")
def loaders(digits: ImageData) -> tuple[Loader, Loader, Loader]:
    def loader(part: object) -> Loader:
        pairs = [part[k] for k in range(len(part))]  # type: ignore[index, arg-type]
        images = digits.preprocess.normalise(torch.stack([image for image, _ in pairs]))
        return Loader(images, torch.tensor([label for _, label in pairs]))

    return loader(digits.train), loader(digits.val), loader(digits.test)


def test_a_module_and_loaders_and_a_training_function_of_my_own(
    model: nn.Module, loaders: tuple[Loader, Loader, Loader], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: list[int] = []

    def train(pruned: nn.Module, epochs: int) -> None:
        calls.append(epochs)
        optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01, momentum=0.9)
        pruned.train()
        for x, y in list(loaders[0]) * epochs:
            optimizer.zero_grad()
            nn.functional.cross_entropy(pruned(x), y).backward()
            optimizer.step()
        pruned.eval()

    result = coppice.prune(model, loaders, "macs=0.5", max_drop=60.0, out=tmp_path / "run", train=train, rounds=1, **QUICK)
    assert calls == [1]
    assert type(result.model) is type(model)
    assert result.met, result.statement
    assert result.metrics["pruned"]["macs"] <= 0.5 * result.metrics["dense"]["macs"]
    assert same_bits(before, model.state_dict()), "the user's model was touched"
    x = next(iter(loaders[1]))[0]
    with torch.no_grad():
        assert torch.equal(coppice.load(tmp_path / "run", model=DigitsNet())(x), result.model(x))
    with pytest.raises(CoppiceError, match="model="):
        coppice.load(tmp_path / "run")


def test_loaders_without_a_training_function_use_the_recipe(model: nn.Module, loaders: tuple[Loader, Loader, Loader]) -> None:
    result = coppice.prune(model, loaders, {"macs": 0.3}, criterion="random", repair=False, **QUICK)
    assert result.path is None
    tuned = result.metrics["history"][-1]
    assert tuned["epochs"] == 1
    assert tuned["val_top1"] > result.metrics["history"][1]["val_top1"], "fine-tuning did not help"
    assert [epoch["epoch"] for epoch in tuned["training"]] == list(range(1, tuned["epochs"] + 1))
    assert tuned["training"][-1]["val_top1"] == tuned["val_top1"]
    assert result.metrics["history"][1]["training"] == []


def test_several_cuts_are_one_plan(model: nn.Module, digits: ImageData) -> None:
    result = coppice.prune(model, digits, "macs=0.3", steps=3, recipe=Recipe(epochs=0), threads=1)
    macs = [step["macs"] / result.metrics["dense"]["macs"] for step in result.metrics["history"]]
    assert macs == sorted(macs, reverse=True)
    assert len(macs) == 4
    assert macs[1] > 0.5 > macs[2] > macs[3]
    assert macs[3] <= 0.3
    assert any(check.startswith("all cuts as one") for check in result.metrics["verification"]["checks"])
    smaller = coppice.apply(model, result.plan)
    assert {n: t.shape for n, t in smaller.state_dict().items()} == {n: t.shape for n, t in result.model.state_dict().items()}


def test_a_floor_alone_finds_the_smallest_model_that_holds_it(model: nn.Module, digits: ImageData) -> None:
    result = coppice.prune(model, digits, max_drop=3.0, trials=3, **QUICK)
    history = result.metrics["history"]
    assert sum(step["stage"].startswith("trial") and "cut" in step["stage"] for step in history) == 3
    assert result.met, result.statement
    assert result.metrics["drop"]["val"] <= 3.0
    floor = history[0]["val_top1"] - 3.0
    trials = [step for step in history if step["stage"].startswith("trial") and "tuned" in step["stage"]]
    held = [step["macs"] for step in trials if step["val_top1"] >= floor]
    assert result.metrics["pruned"]["macs"] == min(held)


def test_a_floor_that_can_not_be_held_is_said_plainly(model: nn.Module, digits: ImageData, tmp_path: Path) -> None:
    result = coppice.prune(model, digits, "macs=0.1", max_drop=0.0, recipe=Recipe(epochs=0), threads=1, out=tmp_path / "run")
    assert not result.met
    assert "within the target" in result.statement
    assert "over the limit of 0" in result.statement
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["met"] is False
    assert "target not met" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    coppice.load(tmp_path / "run", model=DigitsNet())


def test_the_floor_is_given_another_round_of_fine_tuning(model: nn.Module, digits: ImageData) -> None:
    result = coppice.prune(model, digits, "macs=0.1", max_drop=0.0, rounds=2, **QUICK)
    assert [step["stage"] for step in result.metrics["history"]] == ["dense", "cut 1", "tuned 1", "tuned 1, round 2"]
    assert result.metrics["pruned"]["val"]["top1"] == max(step["val_top1"] for step in result.metrics["history"][2:])


def test_distillation_from_the_dense_model(model: nn.Module, digits: ImageData) -> None:
    plain = coppice.prune(model, digits, "macs=0.4", **QUICK)
    taught = coppice.prune(model, digits, "macs=0.4", recipe=replace(QUICK["recipe"], distill=0.5), threads=1)  # type: ignore[type-var]
    assert taught.plan == plain.plan
    assert not same_bits(taught.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize(
    ("target", "says"),
    [("", "nothing to reach"), ("macs=0.001", "can't be reached"), ("params=70k", "meets it already"), ("macs=2", "between 0 and 1")],
)
def test_bad_targets_leave_no_folder(target: str, says: str, model: nn.Module, digits: ImageData, tmp_path: Path) -> None:
    with pytest.raises(CoppiceError, match=says):
        coppice.prune(model, digits, target, out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()


def test_loaders_that_yield_nothing_usable(model: nn.Module, loaders: tuple[Loader, Loader, Loader]) -> None:
    train, _, test = loaders
    with pytest.raises(CoppiceError, match="empty"):
        coppice.prune(model, (train, [], test), "macs=0.5", **QUICK)
    with pytest.raises(CoppiceError, match="pairs"):
        coppice.prune(model, (train, [torch.zeros(1, 1, 8, 8)], test), "macs=0.5", **QUICK)


def test_a_data_set_by_its_name(model: nn.Module) -> None:
    named, opened = (
        coppice.prune(model, data, "macs=0.5", criterion="l1", repair=False, recipe=Recipe(epochs=0), threads=1)
        for data in ("digits", load_data("digits"))
    )
    assert same_bits(named.model.state_dict(), opened.model.state_dict())
    assert named.metrics["pruned"] == opened.metrics["pruned"]
    with pytest.raises(CoppiceError, match="there is no data at"):
        coppice.prune(model, "nowhere", "macs=0.5")
    with pytest.raises(CoppiceError, match="give the data as the name of a data set"):
        coppice.prune(model, ([], []), "macs=0.5")  # type: ignore[arg-type]


def test_interpolation_takes_the_same_share_each_time() -> None:
    dense = Cost(macs=1000, params=100, bytes=400)
    cuts = [interpolate({"macs": 125.0, "params": 100 / 8}, dense, k / 3) for k in (1, 2, 3)]
    assert [cut["macs"] for cut in cuts] == pytest.approx([500, 250, 125])
    assert [cut["params"] for cut in cuts] == pytest.approx([50, 25, 12.5])


def test_a_run_is_repeated_from_its_configuration(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, twice: the same plan, weights and accuracy; then eval, export and load on the folder."""
    first, again = tmp_path / "first", tmp_path / "again"
    arguments = [
        "prune", "--model", config.model, "--weights", config.weights, "--data", "digits", "--mean", "0.3", "--std", "0.38",
        "--val-fraction", "0.2", "--target", "macs=0.5", "--max-drop", "20", "--epochs", "1", "--batch-size", "64", "--lr", "0.02",
        "--precision", "fp32", "--threads", "1", "--out", str(first),
    ]  # fmt: skip
    assert command(arguments) == 0
    assert command(["prune", "--config", str(first / "config.toml"), "--out", str(again)]) == 0
    for name in ("plan.json", "model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert load_config(first / "config.toml")[0] == load_config(again / "config.toml")[0]
    capsys.readouterr()

    assert command(["eval", "--model", str(first), "--json"]) == 0
    metrics = json.loads((first / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out)["top1"] == metrics["pruned"]["top1"]
    assert metrics["target"] == {"macs": "0.5", "max_drop": 20.0}
    assert metrics["verified"] is True

    assert command(["export", str(first), "--to", "onnx"]) == 0
    assert command(["export", str(first), "--out", str(tmp_path / "m.onnx"), "--opset", "20"]) == 0
    assert command(["export", str(first), "--out", str(tmp_path / "m.onnx")]) == 2
    assert "exists already" in capsys.readouterr().err

    weights = coppice.load(first).state_dict()
    (first / "model.safetensors").write_bytes((first / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CoppiceError, match=r"model\.safetensors changed or truncated"):
        coppice.load(first)
    assert same_bits(coppice.load(again).state_dict(), weights)
    assert command(arguments) == 2, "a damaged run is not passed off as finished"


def test_auto_keeps_the_criterion_that_is_nearest_to_the_dense_model(model: nn.Module, digits: ImageData) -> None:
    class Heard(Silent):
        lines: ClassVar[list[str]] = []

        def say(self, message: str) -> None:
            self.lines.append(message)

    settings = {"recipe": Recipe(epochs=0), "threads": 1, "calibration": 256}
    result = coppice.prune(model, digits, "macs=0.4", criterion="auto", progress=Heard(), **settings)
    (said,) = [line for line in Heard.lines if "it is; distance" in line]
    distance = {each.split()[0]: float(each.split()[1]) for each in said.split("validation images: ")[1].split(", ")}
    assert set(distance) == set(TRIED)
    chosen = said.split()[2]
    assert distance[chosen] == min(distance.values())
    assert result.plan == coppice.prune(model, digits, "macs=0.4", criterion=chosen, **settings).plan
    bare = coppice.prune(model, digits, "macs=0.4", criterion=chosen, repair=False, **settings)
    assert bare.metrics["pruned"]["val"]["loss"] > result.metrics["pruned"]["val"]["loss"]


def test_no_more_images_than_calibration_and_none_that_judges_give_batchnorm_its_statistics(
    model: nn.Module, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    judged: list[Tensor] = []

    def reestimate(edited: nn.Module, batches: list[tuple[Tensor, Tensor]], *_: object, **__: object) -> None:
        seen.extend(image for x, _ in batches for image in x)

    def outputs(network: nn.Module, batches: list[Tensor]) -> Tensor:
        judged.extend(image for x in batches for image in x)
        with torch.no_grad():
            scores: Tensor = network.eval()(torch.cat(list(batches)))
        return scores

    monkeypatch.setattr("coppice.cut_stage.reestimate_batchnorm", reestimate)
    monkeypatch.setattr("coppice.recovery.outputs", outputs)
    coppice.prune(model, digits, "macs=0.5", criterion="l1", repair=False, calibration=128, recipe=Recipe(epochs=0), threads=1)
    images = {image.numpy().tobytes() for image in seen}
    assert 64 <= len(images) < 128
    assert judged
    assert images.isdisjoint(image.numpy().tobytes() for image in judged)


def test_training_that_makes_it_worse_is_not_taken(model: nn.Module, digits: ImageData) -> None:
    def spoil(net: nn.Module, epochs: int) -> None:
        for parameter in net.parameters():
            nn.init.normal_(parameter)

    kept = coppice.prune(model, digits, "macs=0.6", recipe=Recipe(epochs=0), threads=1)
    result = coppice.prune(model, digits, "macs=0.6", train=spoil, recipe=Recipe(epochs=1), threads=1)
    assert same_bits(result.model.state_dict(), kept.model.state_dict())


class InADict(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(x)}


def test_a_model_that_returns_a_dict(model: nn.Module, digits: ImageData, tmp_path: Path) -> None:
    settings = QUICK | {"recipe": Recipe(epochs=0), "calibration": 64}
    result = coppice.prune(InADict(model), digits, "macs=0.6", out=tmp_path / "r", **settings)  # type: ignore[arg-type]
    assert result.metrics["verified"]
    assert not result.metrics["notes"], "it was exported, too"
