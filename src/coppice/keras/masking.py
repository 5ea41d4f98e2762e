"""Masks on a Keras model: made, held through training or growing with it.

They are held by a constraint on each masked variable, which Keras's optimisers apply within their own step: compiled with it on every
backend, whatever momentum, weight decay or an average of the weights make of a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from keras import ops

from coppice.coupling import Coupling, Mask
from coppice.errors import CoppiceError
from coppice.keras.apply import build, compile_alike, weights_in
from coppice.keras.callbacks import Along
from coppice.keras.walk import assign, numbers, variables_of
from coppice.masking import chosen, due, fitting, plan_of, sites_for
from coppice.masks import MaskRecipe, Site, choose, cubic
from coppice.planning import Plan


def check_masks(recipe: MaskRecipe) -> None:
    """CoppiceError for what only PyTorch models can be masked by."""
    if recipe.criterion == "movement":
        raise CoppiceError("masks by movement work on PyTorch models only: let them grow by magnitude")


def mask(model: Any, coupling: Coupling, recipe: MaskRecipe, batches: Iterable[Any] | None = None, seed: int = 0) -> tuple[Any, Plan]:
    """What `coppice.mask` says."""
    check_masks(recipe)
    where, masked = sites_for(coupling, recipe, batches), build(model, None, weights_in(model))
    compile_alike(model, masked, plan_of(coupling, {}))
    masks = chosen(masked, coupling, where, recipe, batches, seed)
    _zero(masked, masks)
    return masked, plan_of(coupling, masks)


class Hold:
    """Masks at work, until they are removed; also a context."""

    def __init__(self, model: Any, gone: Mapping[str, Callable[[], Any]]) -> None:
        """``gone``: by name of a weight what answers, within a step of an optimiser, where it is zero."""
        self._model = model
        self._before = []
        variables = variables_of(model)
        for name, where in gone.items():
            self._before.append((variables[name], variables[name].constraint))
            variables[name].constraint = _Zeros(where, variables[name].constraint)
        model.train_function = None  # an earlier `fit` may have compiled a step without them

    def remove(self) -> None:
        for variable, before in self._before:
            variable.constraint = before
        self._before = []
        self._model.train_function = None

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Zeros:
    """A constraint of the model's own, if it has one, and zeros."""

    def __init__(self, gone: Callable[[], Any], before: Any) -> None:
        self._gone, self._before = gone, before

    def __call__(self, variable: Any) -> Any:
        value = ops.convert_to_tensor(variable if self._before is None else self._before(variable))
        return ops.where(self._gone(), ops.zeros_like(value), value)


def hold_masks(model: Any, masks: Mapping[str, Mask]) -> Hold:
    """What `coppice.hold_masks` says."""
    fitting(masks, {name: tuple(variable.shape) for name, variable in variables_of(model).items()})
    _zero(model, masks)
    return Hold(model, {name: partial(ops.convert_to_tensor, ~found) for name, found in masks.items()})


def _zero(model: Any, masks: Mapping[str, Mask]) -> None:
    variables = variables_of(model)
    assign(model, {name: np.where(found, numbers(variables[name]), 0) for name, found in masks.items()})


class Growing(Along):
    """Masks that grow while the model trains for so many steps, by the cubic curve and by magnitude.

    They are chosen anew a hundred times; in between they are held. What was zero has no magnitude to come back by. They lie among the
    optimiser's variables: a compiled step reads them there, and a checkpoint has them.
    """

    def __init__(self, model: Any, where: Sequence[Site], recipe: MaskRecipe, steps: int) -> None:
        super().__init__()
        check_masks(recipe)
        self._student, self._where, self._recipe, self._steps = model, list(where), recipe, steps
        self._gone: dict[str, Any] = {}
        self._hold: Hold | None = None

    def joins(self, optimizer: Any) -> None:
        for k, site in enumerate(self._where):
            self._gone[site.name] = optimizer.add_variable(site.shape, "zeros", "bool", name=f"gone{k}")
        self._hold = Hold(self._student, {name: partial(ops.convert_to_tensor, gone) for name, gone in self._gone.items()})

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.done += 1
        share = due(self._recipe, self.done, self._steps)
        if share is not None:
            self.in_sync()
            self._choose(share)

    def finish(self) -> dict[str, Mask]:
        """The masks at the sparsity that was asked for; they are held no longer."""
        if cubic(self._recipe.sparsity, self.done, self._steps) < self._recipe.sparsity:
            self._choose(self._recipe.sparsity)
        masks = self._masks()
        _zero(self._student, masks)
        if self._hold is not None:
            self._hold.remove()
        return masks

    def said(self) -> str:
        masks = self._masks().values()
        zeros = sum(int((~found).sum()) for found in masks) / sum(found.size for found in masks)
        return f"{100 * zeros:.1f} % of the weights are zero"

    def _masks(self) -> dict[str, Mask]:
        return {name: ~numbers(gone) for name, gone in self._gone.items()}

    def _choose(self, share: float) -> None:
        variables = variables_of(self._student)
        scores = {site.name: np.abs(numbers(variables[site.name]).astype(np.float64)) for site in self._where}
        masks = choose(scores, self._where, MaskRecipe(share, scope=self._recipe.within))
        for name, found in masks.items():
            self._gone[name].assign(~found)
        _zero(self._student, masks)
