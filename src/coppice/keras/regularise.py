"""Regularised training of a Keras model (`coppice.shrinking`): where its weights lie, on any backend, and a callback that shrinks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.keras.callbacks import Along
from coppice.keras.walk import layers_of, trained, variables_of
from coppice.planning import Plan
from coppice.saliency import Array
from coppice.shrinking import Shrinking, nothing_to_scale, places, prepared, starts


@dataclass(frozen=True, slots=True)
class _Site:
    """A dim of a weight, and for each of its positions the group that lies there, -1 for none."""

    variable: Any
    dim: int
    groups: Array
    makes: bool

    def sums(self, elements: Any, total: Array) -> None:
        """Add up `elements`, of the weight's shape, by group."""
        valid = self.groups >= 0
        np.add.at(total, self.groups[valid], self._line(elements)[valid])

    def sizes(self) -> Array:
        """The norm at each position of the dim."""
        return np.sqrt(self._line(ops.square(_value(self.variable))))

    def cap(self, sizes: Array) -> None:
        """No position's norm above its size."""
        now = self.sizes()
        above = (self.groups >= 0) & (now > sizes)
        line = np.where(above, sizes / np.where(above, now, 1.0), 1.0)
        self.variable.assign(_value(self.variable) * self._shaped(line))

    def along(self, by_group: Array, otherwise: float) -> Any:
        """The numbers of the groups, laid along the weight's dim."""
        line = np.where(self.groups >= 0, by_group[np.maximum(self.groups, 0)], otherwise)
        return self._shaped(line)

    def _line(self, elements: Any) -> Array:
        others = [d for d in range(len(elements.shape)) if d != self.dim]
        return np.asarray(ops.convert_to_numpy(ops.sum(elements, axis=others) if others else elements).astype(np.float64))

    def _shaped(self, line: Array) -> Any:
        shape = [-1 if d == self.dim else 1 for d in range(len(self.variable.shape))]
        return ops.convert_to_tensor(line.reshape(shape), dtype=self.variable.dtype)


class _Weights:
    """`coppice.shrinking.Weights` of a Keras model."""

    def __init__(self, model: Any, coupling: Coupling, kind: str) -> None:
        variables = variables_of(model)
        learned = set().union(*(trained(layer) for _, layer in layers_of(model) if layer.trainable))
        known = [place for place in places(coupling, kind) if id(variables[place.name]) in learned]
        self._sites = [_Site(variables[place.name], place.dim, place.groups, place.makes) for place in known]
        if not self._sites:
            raise nothing_to_scale(kind)
        self._groups = int(starts(coupling)[-1])
        self._began = [(site, site.sizes()) for site in self._sites if site.makes]
        self._means = [float(ops.convert_to_numpy(ops.mean(ops.abs(_value(site.variable))))) for site in self._sites]

    def count(self) -> Array:
        return self._by_group(ops.ones_like)

    def squares(self) -> Array:
        return self._by_group(lambda x: ops.square(ops.cast(x, "float32")))

    def scale(self, factors: Array) -> None:
        for site in self._sites:
            site.variable.assign(_value(site.variable) * site.along(factors, 1.0))

    def scale_filters(self, factors: Array) -> None:
        for site in self._sites:
            if site.makes:
                site.variable.assign(_value(site.variable) * site.along(factors, 1.0))

    def cap_filters(self) -> None:
        for site, sizes in self._began:
            site.cap(sizes)

    def soften(self, limits: Array) -> None:
        for site, mean in zip(self._sites, self._means, strict=True):
            x = _value(site.variable)
            site.variable.assign(ops.sign(x) * ops.maximum(ops.abs(x) - site.along(limits * mean, 0.0), 0))

    def _by_group(self, elements: Callable[[Any], Any]) -> Array:
        total = np.zeros(self._groups)
        for site in self._sites:
            site.sums(elements(_value(site.variable)), total)
        return total


def _value(variable: Any) -> Any:
    return ops.stop_gradient(variable.value)


class Regulariser(Along):
    """A callback for `model.fit`, with any loss and optimiser; `said()` says how far it is, `plan()` makes a plan of what it shrank.

    Made by :func:`regulariser`, which is told how many steps there will be.
    """

    def __init__(self, shrinking: Shrinking) -> None:
        super().__init__()
        self.shrinking = shrinking
        self.kind, self.strength = shrinking.kind, shrinking.strength
        self.plan, self.scores = shrinking.plan, shrinking.scores

    def said(self) -> str:
        return self.shrinking.said()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.in_sync()
        self.shrinking.shrink(self.done)
        self.done += 1


def regulariser(
    model: Any,
    coupling: Coupling,
    kind: str = "group-lasso",
    *,
    steps: int,
    target: Mapping[str, float] | None = None,
    strength: float | str = "auto",
    round_to: int = 8,
    min_width: int = 8,
) -> Regulariser:
    """A regulariser for a `model.fit` of `steps` steps. The options are those of `coppice.regulariser`."""

    def make(given: float | None, plan: Plan | None) -> Shrinking:
        return Shrinking(_Weights(model, coupling, kind), coupling, kind, given, steps, plan)

    if not any(layer.trainable for _, layer in layers_of(model)):
        raise CoppiceError("nothing of the model is trained: every layer is frozen")
    return Regulariser(prepared(make, coupling, kind, steps, target, strength, round_to, min_width))
