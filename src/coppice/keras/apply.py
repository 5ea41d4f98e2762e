"""Apply a plan to a Keras model: an ordinary one, built from the edited configuration, with the weights that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.coupling import Mask
from coppice.errors import CoppiceError
from coppice.keras.walk import assign, numbers, require_plain, variables_of
from coppice.masking import fitting, unpacked
from coppice.planning import Plan

UNKNOWN = -1  # stands, among the sizes of a plan, for what Keras leaves open
Weights = Mapping[str, NDArray[Any]]


def apply(model: Any, plan: Plan) -> Any:
    """A smaller model of the same layers: the plan's indices stay. ``model`` is left as it is; loss, metrics, optimiser state go along."""
    if plan.removed is not None or plan.then is not None:
        raise CoppiceError("plans that remove modules work on PyTorch models only")
    pruned = build(model, plan, kept_weights(model, plan))
    compile_alike(model, pruned, plan)
    return pruned


def build(model: Any, plan: Plan | None, weights: Weights) -> Any:
    """The model that ``plan`` makes of ``model``, with these weights, by name."""
    require_plain(model)
    pruned = rebuilt(model, {} if plan is None else plan.attributes)
    variables = variables_of(pruned)
    if variables.keys() != weights.keys():
        name = min(variables.keys() ^ weights.keys())
        raise CoppiceError(f"the weights are those of another model: {name} is in one of them only")
    for name, variable in variables.items():
        if tuple(variable.shape) != weights[name].shape:
            raise CoppiceError(f"{name} has the shape {weights[name].shape}, the model's is {tuple(variable.shape)}")
    assign(pruned, weights)
    return pruned


def weights_in(model: Any) -> dict[str, NDArray[Any]]:
    """A copy of every weight by name."""
    return {name: numbers(variable) for name, variable in variables_of(model).items()}


def kept_weights(model: Any, plan: Plan) -> dict[str, NDArray[Any]]:
    """Every weight of the model, the changed ones restricted to what stays, the masked ones zero."""
    weights, changed = weights_in(model), plan.changed()
    for name in plan.tensors:
        if name not in weights:
            raise CoppiceError(f"the plan names {name}, which this model does not have; give the model that the plan was made for")
    for name, masks in changed.items():
        if tuple(m.size for m in masks) != weights[name].shape:
            raise CoppiceError(
                f"the plan was made for {name} of another shape than {weights[name].shape}; give the model that it was made for"
            )
    return zeroed({name: sliced(array, changed[name]) if name in changed else array for name, array in weights.items()}, plan)


def zeroed(weights: Weights, plan: Plan) -> dict[str, NDArray[Any]]:
    """These weights with zeros where ``plan``, which leaves weights of these shapes, masks them."""
    masks = fitting(unpacked(plan), {name: array.shape for name, array in weights.items()})
    return {name: np.where(masks[name], array, np.zeros((), array.dtype)) if name in masks else array for name, array in weights.items()}


def sliced(array: NDArray[Any], masks: Sequence[Mask]) -> NDArray[Any]:
    """``array`` restricted to the indices whose mask is True, dim by dim."""
    for dim, mask in enumerate(masks):
        if not mask.all():
            array = array.take(np.flatnonzero(mask), axis=dim)
    return array


def rebuilt(model: Any, attributes: Mapping[str, Mapping[str, Any]], edit: Callable[[dict[str, Any]], None] | None = None) -> Any:
    """A model of the same layers with these fields of their configurations (by path) changed, and new weights; ``edit`` sees all of it."""
    config = model.get_config()
    for path, values in attributes.items():
        found = _config_at(config, path.split("/"))
        for key, value in values.items():
            found[key] = (
                [None if n == UNKNOWN and key == "batch_shape" else n for n in value] if isinstance(value, (list, tuple)) else value
            )
    _forget_shapes(config)
    if edit is not None:
        edit(config)
    return type(model).from_config(config)


def _config_at(config: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The configuration of the layer at ``path``."""
    for name in path:
        found = next((entry["config"] for entry in config.get("layers", ()) if entry["config"].get("name") == name), None)
        if found is None:
            raise CoppiceError(f"the plan names the layer {'/'.join(path)}, which this model does not have")
        config = found
    return config


def _forget_shapes(config: Any) -> None:
    """The shapes that layers were built with are those of the dense model; they are built anew when they are connected."""
    if isinstance(config, dict):
        config.pop("build_config", None)
        for entry in config.values():
            _forget_shapes(entry)
    elif isinstance(config, (list, tuple)):
        for entry in config:
            _forget_shapes(entry)


def compile_alike(model: Any, pruned: Any, plan: Plan) -> None:
    """The same loss, metrics and optimiser, its state restricted to what stays."""
    if not model.compiled:
        return
    pruned.compile_from_config(model.get_compile_config())
    old = model.optimizer
    if old is None or not old.built:
        return
    pruned.optimizer.build(pruned.trainable_variables)
    carry_state(old, pruned.optimizer, model, plan)


def carry_state(old: Any, new: Any, model: Any, plan: Plan) -> None:
    """Give an optimiser, built over what ``plan`` makes of ``model``, the state of the one of ``model``, restricted to what stays."""
    names = {id(v): name for name, v in variables_of(model).items()}
    changed = plan.changed()
    for slot, fresh in zip(old.variables, new.variables, strict=True):
        array = numbers(slot)
        if tuple(fresh.shape) != array.shape:
            owner = _owner(slot, array.shape, model.weights)
            array = sliced(array, changed[names[id(owner)]])
        fresh.assign(array)


def _owner(slot: Any, shape: tuple[int, ...], variables: Sequence[Any]) -> Any:
    """The variable that a slot of an optimiser belongs to: Keras names the one after the other."""
    stem = slot.path.rpartition("/")[2]
    owners = [v for v in variables if tuple(v.shape) == shape and stem.startswith(v.path.replace("/", "_"))]
    if not owners:
        raise CoppiceError(f"the optimiser's {slot.path} belongs to no variable of the model: compile the pruned model anew")
    return max(owners, key=lambda v: len(v.path))
