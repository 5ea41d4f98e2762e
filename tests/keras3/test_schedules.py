"""Cuts in the midst of a Keras model's training, and weights put back to earlier values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.cli import run
from coppice.errors import CoppiceError
from coppice.keras.apply import apply, build, weights_in
from coppice.keras.data import load_images
from coppice.keras.evaluate import evaluate
from coppice.keras.schedules import HandOver
from coppice.keras.train import Epoch, fine_tune
from coppice.keras.walk import numbers
from coppice.masks import MaskRecipe
from coppice.planning import Plan, compose, remove
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.run import read_json

RECIPE = Recipe(epochs=3, batch_size=64, lr=0.1, optimizer="sgd", augment="none")


def small_data() -> Any:
    data = load_images("digits", Preprocess())
    return data.train.subset(np.arange(640)), data.val.subset(np.arange(100)), data.test.subset(np.arange(100))


def small_net() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)), layers.Conv2D(16, 3, activation="relu", name="conv"), layers.BatchNormalization(), layers.Flatten(),
            layers.Dense(24, activation="relu", name="fc"), layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def coupled(model: Any) -> Any:
    return coppice.couple(coppice.capture(model, (1, 8, 8, 1)))


def same(left: Any, right: Any, by: float = 0.0) -> bool:
    pairs = zip(weights_in(left).values(), weights_in(right).values(), strict=True)
    return all(a.shape == b.shape and np.allclose(a, b, atol=by, rtol=0) for a, b in pairs)


def slots(optimizer: Any) -> dict[str, Any]:
    return {variable.path.rpartition("/")[2]: numbers(variable) for variable in optimizer.variables}


class StoppedError(Exception):
    pass


def test_the_rest_of_a_training_is_that_of_the_smaller_model(tmp_path: Path) -> None:
    model, data = small_net(), small_data()
    before = weights_in(model)
    found = coppice.train_and_prune(model, data, RECIPE, "macs=0.5", at=(1 / 3, 2 / 3))
    assert [epoch.epoch for epoch in found.history] == [1, 2, 3]
    assert coupled(found.model).cost().macs <= 0.5 * coupled(model).cost().macs
    assert evaluate(found.model, data[2]).top1 > 40
    assert sum("relative error" in line for line in found.checks) == 4
    applied = weights_in(apply(model, found.plan))
    assert {name: array.shape for name, array in applied.items()} == {name: a.shape for name, a in weights_in(found.model).items()}
    assert all(np.array_equal(before[name], array) for name, array in weights_in(model).items())

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        coppice.train_and_prune(model, data, RECIPE, "macs=0.5", at=(1 / 3, 2 / 3), checkpoint=tmp_path / "c.npz", on_epoch=stop)
    heard: list[int] = []
    again = coppice.train_and_prune(
        model, data, RECIPE, "macs=0.5", at=(1 / 3, 2 / 3), checkpoint=tmp_path / "c.npz", on_epoch=lambda epoch: heard.append(epoch.epoch)
    )
    assert heard == [3]
    assert again.plan == found.plan
    assert same(again.model, found.model, 1e-5)


def test_momentum_is_cut_as_the_weights_are_and_without_a_cut_two_stretches_are_one_training() -> None:
    train, *_ = small_data()
    start = small_net()
    whole, parts = (build(start, None, weights_in(start)) for _ in range(2))
    options: dict[str, Any] = {"mirror": False, "judge": lambda: (0.0, 0.0)}
    expected = fine_tune(whole, train, RECIPE, **options)
    hand_over, seen = HandOver(), list[Any]()

    def begun(optimizer: Any) -> None:
        hand_over(optimizer)
        seen.append(slots(optimizer))

    history = fine_tune(parts, train, RECIPE, span=(0, 1), begun=begun, **options)
    coupling = coupled(parts)
    hand_over.to_smaller(parts, remove(coupling, {}))
    history += fine_tune(parts, train, RECIPE, span=(1, 3), begun=begun, **options)
    assert [(e.epoch, e.lr) for e in history] == [(e.epoch, e.lr) for e in expected]
    assert np.allclose([e.train_loss for e in history], [e.train_loss for e in expected], rtol=1e-4)
    assert same(parts, whole, 1e-5)
    step = remove(coupling, {"conv/kernel:3": range(0, 16, 2)})
    smaller = coppice.apply(parts, step)
    hand_over.to_smaller(parts, step)
    before = slots(hand_over.optimizer)
    fine_tune(smaller, train, Recipe(epochs=4, batch_size=64, lr=0.1, optimizer="sgd", augment="none"), span=(3, 4), begun=begun, **options)
    (name,) = (name for name in before if "conv_kernel" in name)
    assert np.array_equal(seen[2][name], before[name][..., 1::2])
    assert np.abs(seen[2][name]).max() > 0
    assert seen[2]["iteration"] == before["iteration"] == 30


@pytest.mark.parametrize(
    ("given", "says"),
    [({"target": "latency=0.5@keras"}, "MACs, parameters or bytes"), ({"target": "macs=0.5", "at": (0.01,)}, "an epoch before and after")],
)
def test_what_can_not_be(given: dict[str, Any], says: str) -> None:
    with pytest.raises(CoppiceError, match=says):
        coppice.train_and_prune(small_net(), small_data(), RECIPE, **given)


def test_cut_after_a_share_of_the_epochs_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_net().save(tmp_path / "net.keras")
    options = ["--data", "digits", "--target", "macs=0.5", "--epochs", "2", "--cut-after", "0.5", "--criterion", "l1", "--lr", "0.1"]
    arguments = ["prune", "--model", str(tmp_path / "net.keras"), *options, "--augment", "none", "--allocation", "global"]
    assert run([*arguments, "--out", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert [step["stage"] for step in metrics["history"]] == ["dense", "trained"]
    assert metrics["pruned"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    assert len(metrics["history"][1]["training"]) == 2
    capsys.readouterr()
    assert run([*arguments, "--epochs", "1", "--out", str(tmp_path / "other")]) == 2
    assert "an epoch before and after" in capsys.readouterr().err


def test_a_lottery_ticket_has_the_earlier_values_of_what_stays() -> None:
    model = small_net()
    early = [weight.copy() for weight in model.get_weights()]
    later = build(model, None, {name: array + 1 for name, array in weights_in(model).items()})
    coupling = coupled(later)
    first = coppice.plan(coupling, coppice.score(later, coupling, "l1"), {"macs": 0.6 * coupling.cost().macs})
    smaller = coppice.apply(later, first)
    masked, step = coppice.mask(smaller, coupled(smaller), MaskRecipe(0.5))
    plan = compose(first, step)
    assert same(coppice.rewind(masked, plan, later, early), coppice.apply(model, plan))
    with pytest.raises(CoppiceError, match="not those of the dense model"):
        coppice.rewind(masked, plan, later, smaller.get_weights())
    with pytest.raises(CoppiceError, match="not what made"):
        coppice.rewind(masked, Plan((), {}, {}), later, early)
