"""The front-end of a model, found by what it is: Keras (on any backend) or PyTorch. Neither is imported before a model of it is there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from coppice.coupling import Coupling
from coppice.graph import Graph
from coppice.planning import Plan
from coppice.targets import Target

if TYPE_CHECKING:
    from coppice.verification import Verification


def is_keras(model: Any) -> bool:
    """Whether ``model`` is a Keras model; with the PyTorch backend it is a module of PyTorch as well."""
    keras = sys.modules.get("keras")
    return keras is not None and hasattr(keras, "Model") and isinstance(model, keras.Model)


def capture(model: Any, inputs: Any, values: bool = False) -> Graph:
    """The recorded graph of a model. PyTorch: example inputs (a tensor or a tuple of them); Keras: arrays, or shapes with the batch.

    ``values``: compute while recording, not only shapes; a Keras model never needs it.
    """
    if is_keras(model):
        from coppice.keras.capture import capture as record

        return record(model, inputs)
    from coppice.torch.capture import capture as record_torch

    return record_torch(model, inputs, values)


def apply(model: Any, plan: Plan) -> Any:
    """A smaller copy of ``model``: the plan's indices stay. ``model`` is left as it is."""
    if is_keras(model):
        from coppice.keras.apply import apply as build

        return build(model, plan)
    from coppice.torch.apply import apply as build_torch

    return build_torch(model, plan)


def prune(model: Any, data: Any, target: Any = Target(), **options: Any) -> Any:
    """Prune a trained classifier to a target and a floor on accuracy: `coppice.loop.prune`, or `coppice.keras.loop.prune`."""
    if is_keras(model):
        from coppice.keras.loop import prune as prune_keras

        return prune_keras(model, data, target, **options)
    from coppice.loop import prune as prune_torch

    return prune_torch(model, data, target, **options)


def verify(model: Any, pruned: Any, coupling: Coupling, plan: Plan) -> Verification:
    """Prove that ``pruned`` computes what ``plan`` makes of ``model``. VerificationError names the op, module and axes."""
    if is_keras(model):
        from coppice.keras.verify import verify as check

        return check(model, pruned, coupling, plan)
    from coppice.torch.verify import verify as check_torch

    return check_torch(model, pruned, coupling, plan)
