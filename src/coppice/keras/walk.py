"""The layers of a Keras model by path and their variables by name: ``stem/conv`` and ``stem/conv/kernel``.

Keras's own variable paths leave out nested models, so two of them may clash; these names follow the nesting of the model. The same walk
over the dense and the pruned model gives the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError

PLAIN = (keras.Sequential, type(keras.Model(inputs=(_x := keras.Input((1,))), outputs=_x)))  # Sequential and Functional, not their heirs
_COUNTED = re.compile(r"variable(_\d+)?")


def is_plain(model: Any) -> bool:
    """Whether ``model`` is a Sequential or Functional model, made of layers and rebuilt from its configuration."""
    return type(model) in PLAIN


def require_plain(model: Any) -> None:
    """CoppiceError where the model is none whose structure can be read and rebuilt."""
    if not is_plain(model):
        raise CoppiceError(
            f"{type(model).__name__} is a subclassed Keras model, which can't be built at other widths: "
            "give coppice.as_functional(model), or write it as a Functional or Sequential model"
        )
    if function_of(model) is None:
        raise CoppiceError(f"the Keras model {model.name} has not been built: give it an Input, or call it once")
    paths: dict[int, str] = {}
    for path, layer in layers_of(model):
        if paths.setdefault(id(layer), path) != path:
            raise CoppiceError(
                f"{paths[id(layer)]} and {path} are one layer in two nested models, which Keras can't save or build again: "
                "call one nested model in both places"
            )


def function_of(model: Any) -> Any:
    """The graph of a model: itself, or what a Sequential one is made of."""
    return model._functional if isinstance(model, keras.Sequential) else model


def layers_of(model: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every layer that is no nested plain model, by its path; a layer that is used in several places comes under each path."""
    for layer in model.layers:
        path = f"{prefix}{layer.name}"
        if is_plain(layer):
            yield from layers_of(layer, f"{path}/")
        else:
            yield path, layer


def variables_of(model: Any) -> dict[str, Any]:
    """Every weight by its name; a shared one under each of its names."""
    return {name: variable for path, layer in layers_of(model) for name, variable in weights_of(path, layer).items()}


def weights_of(path: str, layer: Any) -> dict[str, Any]:
    """The weights of one layer: with as much of Keras's own path as tells them apart."""
    weights = [w.path.split("/") for w in layer.weights]
    for k, parts in enumerate(weights):
        if _COUNTED.fullmatch(parts[-1]):  # no name was given, and Keras numbers such through all models
            parts[-1] = f"weight{k}"
    for length in range(1, max(map(len, weights), default=1) + 1):
        tails = ["/".join(parts[-length:]) for parts in weights]
        if len(set(tails)) == len(tails):
            break
    else:
        tails = [f"{tail}.{k}" for k, tail in enumerate(tails)]
    return {f"{path}/{tail}": w for tail, w in zip(tails, layer.weights, strict=True)}


def trained(layer: Any) -> set[int]:
    """The ids of the weights of a layer that training would change, frozen ones included; the others are statistics."""
    own = {id(v) for v in layer._trainable_variables}
    return own.union(*(trained(inner) for inner in layer._layers))


def numbers(variable: Any) -> NDArray[Any]:
    """A copy of what a variable holds."""
    return np.array(keras.ops.convert_to_numpy(variable.value))


def assign(model: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Set the weights of these names."""
    for name, variable in variables_of(model).items():
        if name in arrays:
            variable.assign(arrays[name])
    for _, layer in layers_of(model):
        if hasattr(layer, "finalize_state"):  # a normalisation of the inputs works with numbers that it derives from its weights
            layer.finalize_state()
