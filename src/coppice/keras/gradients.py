"""Gradients for criteria, through whatever backend Keras runs: one backward pass a calibration batch, in inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError
from coppice.keras.apply import rebuilt
from coppice.keras.heads import loss_of, without_softmax
from coppice.keras.verify import DOUBLE, in_double_precision, in_precision
from coppice.keras.walk import assign, layers_of, numbers, trained, weights_of

Array = NDArray[Any]
Loss = Callable[[Any, Any], Any]


def parameters_of(model: Any) -> dict[str, Any]:
    """What training changes, by name: a shared one once."""
    found: dict[int, tuple[str, Any]] = {}
    for path, layer in layers_of(model):
        learned = trained(layer)
        for name, variable in weights_of(path, layer).items():
            if id(variable) in learned and "float" in str(variable.dtype):
                found.setdefault(id(variable), (name, variable))
    return dict(found.values())


def gradients(model: Any, batches: Iterable[Any], loss: Loss | None) -> Iterator[dict[str, tuple[Array, Array]]]:
    """For each of ``batches`` of ``(inputs, targets)``, (weight, gradient) of every parameter that got one.

    ``loss(outputs, targets)`` is the one that the model was compiled with where None, else cross-entropy. CoppiceError where there is no
    batch or a loss is not finite.
    """
    parameters = parameters_of(model)
    weights = {name: numbers(v).astype(np.float32) for name, v in parameters.items()}
    count = 0
    for inputs, targets in batches:
        on_targets = partial(_swapped, loss or loss_of(model), targets)
        value, slopes = _backward(model, list(parameters.values()), keras.ops.convert_to_tensor(inputs), on_targets)
        if not np.isfinite(value):
            raise CoppiceError(f"the loss on calibration batch {count} is {value}; check the weights and the preprocessing")
        yield {name: (weights[name], g) for name, g in zip(parameters, slopes, strict=True) if g is not None}
        count += 1
    if not count:
        raise CoppiceError("there are no calibration batches; give at least one image")


def _swapped(loss: Loss, targets: Any, outputs: Any) -> Any:
    return loss(outputs, targets)


def synaptic_flow(model: Any, shapes: Sequence[tuple[int, ...]]) -> dict[str, Array]:
    """|w dR/dw| of every parameter, where R sums the outputs (before a softmax) of a copy with |w| for w on inputs of ones.

    A BatchNormalization scales what flows and takes no mean away: a trained one's would stop the flow of a channel that is needed.
    """
    with in_double_precision():
        copied = in_precision(rebuilt_like(model), DOUBLE)
        learned = parameters_of(copied)
        arrays = {name: np.abs(numbers(v)) for name, v in learned.items()}
        for path, layer in layers_of(copied):
            if isinstance(layer, keras.layers.BatchNormalization):
                arrays |= {name: np.zeros(w.shape) for name, w in weights_of(path, layer).items() if w is layer.moving_mean}
        assign(copied, arrays)
        ones = [keras.ops.ones(shape, dtype=DOUBLE) for shape in shapes]
        _, slopes = _backward(copied, list(learned.values()), ones[0] if len(ones) == 1 else ones, keras.ops.sum)
    return {
        name: np.zeros(v.shape) if g is None else np.abs(arrays[name] * g) for (name, v), g in zip(learned.items(), slopes, strict=True)
    }


def rebuilt_like(model: Any) -> Any:
    """A copy of the model that ends before its softmax."""
    copied = rebuilt(model, without_softmax(model))
    assign(copied, {name: numbers(v) for name, v in zip(_names(copied), _variables(model), strict=True)})
    return copied


def _names(model: Any) -> list[str]:
    return [name for path, layer in layers_of(model) for name in weights_of(path, layer)]


def _variables(model: Any) -> list[Any]:
    return [v for path, layer in layers_of(model) for v in weights_of(path, layer).values()]


def _backward(model: Any, variables: Sequence[Any], inputs: Any, loss: Callable[[Any], Any]) -> tuple[float, list[Array | None]]:
    """The loss of the model's outputs, and its slope for each of the variables (None: there is none)."""
    backend = {"tensorflow": _in_tensorflow, "jax": _in_jax, "torch": _in_torch}.get(keras.backend.backend())
    if backend is None:
        raise CoppiceError("gradients can be had on the backends of TensorFlow, JAX and PyTorch only: set KERAS_BACKEND to one of them")
    value, slopes = backend(model, variables, inputs, loss)
    return float(keras.ops.convert_to_numpy(value)), [None if g is None else np.array(keras.ops.convert_to_numpy(g)) for g in slopes]


def _in_tensorflow(model: Any, variables: Sequence[Any], inputs: Any, loss: Callable[[Any], Any]) -> tuple[Any, Any]:
    import tensorflow as tf

    watched = [v.value for v in variables]
    with tf.GradientTape() as tape:
        tape.watch(watched)
        value = loss(model(inputs, training=False))
    return value, [g if g is None else tf.convert_to_tensor(g) for g in tape.gradient(value, watched)]


def _in_jax(model: Any, variables: Sequence[Any], inputs: Any, loss: Callable[[Any], Any]) -> tuple[Any, Any]:
    import jax

    places = {id(v): k for k, v in enumerate(variables)}
    trainable, fixed = model.trainable_variables, model.non_trainable_variables

    def forward(arrays: Sequence[Any]) -> Any:
        given = [[arrays[places[id(v)]] if id(v) in places else v.value for v in own] for own in (trainable, fixed)]
        outputs, _ = model.stateless_call(*given, inputs, training=False)
        return loss(outputs)

    value, slopes = jax.value_and_grad(forward)([v.value for v in variables])
    return value, slopes


def _in_torch(model: Any, variables: Sequence[Any], inputs: Any, loss: Callable[[Any], Any]) -> tuple[Any, Any]:
    import torch

    tensors = [v.value for v in variables]
    frozen = [t for t in tensors if not t.requires_grad]
    try:
        for tensor in frozen:
            tensor.requires_grad_(True)
        value = loss(model(inputs, training=False))
        return value.detach(), torch.autograd.grad(value, tensors, allow_unused=True)
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
