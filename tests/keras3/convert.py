"""The weights of a PyTorch model in its Keras twin: the same layers with weights, in the same order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from coppice.keras.walk import assign, layers_of, weights_of

Array = NDArray[Any]
BATCH_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
ORDERS = {  # kind of the Keras layer -> which dim of the PyTorch weight each dim of its kernel is
    "Conv2D": (2, 3, 1, 0),
    "DepthwiseConv2D": (2, 3, 0, 1),  # PyTorch has one filter a group: (channels, multiplier, h, w) with a multiplier of 1
    "Dense": (1, 0),
}


@dataclass(frozen=True)
class Pair:
    """One weight of both models: ``order[k]`` is the dim of the PyTorch tensor that dim k of the Keras one is."""

    torch: str
    keras: str
    order: tuple[int, ...]


def pairs(state: Mapping[str, Array], model: Any) -> list[Pair]:
    """Which weight is which. ValueError where the two models don't have the same layers."""
    modules: dict[str, dict[str, Array]] = {}
    for name in sorted(state, key=_place):
        module, _, own = name.rpartition(".")
        if own != "num_batches_tracked":
            modules.setdefault(module, {})[own] = state[name]
    layers = [(path, layer) for path, layer in layers_of(model) if layer.weights]
    if len(layers) != len(modules):
        raise ValueError(f"{len(modules)} layers with weights in PyTorch, {len(layers)} in Keras")
    found = []
    for (path, layer), (module, tensors) in zip(layers, modules.items(), strict=True):
        kind = type(layer).__name__
        names = BATCH_NORM if kind == "BatchNormalization" else {"weight": "kernel", "bias": "bias"}
        weights = weights_of(path, layer)
        if {f"{path}/{names[own]}" for own in tensors} != weights.keys():
            raise ValueError(f"{module} has {list(tensors)}, {path} has {list(weights)}")
        for own, array in tensors.items():
            order = ORDERS[kind] if names[own] == "kernel" else (0,)
            if array.transpose(order).shape != tuple(weights[f"{path}/{names[own]}"].shape):
                raise ValueError(f"{module}.{own} has the shape {array.shape}, which is not that of {path}")
            found.append(Pair(f"{module}.{own}", f"{path}/{names[own]}", order))
    return found


def _place(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Names in the order of the model, whatever the order in the file: numbers as numbers, the head last."""
    parts = name.split(".")
    return parts[0] == "classifier", [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def take_weights(model: Any, state: Mapping[str, Array]) -> list[Pair]:
    """Set the weights of a Keras model to those of its PyTorch twin."""
    found = pairs(state, model)
    assign(model, {pair.keras: np.asarray(state[pair.torch]).transpose(pair.order) for pair in found})
    return found


def mobilenet_v2(weights: Path, side: int = 224, activation: str | None = "softmax") -> Any:
    """keras.applications.MobileNetV2 for 10 classes with the weights of a .safetensors file. Input: RGB/127.5 - 1."""
    from safetensors.numpy import load_file

    model = keras.applications.MobileNetV2(weights=None, input_shape=(side, side, 3), classes=10, classifier_activation=activation)
    take_weights(model, load_file(weights))
    return model
