"""A subclassed model as a Functional one: its own code is called once on symbols, and so are the layers of the user's that hold layers.

The layers and their weights are the same objects. What that can't catch is found out by comparing: weights that no layer of the recording
holds, code that takes another way while training, outputs that are others.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from coppice.errors import CoppiceError
from coppice.keras.walk import is_plain, require_plain

TOLERANCE = 1e-5  # of the largest output
OWN_STEPS = ("train_step", "test_step", "compute_loss")  # what a subclass may do in its own way, and a Functional model would not


def plain(model: Any) -> Any:
    """The model itself where it is Sequential or Functional, else as a Functional one."""
    if is_plain(model):
        require_plain(model)
        return model
    return as_functional(model)


def as_functional(model: Any, example: Any = None) -> Any:
    """The Functional model that computes what a subclassed one does, with the same layers and weights.

    ``example``: an array, a shape with the batch, or a list of these; the shapes that the model was built with, without it. CoppiceError
    where the model's code is more than calls of layers and of `keras.ops`.
    """
    name = type(model).__name__
    if is_plain(model):
        return model
    own = [step for step in OWN_STEPS if getattr(type(model), step) is not getattr(keras.Model, step)]
    if own:
        raise CoppiceError(f"{name} has its own {own[0]}, which a Functional model does not: write it as one, with the loss in compile")
    shapes = _shapes(model, example)
    try:
        _answer(model, [np.zeros(shape, "float32") for shape in shapes])  # layers that are not built yet are built
        found, training = (_recorded(model, shapes, mode) for mode in (None, True))
    except Exception as error:  # whatever the user's code meets on symbols
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CoppiceError(
            f"{name} is a subclassed Keras model whose code can't be followed ({lines[0][:160]}): write it with layers and keras.ops only"
        ) from error
    _check(model, found, training, shapes)
    if model.compiled:
        found.compile_from_config(model.get_compile_config())
    return found


def _shapes(model: Any, example: Any) -> list[tuple[int, ...]]:
    """Those of the example's inputs, or those that the model was built with."""
    if example is None:
        example = (model.get_build_config() or {}).get("input_shape")
        if example is None:
            raise CoppiceError(f"{type(model).__name__} is a subclassed Keras model that was never built: call it once on an input")
    one = hasattr(example, "shape") or all(n is None or isinstance(n, int) for n in example)
    shapes = [tuple(getattr(part, "shape", part)) for part in ([example] if one else example)]
    open_ones = [shape for shape in shapes if any(n is None for n in shape[1:])]
    if open_ones:
        raise CoppiceError(f"{type(model).__name__} was built with inputs of the shape {open_ones[0]}: call it on an input of a known size")
    return [(2, *map(int, shape[1:])) for shape in shapes]


def _given(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 else list(parts)


def _recorded(model: Any, shapes: Sequence[tuple[int, ...]], training: bool | None) -> Any:
    """The Functional model of what the code does, told that it trains, or not told."""
    inputs = [keras.Input(shape[1:]) for shape in shapes]
    found = keras.Model(_given(inputs), _called(model, training, [_given(inputs)], {}))
    while any(_is_composite(layer) for layer in found.layers):
        found = keras.models.clone_model(
            found,
            clone_function=lambda layer: layer,
            call_function=lambda layer, *args, **kwargs: (
                _called(layer, training, args, kwargs) if _is_composite(layer) else layer(*args, **kwargs)
            ),
        )
    return found


def _called(layer: Any, training: bool | None, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What its own code answers; a default of that code for ``training`` is not what Keras would tell it."""
    if "training" in inspect.signature(layer.call).parameters and kwargs.get("training") is None:
        kwargs = {**kwargs, "training": training}
    return layer.call(*args, **kwargs)


def _is_composite(layer: Any) -> bool:
    """A layer of the user's that is made of others, and has no weights of its own."""
    users = not type(layer).call.__module__.startswith("keras.src.")
    return users and bool(layer._layers) and not layer._trainable_variables and not layer._non_trainable_variables


def _check(model: Any, found: Any, training: Any, shapes: Sequence[tuple[int, ...]]) -> None:
    name = type(model).__name__
    held = {id(weight) for weight in found.weights}
    lost = [weight.path for weight in model.weights if id(weight) not in held]
    if lost:
        raise CoppiceError(
            f"{name} is a subclassed Keras model whose code uses {lost[0]} outside of a layer, or never: put it into a layer"
        )
    kinds = [[type(operation).__name__ for operation in one.operations] for one in (found, training)]
    if kinds[0] != kinds[1]:
        raise CoppiceError(f"{name} is a subclassed Keras model whose code does something else while training: leave that to its layers")
    generator = np.random.default_rng(0)
    inputs = [generator.standard_normal(shape).astype("float32") for shape in shapes]
    have, want = _answer(found, inputs), _answer(model, inputs)
    for a, b in zip(have, want, strict=True):
        if a.shape != b.shape or not np.abs(a - b).max() <= TOLERANCE * max(float(np.abs(b).max()), 1e-12):
            raise CoppiceError(f"{name} is a subclassed Keras model whose code does not answer the same twice: write it with layers only")


def _answer(model: Any, inputs: Sequence[Any]) -> list[Any]:
    outputs = model(_given([keras.ops.convert_to_tensor(x) for x in inputs]), training=False)
    return [np.asarray(keras.ops.convert_to_numpy(x)) for x in keras.tree.flatten(outputs)]
