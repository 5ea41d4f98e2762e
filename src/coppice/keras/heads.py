"""What a classifier ends with: probabilities or not, and so which loss it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from coppice.errors import CoppiceError
from coppice.keras.walk import function_of, is_plain


def _last(model: Any, prefix: str = "") -> tuple[str, Any]:
    """The layer that gives the model's only output, and its path."""
    outputs = function_of(model).outputs
    if len(outputs) != 1:
        raise CoppiceError(f"the model has {len(outputs)} outputs; a classifier has one")
    layer = outputs[0]._keras_history.operation
    path = f"{prefix}{layer.name}"
    return _last(layer, f"{path}/") if is_plain(layer) else (path, layer)


def activation_of(model: Any) -> str:
    """The name of the function that the model ends with; "linear" where it has none."""
    _, layer = _last(model)
    if isinstance(layer, keras.layers.Softmax) or type(layer).__name__ == "Softmax":
        return "softmax"
    return str(getattr(getattr(layer, "activation", None), "__name__", "linear"))


def without_softmax(model: Any) -> dict[str, dict[str, str]]:
    """What to change in the model's configuration so that it answers what goes into its softmax."""
    path, layer = _last(model)
    if activation_of(model) != "softmax":
        return {}
    if not hasattr(layer, "activation"):
        raise CoppiceError(f"{path} is a softmax of its own, which can't be left out: end with activation='softmax' of the layer before it")
    return {path: {"activation": "linear"}}


def loss_of(model: Any) -> Callable[[Any, Any], Any]:
    """``(outputs, targets) -> loss``: what the model was compiled with, else cross-entropy of whole-number targets."""
    if model.compiled and model.loss is not None:
        return lambda outputs, targets: model.compute_loss(y=keras.ops.convert_to_tensor(targets), y_pred=outputs, training=False)
    ends = activation_of(model)
    if function_of(model).outputs[0].shape[-1] == 1:
        binary = keras.losses.BinaryCrossentropy(from_logits=ends != "sigmoid")
        return lambda outputs, targets: binary(keras.ops.convert_to_tensor(targets), outputs)
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=ends != "softmax")
    return lambda outputs, targets: crossentropy(keras.ops.convert_to_tensor(targets), outputs)
