"""Fine-tuning with `model.fit`: what goes along, what a stopped one remembers, and regularisation, on every backend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.errors import CoppiceError
from coppice.keras.apply import build, weights_in
from coppice.keras.callbacks import Along, Rates
from coppice.keras.data import load_images
from coppice.keras.evaluate import evaluate
from coppice.keras.loop import prune
from coppice.keras.train import Epoch, Epochs, Pupil, fine_tune, fitting
from coppice.preprocess import Preprocess
from coppice.progress import Silent
from coppice.recipe import PRESETS, Recipe
from coppice.shrinking import NEAR_ZERO

RECIPE = Recipe(epochs=3, batch_size=64, lr=0.05, optimizer="sgd", augment="light")


def small_data() -> Any:
    data = load_images("digits", Preprocess())
    return data.train.subset(np.arange(320)), data.val.subset(np.arange(64))


def small_net() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)), layers.Conv2D(16, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten(),
            layers.Dropout(0.2), layers.Dense(24, activation="relu"), layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def judged(model: Any, part: Any) -> tuple[float, float]:
    found = evaluate(model, part)
    return found.top1, found.loss


class StoppedError(Exception):
    pass


def same(left: Any, right: Any) -> bool:
    return all(np.allclose(a, b, atol=1e-6) for a, b in zip(weights_in(left).values(), weights_in(right).values(), strict=True))


def test_what_was_stopped_goes_on_at_its_epoch(tmp_path: Path) -> None:
    train, val = small_data()
    net = small_net()
    whole, half, checkpoint = build(net, None, weights_in(net)), build(net, None, weights_in(net)), tmp_path / "checkpoint.npz"
    undisturbed = fine_tune(whole, train, RECIPE, mirror=True, judge=lambda: judged(whole, val))

    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise StoppedError

    options: dict[str, Any] = {"mirror": True, "judge": lambda: judged(half, val), "checkpoint": checkpoint}
    with pytest.raises(StoppedError):
        fine_tune(half, train, RECIPE, on_epoch=stop, **options)
    half = build(net, None, weights_in(net))
    heard: list[int] = []
    history = fine_tune(half, train, RECIPE, on_epoch=lambda epoch: heard.append(epoch.epoch), **options)
    assert heard == [3]
    assert [e.epoch for e in history] == [1, 2, 3]
    assert same(half, whole)
    assert not same(half, net)
    assert np.allclose([e.train_loss for e in history], [e.train_loss for e in undisturbed], rtol=1e-4)
    assert history[-1].lr < history[0].lr
    with pytest.raises(CoppiceError, match="another recipe, seed or data"):
        fine_tune(half, train, RECIPE, seed=1, **options)
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(CoppiceError, match="truncated"):
        fine_tune(half, train, RECIPE, **options)


class Weights(Along):
    """The weights after every step."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.student, self.seen = model, list[Any]()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.in_sync()
        self.seen.append(weights_in(self.student))


def test_the_average_of_the_weights_is_judged_and_kept_and_has_its_masks(tmp_path: Path) -> None:
    train, _ = small_data()
    recipe = Recipe(epochs=2, batch_size=64, lr=0.05, optimizer="sgd", augment="none", ema=0.8)
    mask = np.arange(10 * 24).reshape(24, 10) % 3 == 0
    start = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(24, activation="relu"), layers.Dense(10, name="last")])
    judged_on: list[Any] = []

    def run(stop: bool, checkpoint: Path | None = None) -> tuple[Any, Weights]:
        model = build(start, None, weights_in(start))
        weights = Weights(model)

        def judge() -> tuple[float, float]:
            judged_on.append(weights_in(model))
            return 0.0, 0.0

        def told(epoch: Epoch) -> None:
            if stop:
                raise StoppedError

        with coppice.hold_masks(model, {"last/kernel": mask}):
            fine_tune(model, train, recipe, mirror=False, judge=judge, along=weights, checkpoint=checkpoint, on_epoch=told)
        return model, weights

    model, weights = run(False)
    average = weights.seen[0]
    for seen in weights.seen[1:]:
        average = {name: 0.8 * average[name] + 0.2 * seen[name] for name in seen}
    for kept in (weights_in(model), judged_on[1]):
        assert all(np.allclose(kept[name], array, atol=1e-5) for name, array in average.items() if name != "last/kernel")
        assert np.allclose(kept["last/kernel"][mask], average["last/kernel"][mask], atol=1e-5)
        assert not kept["last/kernel"][~mask].any()
    assert not all(np.allclose(weights.seen[-1][name], array, atol=1e-4) for name, array in average.items())
    with pytest.raises(StoppedError):
        run(True, tmp_path / "c.npz")
    again, _ = run(False, tmp_path / "c.npz")
    finished, _ = run(True, tmp_path / "c.npz")  # nothing is left to do
    assert same(again, model)
    assert same(finished, model)


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", None])
def test_the_loss_of_mixed_images_is_that_of_shares_of_classes(loss: str | None) -> None:
    train, _ = small_data()
    recipe = Recipe(epochs=1, batch_size=64, augment="mixup")
    net = small_net()
    if loss is not None:
        net.compile("sgd", loss)
    x, (y, other, share) = Epochs(train, recipe, 1, mirror=False)[0]
    shares = share[:, None] * np.eye(10)[y] + (1 - share[:, None]) * np.eye(10)[other]
    outputs = net.predict_on_batch(x)
    want = -(shares * np.log(outputs)).sum(1).mean()
    found = Pupil(net, None, recipe).compute_loss(x=x, y=(y, other, keras.ops.convert_to_tensor(share)), y_pred=outputs)
    assert float(keras.ops.convert_to_numpy(found)) == pytest.approx(float(want), rel=1e-4)
    history = fine_tune(
        net, train, Recipe(epochs=1, batch_size=64, augment="crop+mixup+cutmix", lr=0.01), mirror=False, judge=lambda: (0.0, 0.0)
    )
    assert 0 < history[0].train_loss < 10


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", None])
def test_smoothed_labels_are_kerass(loss: str | None) -> None:
    train, _ = small_data()
    net = small_net()
    if loss is not None:
        net.compile("sgd", loss)
    x, y = Epochs(train, RECIPE, 1, mirror=False)[0]
    outputs = net.predict_on_batch(x)
    want = keras.losses.CategoricalCrossentropy(label_smoothing=0.2)(np.eye(10, dtype=np.float32)[y], outputs)
    found = Pupil(net, None, replace(RECIPE, label_smoothing=0.2)).compute_loss(x=x, y=y, y_pred=outputs)
    assert float(found) == pytest.approx(float(want), rel=1e-4)


