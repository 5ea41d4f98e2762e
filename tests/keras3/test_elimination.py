"""What it costs to remove an index of a Keras model: against dense least squares in double precision, and against the PyTorch twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from convert import take_weights
from keras import layers

import coppice
from coppice import elimination
from coppice.coupling import keep_mask
from coppice.criteria import measure
from coppice.keras.apply import weights_in
from coppice.keras.linear import Recorded
from coppice.keras.program import coupled_on
from coppice.keras.walk import variables_of
from coppice.linear import Array

BACKEND = keras.backend.backend()
HIDDEN, READ = 6, 3
FIRST = {"data_format": "channels_first"}
READERS: dict[str, tuple[tuple[int, ...], Callable[[], Any]]] = {  # the shape of what it reads, and the layer
    "dense": ((HIDDEN,), lambda: layers.Dense(READ)),
    "dense, many rows": ((5, HIDDEN), lambda: layers.Dense(READ, use_bias=False)),
    "conv1d, causal": ((9, HIDDEN), lambda: layers.Conv1D(READ, 3, padding="causal", dilation_rate=2)),
    "conv2d, strided": ((7, 6, HIDDEN), lambda: layers.Conv2D(READ, (3, 2), strides=2, padding="same")),
    "conv2d, grouped": ((5, 5, HIDDEN), lambda: layers.Conv2D(2 * READ, 2, groups=2, use_bias=False)),
    "conv3d": ((4, 3, 4, HIDDEN), lambda: layers.Conv3D(2, (2, 1, 2))),
    "separable": ((6, 6, HIDDEN), lambda: layers.SeparableConv2D(READ, 2)),
    "einsum, outputs around the rows": ((4, HIDDEN), lambda: layers.EinsumDense("abc,cde->aebd", (READ, None, 2), bias_axes="ed")),
    "einsum, no bias": ((4, HIDDEN), lambda: layers.EinsumDense("abc,dce->abed", (None, READ, 2))),
    "einsum, groups": ((4, HIDDEN), lambda: layers.EinsumDense("agc,gcd->adg", (READ, 4), bias_axes="dg")),
    "einsum, ellipsis": ((4, HIDDEN), lambda: layers.EinsumDense("...x,xy->...y", READ, bias_axes="y")),
}
if BACKEND != "tensorflow":  # it has no such kernels on CPUs
    READERS |= {
        "conv2d, channels first": ((HIDDEN, 5, 4), lambda: layers.Conv2D(READ, 3, padding="same", **FIRST)),
        "conv1d, channels first": ((HIDDEN, 9), lambda: layers.Conv1D(READ, 3, strides=2, **FIRST)),
    }


class Case:
    """A model of a layer that makes channels and one that reads them, and what the latter can give at best without some."""

    def __init__(self, kind: str) -> None:
        shape, make = READERS[kind]
        self.dim = 1 if "first" in kind else -1
        wide = [4 if k == self.dim % (len(shape) + 1) - 1 else n for k, n in enumerate(shape)]
        inputs, rng = keras.Input(wide), np.random.default_rng(0)
        maker = layers.Dense(HIDDEN) if self.dim == -1 else getattr(layers, f"Conv{len(shape) - 1}D")(HIDDEN, 1, **FIRST)
        hidden = layers.Activation("tanh")(maker(inputs))
        answer = layers.Flatten()(make()(hidden))
        self.model, self.tail = keras.Model(inputs, answer), keras.Model(hidden, answer)
        for variable in self.model.weights:
            variable.assign(rng.standard_normal(variable.shape))
        self.batches = [rng.standard_normal((16, *wide)).astype("float32") for _ in range(6)]
        self.recorded = Recorded(self.model, self.batches)
        self.coupling = coupled_on(self.model, coppice.couple(coppice.capture(self.model, self.batches[0])), self.batches[0])
        self.reader = self.recorded.layers[-1]
        self.hidden = values(keras.Model(inputs, hidden), np.concatenate(self.batches))
        self.goal = values(self.tail, self.hidden)

    def without(self, axis: Any, gone: list[int]) -> Array:
        """The hidden values with nought where the indices of the axis are."""
        stays = np.ones(axis.width, bool)
        stays[gone] = False
        mask = keep_mask(self.coupling.dims[self.reader.input][self.dim], {axis.atom: stays})
        return self.hidden * mask.reshape([-1 if k == self.dim % self.hidden.ndim else 1 for k in range(self.hidden.ndim)])

    def least(self, hidden: Array, only_shift: bool = False) -> float:
        """The least squared error of any weights of the reader, by the columns that each of them gives alone."""
        before = weights_in(self.model)
        own = [name for name in variables_of(self.model) if name in self.reader.changed(self.reader.matrix(), self.shift())]
        nought = {name: np.zeros_like(before[name]) for name in own}
        columns = []
        for name in own[1:] if only_shift else own:
            for place in np.ndindex(before[name].shape):
                one = nought[name].copy()
                one[place] = 1
                self.recorded.write({**nought, name: one})
                columns.append(values(self.tail, hidden).ravel())
        self.recorded.write(before)
        if not columns:
            return float(np.square(self.goal).sum())
        design = np.stack(columns, axis=1)
        return float(np.square(design @ np.linalg.lstsq(design, self.goal.ravel(), rcond=1e-6)[0] - self.goal.ravel()).sum())

    def shift(self) -> Array | None:
        bias = self.reader.bias()
        return None if bias is None else np.zeros(bias.size)


def values(model: Any, x: Array) -> Array:
    found: Array = np.asarray(keras.ops.convert_to_numpy(model(keras.ops.convert_to_tensor(x.astype("float32")))), np.float64)
    return found


def exactly(patch: pytest.MonkeyPatch) -> None:
    """No ridge, and all positions."""
    for name, value in (("RIDGE", 1e-9), ("SCARCITY", 0.0), ("SAMPLES_A_FEATURE", 10**6)):
        patch.setattr(elimination, name, value)


@pytest.mark.parametrize("kind", READERS)
def test_the_path_is_the_greedy_one_and_its_refits_are_least_squares(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exactly(monkeypatch)
    case = Case(kind)
    axis = max(case.coupling.prunable, key=lambda a: a.width)
    path = elimination.removal_paths(case.recorded, case.coupling, np.random.default_rng(0).permutation)[axis.id]
    energy = case.least(case.hidden, only_shift=True)
    alone = [case.least(case.without(axis, [k])) / energy for k in range(axis.width)]
    assert path.order[0] == int(np.argmin(alone))
    assert path.added[0] == pytest.approx(min(alone), rel=2e-2)
    assert path.added == sorted(path.added)
    assert sorted(path.order) == list(range(axis.width))
    for level, edits in path.edits.items():
        before, left = weights_in(case.model), case.without(axis, path.order[:level])
        case.recorded.write(edits)
        found = values(case.tail, case.hidden)
        assert np.allclose(found, values(case.tail, left), atol=1e-4)  # what goes is not read any more
        case.recorded.write(before)
        assert np.square(found - case.goal).sum() <= 1.01 * case.least(left) + 1e-5 * energy


def classifier(end: str | None = None, attention: bool = False) -> Any:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(12, 1, strides=2, use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    if attention:
        x = layers.Reshape((9, 12))(x)
        x = layers.GlobalAveragePooling1D()(layers.MultiHeadAttention(4, 8)(x, x))
    else:
        x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(4, activation=end)(layers.Dense(10, activation="relu")(x)))


def images(count: int = 8) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((16, 8, 8, 3)).astype("float32") for _ in range(count)]


def losses_of(model: Any, batches: list[Array]) -> list[Array]:
    coupling = coppice.couple(coppice.capture(model, batches[0]))
    losses = coppice.score(model, coupling, "obs", [(x, None) for x in batches])
    return [losses[axis.id] for axis in coupling.prunable]


@pytest.fixture
def twins() -> Any:
    """A PyTorch network, its inputs, its Keras twin, and the names that the latter's axes have by those of the former's."""
    if BACKEND != "torch":
        pytest.skip("PyTorch is not installed beside the other backends")
    import torch
    from torch import nn

    torch.manual_seed(0)

    def conv(*sizes: int, stride: int = 1, groups: int = 1, padding: int = 0) -> list[nn.Module]:
        layer = nn.Conv2d(*sizes, stride=stride, groups=groups, padding=padding, bias=False)
        return [layer, nn.BatchNorm2d(sizes[1]), nn.ReLU()]

    net = nn.Sequential(
        *conv(3, 16, 3, padding=1), *conv(16, 16, 3, groups=16), *conv(16, 12, 1, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip
    inputs = [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in images()]
    net(torch.cat(inputs))  # statistics of BatchNorm
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3  # Keras's
    twin = classifier()
    pairs = take_weights(twin, {name: t.numpy() for name, t in net.eval().state_dict().items()})
    coupling, other = coppice.couple(coppice.capture(net, inputs[0], values=True)), coppice.couple(coppice.capture(twin, images()[0]))
    sites = {(pair.torch, dim): (pair.keras, pair.order.index(dim)) for pair in pairs for dim in range(len(pair.order))}
    same = {a.id: next(b.id for b in other.prunable if {sites[site] for site in a.sites} & set(b.sites)) for a in coupling.prunable}
    assert len(same) == len(other.prunable) == 3
    return net, inputs, coupling, twin, other, same


def test_the_pytorch_twin_goes_the_same_way(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from coppice.torch import linear
    from coppice.torch.elimination import drawn

    exactly(monkeypatch)
    monkeypatch.setattr(elimination, "RIDGE", 1e-3)
    net, inputs, coupling, twin, other, same = twins
    ours = elimination.removal_paths(linear.Recorded(net, inputs), coupling, drawn(0))
    theirs = elimination.removal_paths(Recorded(twin, images()), other, np.random.default_rng(0).permutation)
    for axis, twice in same.items():
        assert ours[axis].order == theirs[twice].order
        assert ours[axis].added == pytest.approx(theirs[twice].added, rel=1e-3)


@pytest.mark.parametrize("criterion", ["obs", "activation", "apoz", "rank", "independence", "wanda"])
def test_the_pytorch_twin_has_the_same_scores(criterion: str, twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elimination, "SAMPLES_A_FEATURE", 10**6)
    net, inputs, coupling, twin, other, same = twins
    ours = coppice.score(net, coupling, criterion, [(x, None) for x in inputs])
    theirs = coppice.score(twin, other, criterion, [(x, None) for x in images()])
    for axis, twice in same.items():
        assert ours[axis] == pytest.approx(theirs[twice], rel=1e-2)


def test_scoring_leaves_the_model_as_it_was_and_needs_no_labels() -> None:
    model = classifier("softmax", attention=True)
    before = weights_in(model)
    losses = losses_of(model, images(4))
    assert all(np.array_equal(a, b) for a, b in zip(before.values(), weights_in(model).values(), strict=True))
    assert len(losses) >= 5  # of the attention: its heads, and what queries and keys are compared along
    assert all(np.isfinite(found).all() and found.max() > 0 for found in losses)


def test_probabilities_are_taken_for_the_scores_that_they_come_from() -> None:
    model, batches = classifier(), images(4)
    same = classifier("softmax")
    same.set_weights(model.get_weights())
    for wanted, found in zip(losses_of(model, batches), losses_of(same, batches), strict=True):
        assert found == pytest.approx(wanted, rel=1e-2)


def test_an_order_that_another_criterion_chose_is_followed_and_measured() -> None:
    model, batches = classifier(), images()
    coupling = coppice.couple(coppice.capture(model, batches[0]))
    random = coppice.score(model, coupling, "random", seed=5)
    given = [(x, None) for x in batches]
    measured, greedy = measure(model, coupling, random, given), coppice.score(model, coupling, "obs", given)
    assert measured.additive
    for axis in coupling.prunable:
        assert np.argsort(measured[axis.id], kind="stable").tolist() == np.argsort(random[axis.id], kind="stable").tolist()
    assert sum(measured[a.id].sum() for a in coupling.prunable) >= 0.5 * sum(greedy[a.id].sum() for a in coupling.prunable)
