"""One network in both frameworks: the same weights, the same answers, and the same indices stay."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from convert import Pair, mobilenet_v2, take_weights

import coppice
from coppice.coupling import Mask
from coppice.planning import Plan

SIDE = 64
needs_torch = pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch is not installed beside the other backends")


@pytest.fixture(scope="module")
def trained(shared: Path) -> tuple[Any, Any, list[Pair]]:
    """The weights for Imagenette in both."""
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("shared_models", shared / "models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = load_file(shared / "data" / "weights" / "mobilenet_v2_imagenette.safetensors")
    model = module.mobilenet_v2().eval()
    model.load_state_dict(state)
    twin = keras.applications.MobileNetV2(weights=None, input_shape=(SIDE, SIDE, 3), classes=10, classifier_activation=None)
    return model, twin, take_weights(twin, {name: x.numpy() for name, x in state.items()})


@pytest.fixture(scope="module")
def untrained() -> tuple[Any, Any, list[Pair]]:
    """Random weights, in torchvision's layers."""
    import torch
    from torchvision import models

    torch.manual_seed(0)
    model = models.mobilenet_v2(num_classes=10).eval()
    twin = keras.applications.MobileNetV2(weights=None, input_shape=(SIDE, SIDE, 3), classes=10, classifier_activation=None)
    return model, twin, take_weights(twin, {name: x.numpy() for name, x in model.state_dict().items()})


def planned(model: Any, example: Any, part: float) -> Plan:
    coupling = coppice.couple(coppice.capture(model, example))
    return coppice.plan(coupling, coppice.score(model, coupling, "l1"), {"macs": part * coupling.cost().macs})


def kept(plan: Plan, name: str, shape: tuple[int, ...]) -> list[Mask]:
    """Which indices stay, dim by dim; all where the plan does not change the weight."""
    return list(plan.changed().get(name) or [np.ones(n, bool) for n in shape])


@needs_torch
@pytest.mark.parametrize("twins", ["trained", "untrained"])
def test_the_same_indices_stay(twins: str, request: pytest.FixtureRequest) -> None:
    """Data-free, to the same target."""
    import torch

    model, twin, pairs = request.getfixturevalue(twins)
    for part in (0.75, 0.5):
        ours = planned(model, torch.zeros(1, 3, SIDE, SIDE), part)
        theirs = planned(twin, (1, SIDE, SIDE, 3), part)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        cut = 0
        for pair in pairs:
            shape = tuple(tensors[pair.torch].shape)
            want = [kept(ours, pair.torch, shape)[dim] for dim in pair.order]
            have = kept(theirs, pair.keras, tuple(shape[dim] for dim in pair.order))
            assert all(np.array_equal(a, b) for a, b in zip(want, have, strict=True)), pair
            cut += not all(mask.all() for mask in have)
        assert cut > 100


@needs_torch
def test_the_same_answers(trained: tuple[Any, Any, list[Pair]]) -> None:
    import torch

    model, twin, _ = trained
    x = np.random.default_rng(0).uniform(-1, 1, (4, SIDE, SIDE, 3)).astype("float32")
    with torch.no_grad():
        want = model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    assert np.abs(twin.predict_on_batch(x) - want).max() < 1e-4 * np.abs(want).max()


def test_real_weights_see_real_images(shared: Path) -> None:
    """On every backend: what the MobileNetV2 for Imagenette says of one image a class."""
    from coppice.keras.data import load_images
    from coppice.keras.evaluate import evaluate
    from coppice.preprocess import Preprocess

    data = load_images(str(shared / "data" / "imagenette224"), Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3))
    one_a_class = np.unique(data.test.labels, return_index=True)[1]
    model = mobilenet_v2(shared / "data" / "weights" / "mobilenet_v2_imagenette.safetensors")
    assert evaluate(model, data.test.subset(one_a_class)).top1 >= 90