def test_labels_of_two_answers_are_not_smoothed() -> None:
    net = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(1, activation="sigmoid")])
    with pytest.raises(CoppiceError, match="--label-smoothing is for models that end with a softmax"):
        Pupil(net, None, replace(RECIPE, label_smoothing=0.1))


def test_repeated_images_are_in_one_batch() -> None:
    train, _ = small_data()
    recipe = Recipe(epochs=1, batch_size=16, augment="repeat4")
    x, y = Epochs(train, recipe, 1, mirror=False)[0]
    assert len(y) == 16
    assert len(np.unique(x.reshape(16, -1), axis=0)) == 4
    assert (y.reshape(4, 4) == y.reshape(4, 4)[:, :1]).all()


def test_augmentation_goes_by_the_number_of_images() -> None:
    train, _ = small_data()
    assert fitting(train, replace(RECIPE, augment="auto")).augment == "+".join(PRESETS["strong"])
    assert fitting(train, replace(RECIPE, augment="none")).augment == "none"


def test_enough_is_enough() -> None:
    train, val = small_data()
    net = small_net()
    history = fine_tune(net, train, RECIPE, mirror=True, judge=lambda: judged(net, val), enough=lambda epoch: epoch.epoch == 2)
    assert len(history) == 2


def test_the_rate_of_a_step_is_the_recipes() -> None:
    """Where the weights of a model of one number go shows the rate of every step."""
    rates = Rates(RECIPE, steps=5)
    seen = [float(keras.ops.convert_to_numpy(rates(keras.ops.convert_to_tensor(k)))) for k in range(15)]
    assert np.allclose(seen, [RECIPE.lr_at(k, 15) for k in range(15)])
    train, val = small_data()
    net = small_net()
    before = weights_in(net)
    fine_tune(net, train, Recipe(epochs=1, batch_size=64, lr=1e-12, optimizer="sgd"), mirror=True, judge=lambda: judged(net, val))
    after = weights_in(net)
    assert all(np.allclose(before[name], after[name], atol=1e-9) for name in before if "moving" not in name)


@pytest.mark.parametrize("kind", ["group-lasso", "slimming", "l1", "l2", "growing", "soft"])
def test_what_has_to_go_is_shrunk(kind: str) -> None:
    """Against the loss of nothing: what a regularisation does by itself, in the weights of every layer that an index touches."""
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)), layers.Conv2D(16, 3, use_bias=False), layers.BatchNormalization(), layers.ReLU(), layers.Flatten(),
            layers.Dense(24, activation="relu"), layers.Dense(3),
        ]
    )  # fmt: skip
    coupling = coppice.couple(coppice.capture(model, (1, 6, 6, 1)))
    before = weights_in(model)
    target = {"macs": 0.2 * coupling.cost().macs}
    reg = coppice.regulariser(model, coupling, kind, steps=40, target=target, round_to=1, min_width=1)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(np.zeros((80, 6, 6, 1), "float32"), np.zeros((80, 3), "float32"), batch_size=2, verbose=0, callbacks=[reg])
    assert reg.done == 40
    after = weights_in(model)
    shrunk = {name for name in before if "moving" not in name and np.abs(after[name]).sum() < 0.99 * np.abs(before[name]).sum()}
    ends = {name.rsplit("/", 1)[1] for name in shrunk}
    assert ends == ({"gamma"} if kind == "slimming" else {"kernel"} if kind == "soft" else {"kernel", "gamma"})
    if kind in ("group-lasso", "growing"):
        assert any((scores < NEAR_ZERO).any() for scores in reg.scores().by_axis.values())
        smaller = coppice.apply(model, reg.plan(round_to=1, min_width=1))
        left = coppice.couple(coppice.capture(smaller, (1, 6, 6, 1))).cost().macs / coupling.cost().macs
        assert left < 0.7
        assert f"{left:.2f} of the MACs" in reg.said()


