"""Masks on Keras models: the right weights, along the right dims, held by every step of `fit`, in the plan, verified, in a small file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import coppice
from coppice.cli import run
from coppice.coupling import Coupling
from coppice.errors import CoppiceError, VerificationError
from coppice.keras.apply import build, weights_in
from coppice.keras.data import load_images
from coppice.keras.masking import Growing
from coppice.keras.train import Epoch, fine_tune, steps_per_epoch
from coppice.keras.walk import assign
from coppice.masking import unpacked, weight_scores
from coppice.masks import MaskRecipe, sites
from coppice.planning import Plan, compose
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.run import KERAS, PLAN, SPARSE, read_json

SHAPE = (2, 8, 8, 3)


def many() -> Any:
    """A weight of every kind: stem of three inputs, grouped, depthwise, transposed, heads, matrix products."""
    x = inputs = keras.Input(SHAPE[1:])
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(16, 3, activation="relu", name="stem")(x))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(layers.Conv2D(8, 1, groups=2, name="grouped")(x))
    x = layers.Conv2DTranspose(24, 2, name="up")(x)
    x = layers.Reshape((25, 24))(x)
    x = layers.MultiHeadAttention(2, 6, name="heads")(x, x)
    x = layers.EinsumDense("nts,tso->no", output_shape=12, name="both")(x)
    return keras.Model(inputs, layers.Dense(5, activation="softmax", name="fc")(x))


def coupled(model: Any, shape: tuple[int, ...] = SHAPE) -> Coupling:
    return coppice.couple(coppice.capture(model, shape))


def some_batches() -> list[tuple[Any, Any]]:
    generator = np.random.default_rng(1)
    return [(generator.standard_normal((8, *SHAPE[1:])).astype("float32"), np.arange(8) % 5) for _ in range(2)]


def same(left: Any, right: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(weights_in(left).values(), weights_in(right).values(), strict=True))


def small_net() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)), layers.Conv2D(16, 3, activation="relu"), layers.BatchNormalization(), layers.Flatten(),
            layers.Dense(24, activation="relu"), layers.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def test_what_can_be_masked_and_along_which_dims() -> None:
    coupling = coupled(many())
    found, dense = sites(coupling)
    assert {s.name: (s.along, s.outputs, s.run) for s in found} == {
        "stem/kernel": ((2,), (3,), 3), "grouped/kernel": ((2,), (3,), 8), "depthwise/kernel": ((), (2, 3), 1),
        "up/kernel": ((3,), (2,), 16), "heads/query/kernel": ((0,), (1, 2), 24), "heads/key/kernel": ((0,), (1, 2), 24),
        "heads/value/kernel": ((0,), (1, 2), 24), "heads/attention_output/kernel": ((0, 1), (2,), 12), "both/kernel": ((0, 1), (2,), 600),
        "fc/kernel": ((0,), (1,), 12),
    }  # fmt: skip
    assert dense["norm/gamma"] == dense["fc/bias"] == "it is a vector"
    scores_by_heads = 2 * 25 * 25 * 2 * 6  # the attention itself has no weights
    assert sum(s.macs for s in found) == coupling.cost().macs - scores_by_heads


def test_two_of_every_four_along_the_inputs() -> None:
    model = many()
    coupling = coupled(model)
    masked, plan = coppice.mask(model, coupling, MaskRecipe(nm="2:4"))
    masks, weights = unpacked(plan), weights_in(masked)
    assert {"stem/kernel", "depthwise/kernel"} == {s.name for s in sites(coupling)[0]} - masks.keys()  # 3 and 1 inputs
    for name, found in masks.items():
        assert np.array_equal(weights[name] != 0, found)
    assert (masks["grouped/kernel"].reshape(2, 4, 8).sum(1) == 2).all()
    assert (masks["up/kernel"].reshape(-1, 4).sum(1) == 2).all()
    assert (masks["heads/attention_output/kernel"].reshape(3, 4, 24).sum(1) == 2).all()
    magnitude = np.abs(weights_in(model)["fc/kernel"]).reshape(3, 4, 5)
    assert np.array_equal(masks["fc/kernel"].reshape(3, 4, 5), magnitude >= np.sort(magnitude, axis=1)[:, 2:3])


@pytest.mark.parametrize(("criterion", "scope"), [("gradient", "layer"), ("taylor", "row"), ("random", "erk"), ("magnitude", "global")])
def test_the_lowest_scores_go_and_that_is_verified(criterion: str, scope: str) -> None:
    model = many()
    coupling, recipe = coupled(model), MaskRecipe(0.5, criterion=criterion, scope=scope)
    masked, plan = coppice.mask(model, coupling, recipe, some_batches(), 3)
    scores, masks = weight_scores(model, coupling, sites(coupling)[0], criterion, some_batches(), 3), unpacked(plan)
    assert sum(int((~m).sum()) for m in masks.values()) / sum(m.size for m in masks.values()) == pytest.approx(0.5, abs=0.02)
    if scope in ("layer", "erk"):
        assert all(scores[name][found].min() >= scores[name][~found].max() for name, found in masks.items() if not found.all())
    if scope == "row":
        assert (masks["depthwise/kernel"].sum((0, 1)) == round(0.5 * 9)).all()
        assert (masks["heads/key/kernel"].sum(0) == 12).all()
    assert same(coppice.apply(model, Plan.from_json(plan.to_json())), masked)
    coppice.verify(model, masked, coupling, plan)


def test_masks_in_a_plan_with_a_structured_cut() -> None:
    model = many()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy")
    coupling = coupled(model)
    first = coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": 0.6 * coupling.cost().macs}, round_to=2)
    smaller = coppice.apply(model, first)
    masked, step = coppice.mask(smaller, coupled(smaller), MaskRecipe(0.5))
    assert masked.compiled
    whole = Plan.from_json(compose(first, step).to_json())
    again = coppice.apply(model, whole)
    assert same(again, masked)
    coppice.verify(model, again, coupling, whole)
    kernel = weights_in(again)["fc/kernel"]
    assign(again, {"fc/kernel": np.where(kernel == 0, 1, kernel)})
    with pytest.raises(VerificationError, match="fc/kernel"):
        coppice.verify(model, again, coupling, whole)
    with pytest.raises(CoppiceError, match=r"the mask of .* is of shape"):
        coppice.apply(model, step)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_masked_weights_stay_zero_in_a_fit_of_ones_own(kind: str) -> None:
    x, y = np.random.default_rng(0).standard_normal((32, 8)).astype("float32"), np.zeros((32, 2), "float32")
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, kernel_constraint="non_neg", name="d"), layers.Dense(2)])
    options: dict[str, Any] = {"weight_decay": 0.01, "learning_rate": 0.05}
    model.compile(keras.optimizers.SGD(momentum=0.9, **options) if kind == "sgd" else keras.optimizers.AdamW(**options), "mse")
    model.fit(x, y, batch_size=16, verbose=0)  # compiles a step that knows of no masks
    gone = ~np.eye(8, dtype=bool)
    before = weights_in(model)["d/kernel"]
    handle = coppice.hold_masks(model, {"d/kernel": ~gone})
    assert not weights_in(model)["d/kernel"][gone].any()
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    after = weights_in(model)["d/kernel"]
    assert not after[gone].any()
    assert (after >= 0).all()  # the constraint of its own
    assert not np.array_equal(after[~gone], before[~gone])
    handle.remove()
    model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    assert weights_in(model)["d/kernel"][gone].any()
    with pytest.raises(CoppiceError, match="not in this model"):
        coppice.hold_masks(model, {"other/kernel": ~gone})


class StoppedError(Exception):
    pass


def test_growing_masks_reach_their_share_and_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    data = load_images("digits", Preprocess())
    train = data.train.subset(np.arange(320))
    recipe = Recipe(epochs=3, batch_size=32, lr=0.05, optimizer="sgd", augment="none")
    asked = MaskRecipe(0.9, schedule="cubic")
    net = small_net()
    heard: list[str] = []

    def grow(stop_after: int = 0, checkpoint: Path | None = None) -> tuple[Any, Any]:
        model = build(net, None, weights_in(net))
        growing = Growing(model, sites(coupled(model, (1, 8, 8, 1)))[0], asked, 3 * steps_per_epoch(train, recipe))

        def told(epoch: Epoch) -> None:
            heard.append(growing.said())
            if epoch.epoch == stop_after:
                raise StoppedError

        fine_tune(model, train, recipe, mirror=False, judge=lambda: (0.0, 0.0), along=growing, checkpoint=checkpoint, on_epoch=told)
        return model, growing.finish()

    whole, masks = grow()
    assert sum(int((~m).sum()) for m in masks.values()) / sum(m.size for m in masks.values()) == pytest.approx(0.9, abs=1e-3)
    shares = [float(said.split()[0]) for said in heard]
    assert 0 < shares[0] < shares[1] == pytest.approx(90, abs=0.1) == shares[2]
    weights = weights_in(whole)
    assert all(not weights[name][~found].any() for name, found in masks.items())
    with pytest.raises(StoppedError):
        grow(1, tmp_path / "c.npz")
    again, resumed = grow(0, tmp_path / "c.npz")
    assert heard[3] == heard[0]
    assert len(heard) == 6
    assert all(np.array_equal(resumed[name], masks[name]) for name in masks)
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(weights_in(again).values(), weights.values(), strict=True))


def test_the_small_file_needs_no_pytorch(tmp_path: Path) -> None:
    masked, _ = coppice.mask(many(), coupled(many()), MaskRecipe(0.9))
    weights = weights_in(masked) | {"scalar": np.array(3), "half": np.zeros((9, 9), "float16")}
    coppice.save_sparse(tmp_path / "x", weights)
    assert (tmp_path / "x").stat().st_size < 0.3 * sum(array.nbytes for array in weights.values())
    again = coppice.load_sparse(tmp_path / "x", arrays=True)
    assert again.keys() == weights.keys()
    assert all((again[n].dtype, again[n].tobytes()) == (array.dtype, array.tobytes()) for n, array in weights.items())


def test_structured_then_masks_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, net = tmp_path / "run", small_net()
    net.save(tmp_path / "net.keras")
    options = [
        "--data", "digits", "--target", "macs=0.6", "--sparsity", "0.8", "--mask-schedule", "iterative", "--mask-steps", "2",
        "--epochs", "2", "--criterion", "l1", "--calibration", "64", "--augment", "none", "--optimizer", "sgd",
        "--lr", "0.05", "--batch-size", "128",
    ]  # fmt: skip
    assert run(["prune", "--model", str(tmp_path / "net.keras"), *options, "--out", str(out)]) == 0, capsys.readouterr().err
    assert "80.0 % of" in capsys.readouterr().out
    metrics, plan = read_json(out / "metrics.json"), Plan.from_json((out / PLAN).read_text())
    assert [step["stage"] for step in metrics["history"]][-4:] == ["masked 1", "masked 1, tuned", "masked 2", "masked 2, tuned"]
    assert metrics["masks"]["share"] == pytest.approx(0.8, abs=1e-3)
    assert metrics["masks"]["file_bytes"] == (out / SPARSE).stat().st_size < 0.7 * metrics["masks"]["dense_file_bytes"]
    assert any("masks" in line for line in metrics["verification"]["checks"])
    assert any(len(axis.keep) < axis.width for axis in plan.axes)
    weights = weights_in(keras.saving.load_model(out / KERAS))
    assert all(not weights[name][~found].any() for name, found in unpacked(plan).items())
    small = coppice.load_sparse(out / SPARSE, arrays=True)
    assert all(np.array_equal(small[name], array) for name, array in weights.items())
    assert "Single weights that are zero" in (out / "report.html").read_text()


def test_masks_alone_that_grow_in_python() -> None:
    data = load_images("digits", Preprocess())
    few = (data.train.subset(np.arange(256)), data.val.subset(np.arange(64)), data.test.subset(np.arange(64)))
    recipe = Recipe(epochs=2, batch_size=64, lr=0.05, optimizer="sgd", augment="none")
    settings: dict[str, Any] = {"recipe": recipe, "rounds": 2, "calibration": 64, "max_drop": 0.0}
    result = coppice.prune(small_net(), few, masks=MaskRecipe(0.7, schedule="cubic"), **settings)
    assert [step["stage"] for step in result.metrics["history"]][:2] == ["dense", "masks grown"]
    assert result.metrics["masks"]["asked"] == "70 % zeros"
    assert "70.0 % of" in result.statement
    weights = weights_in(result.model)
    assert all(not weights[name][~found].any() for name, found in unpacked(result.plan).items())


def test_wanda_is_the_weight_times_the_norm_of_its_input() -> None:
    model = many()
    coupling, batches = coupled(model), some_batches()
    scores, weights = weight_scores(model, coupling, sites(coupling)[0], "wanda", batches, 0), weights_in(model)
    x = np.concatenate([x for x, _ in batches])

    def before(name: str) -> Any:
        return keras.ops.convert_to_numpy(keras.Model(model.inputs[0], model.get_layer(name).input)(x))

    norms = np.sqrt(np.square(before("grouped")).mean((0, 1, 2))).reshape(2, 8)  # a pointwise convolution in two groups of four outputs
    by_group = np.repeat(norms, 4, axis=0).T
    assert np.allclose(scores["grouped/kernel"][0, 0], np.abs(weights["grouped/kernel"][0, 0]) * by_group, rtol=1e-4)
    norms = np.sqrt(np.square(before("fc")).mean(0))
    assert np.allclose(scores["fc/kernel"], np.abs(weights["fc/kernel"]) * norms[:, None], rtol=1e-4)
    norms = np.sqrt(np.square(before("both")).mean(0))
    assert np.allclose(scores["both/kernel"], np.abs(weights["both/kernel"]) * norms[:, :, None], rtol=1e-4)


@pytest.mark.parametrize("recipe", [MaskRecipe(0.6, criterion="sparsegpt"), MaskRecipe(nm="2:4", criterion="sparsegpt")])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Dense(12), lambda: layers.Conv2D(12, 3, groups=2, strides=2, padding="same"),
        lambda: layers.EinsumDense("nhwc,cab->nhwab", output_shape=(6, 6, 3, 4)),
    ],
)  # fmt: skip
def test_what_stays_makes_good_what_goes(layer: Any, recipe: MaskRecipe) -> None:
    """On inputs whose channels say much of each other."""
    model = keras.Sequential([keras.Input((6, 6, 16)), layer()])
    coupling, generator = coupled(model, (1, 6, 6, 16)), np.random.default_rng(1)
    mixed = generator.standard_normal((6, 16)) / 2
    batches = []
    for _ in range(4):
        x = generator.standard_normal((16, 6, 6, 6)) @ mixed + 0.1 * generator.standard_normal((16, 6, 6, 16))
        batches.append((x.astype("float32"), np.zeros(16)))
    updated, plan = coppice.mask(model, coupling, recipe, batches)
    plain = coppice.apply(model, plan)  # the same masks, the weights that stay as they were
    want, found, without = (np.concatenate([keras.ops.convert_to_numpy(m(x)) for x, _ in batches]) for m in (model, updated, plain))
    assert np.square(found - want).mean() < 0.8 * np.square(without - want).mean()
    assert all(not weights_in(updated)[name][~mask].any() for name, mask in unpacked(plan).items())


def test_what_pytorch_models_alone_are_masked_by() -> None:
    with pytest.raises(CoppiceError, match="movement work on PyTorch models only"):
        coppice.prune(small_net(), load_images("digits", Preprocess()), masks=MaskRecipe(0.5, criterion="movement", schedule="cubic"))