def test_what_soft_pruning_lets_back_is_no_larger_than_it_was() -> None:
    """A filter at zero has no variance, so that BatchNormalization makes its first gradients some hundred times too large."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)), layers.Conv2D(16, 3, use_bias=False), layers.BatchNormalization(beta_initializer="ones"), layers.ReLU(),
            layers.Conv2D(8, 3), layers.Flatten(), layers.Dense(3),
        ]
    )  # fmt: skip
    coupling = coppice.couple(coppice.capture(model, (1, 6, 6, 1)))
    target = {"macs": 0.5 * coupling.cost().macs}
    reg = coppice.regulariser(model, coupling, "soft", steps=40, target=target, round_to=1, min_width=1)
    kernel = next(name for name, value in weights_in(model).items() if value.shape == (3, 3, 1, 16))
    began = np.square(weights_in(model)[kernel]).sum((0, 1, 2))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(320, 6, 6, 1)).astype("float32")
    model.fit(x, np.arange(320) % 3, batch_size=8, verbose=0, callbacks=[reg])
    assert (np.square(weights_in(model)[kernel]).sum((0, 1, 2)) <= began * 1.0001).all()


def test_a_run_with_regularisation_says_so(tmp_path: Path) -> None:
    data = load_images("digits", Preprocess())
    net = small_net()
    fine_tune(net, data.train, RECIPE, mirror=False, judge=lambda: judged(net, data.val))
    settings: dict[str, Any] = {"regularise": "group-lasso", "recipe": RECIPE, "calibration": 64, "max_drop": 50.0, "stop_early": True}
    result = prune(net, data, "macs=0.5", out=tmp_path / "run", **settings)
    stages = [step["stage"] for step in result.metrics["history"]]
    assert stages == ["dense", "regularised", "cut 1", "tuned 1"]
    assert result.metrics["regularised"]["kind"] == "group-lasso"
    assert "near zero" in result.metrics["regularised"]["said"]
    assert "group-lasso" in (tmp_path / "run" / "report.html").read_text()


class Heard(Silent):
    """What was said; stops the run at a line that ends an epoch, if asked to."""

    def __init__(self, stop_at: str = "never") -> None:
        self.lines: list[str] = []
        self.stop_at = stop_at

    def say(self, text: str) -> None:
        self.lines.append(text)
        if self.stop_at in text:
            raise StoppedError


def test_a_run_that_was_stopped_while_it_trains_loses_no_epoch(tmp_path: Path) -> None:
    """In the regularised epochs, whose end depends on how many steps there were, and in those after the cut."""
    data = load_images("digits", Preprocess())
    few = (data.train.subset(np.arange(320)), data.val.subset(np.arange(64)), data.test.subset(np.arange(64)))
    recipe = Recipe(epochs=4, batch_size=64, lr=0.05, optimizer="sgd", augment="none")
    settings: dict[str, Any] = {"regularise": "l2", "strength": "4", "recipe": recipe, "calibration": 64}
    net = small_net()
    whole = prune(net, few, "macs=0.5", out=tmp_path / "whole", **settings)
    heard = Heard("epoch 1 of 2")
    for _ in range(2):  # once in either training
        with pytest.raises(StoppedError):
            prune(net, few, "macs=0.5", out=tmp_path / "stopped", progress=heard, **settings)
    last = Heard()
    again = prune(net, few, "macs=0.5", out=tmp_path / "stopped", progress=last, **settings)
    assert sum("epoch 1 of 2" in line for line in (*heard.lines, *last.lines)) == 2
    assert sum("epoch 2 of 2" in line for line in (*heard.lines, *last.lines)) == 2
    assert again.plan == whole.plan
    assert same(again.model, whole.model)


def test_an_optimiser_is_rehearsed_where_none_is_named() -> None:
    data = load_images("digits", Preprocess())
    net = small_net()
    fine_tune(net, data.train, RECIPE, mirror=False, judge=lambda: judged(net, data.val))
    few = (data.train.subset(np.arange(256)), data.val.subset(np.arange(64)), data.test.subset(np.arange(64)))
    recipe, heard = Recipe(epochs=1, batch_size=64, augment="none"), Heard()
    prune(net, few, "macs=0.7", recipe=recipe, calibration=64, progress=heard)
    assert sum("validation loss" in line for line in heard.lines) == 4
