"""Criteria: how much each element of a parameter matters, and what that says of each index of an axis.

A criterion is a small pure function of a parameter and (for some) its gradient on one batch; it answers a saliency an element, not
negative. The score of an index is the sum over every element that goes with it: in every filter, norm and consumer that the axis lies on.
``obs`` does not look at elements but at what the readers of an axis lose. To add a criterion: ``docs/add-a-criterion.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.axes import Axis, Form, find
from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.graph import Kind

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Scores:
    """The score of every index, by axis id. ``additive``: all axes' scores are in one unit (loss), so they may be weighed against cost."""

    by_axis: Mapping[int, Array]
    additive: bool

    def __getitem__(self, axis: int) -> Array:
        return self.by_axis[axis]


def l1(weight: Array, gradient: Array | None) -> Array:
    """|w|. Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017."""
    return np.abs(weight)


def l2(weight: Array, gradient: Array | None) -> Array:
    """w^2, so that a sum over a filter is its squared L2 norm. He et al., Soft Filter Pruning, IJCAI 2018."""
    return np.square(weight)


def gradient(weight: Array, gradient: Array | None) -> Array:
    """|dL/dw|: gradient magnitude."""
    assert gradient is not None
    return np.abs(gradient)


def taylor(weight: Array, gradient: Array | None) -> Array:
    """(w dL/dw)^2, first-order Taylor. Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, eq. 8."""
    assert gradient is not None
    return np.asarray(np.square(weight * gradient))


@dataclass(frozen=True, slots=True)
class Request:
    """What a criterion may look at. ``batches`` are ``(inputs, targets)``; ``loss(outputs, targets)`` is cross-entropy where None."""

    model: Any
    coupling: Coupling
    batches: Iterable[Any]
    loss: Callable[..., Any] | None
    seed: int

    @property
    def front_end(self) -> Any:
        return self.coupling.graph.origin


ByAxis = dict[int, Array]
Element = Callable[[Array, Array | None], Array]


def of_weights(element: Element) -> Callable[[Request], ByAxis]:
    """Scores from a saliency of each weight."""

    def scores(request: Request) -> ByAxis:
        weights = request.front_end.parameters(request.model)
        return per_index(request.coupling, {name: element(weight, None) for name, weight in weights.items()})

    return scores


def of_gradients(element: Element) -> Callable[[Request], ByAxis]:
    """Scores from a saliency of each weight and its gradient, averaged over the batches."""
    return lambda r: per_index(r.coupling, r.front_end.mean_over_batches(r.model, element, r.batches, r.loss))


def obs(request: Request) -> ByAxis:
    """The loss that removing an index adds when all that reads it is refitted: see ``coppice.torch.elimination``. Needs no labels."""
    found: ByAxis = request.front_end.removal_losses(
        request.model, request.coupling, (inputs for inputs, _ in request.batches), request.seed
    )
    return found


def random(request: Request) -> ByAxis:
    """The control: what any criterion has to beat."""
    rng = np.random.default_rng(request.seed)
    return {axis.id: rng.random(axis.width) for axis in request.coupling.prunable}


@dataclass(frozen=True, slots=True)
class Criterion:
    """``batch``: images at a time (0: it needs none). ``per_axis``: divided by the axis's mean, where scores have no common unit."""

    scores: Callable[[Request], ByAxis]
    batch: int
    per_axis: bool


ONE_GRADIENT = 16  # squares of small batches' gradients tell more of an index than those of large ones
CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(obs, batch=32, per_axis=False),
    "taylor": Criterion(of_gradients(taylor), batch=ONE_GRADIENT, per_axis=False),
    "gradient": Criterion(of_gradients(gradient), batch=ONE_GRADIENT, per_axis=True),
    "l1": Criterion(of_weights(l1), batch=0, per_axis=True),
    "l2": Criterion(of_weights(l2), batch=0, per_axis=True),
    "random": Criterion(random, batch=0, per_axis=True),
}


def score(
    model: Any,
    coupling: Coupling,
    criterion: str = "l1",
    batches: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
) -> Scores:
    """The score of every index of every prunable axis; low means it can go.

    ``batches`` of ``(inputs, targets)`` are for the criteria that look at images, ``loss(outputs, targets)`` (default: cross-entropy) for
    those that need gradients, ``seed`` for what is drawn. CoppiceError for an unknown criterion, missing batches, or a NaN.
    """
    if criterion not in CRITERIA:
        raise CoppiceError(f"unknown criterion {criterion!r}; choose one of {', '.join(CRITERIA)}")
    chosen = CRITERIA[criterion]
    if chosen.batch and batches is None:
        raise CoppiceError(f"the criterion {criterion!r} needs calibration batches; give batches of (inputs, targets)")
    scores = chosen.scores(Request(model, coupling, batches or (), loss, seed))
    for axis in coupling.prunable:
        if not np.isfinite(scores[axis.id]).all():
            raise CoppiceError(f"the {criterion} scores of {axis.name} are not finite; look for NaN or infinite weights or losses")
    return Scores(_by_axis_mean(scores), additive=False) if chosen.per_axis else Scores(scores, additive=True)


def per_index(coupling: Coupling, elements: Mapping[str, Array]) -> dict[int, Array]:
    """Sum element saliencies (parameter name -> array of its shape) over everything that each index of each prunable axis touches."""
    ids = {axis.atom: axis.id for axis in coupling.prunable}
    scores: dict[int, Array] = {axis.id: np.zeros(axis.width) for axis in coupling.prunable}
    for value in coupling.graph.weights():
        array = elements.get(value.names[0]) if value.kind is Kind.PARAMETER else None
        if array is None:
            continue
        for dim, axis in enumerate(coupling.dims[value.id]):
            if find(axis).pinned is None:
                others = tuple(k for k in range(array.ndim) if k != dim)
                _share_out(axis, array.sum(axis=others, dtype=np.float64), ids, scores)
    return scores


def _share_out(axis: Axis, sums: Array, ids: Mapping[Axis, int], scores: dict[int, Array]) -> None:
    """Add the per-index sums of a dim to the atoms below its axis."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        if axis in ids:
            scores[ids[axis]] += sums
    elif axis.form is Form.SUM:
        ends = np.cumsum([find(p).size for p in axis.parts])
        for part, piece in zip(axis.parts, np.split(sums, ends[:-1]), strict=True):
            _share_out(part, piece, ids, scores)
    else:
        grid = sums.reshape([find(p).size for p in axis.parts])
        for k, part in enumerate(axis.parts):
            _share_out(part, grid.sum(axis=tuple(j for j in range(grid.ndim) if j != k)), ids, scores)


def _by_axis_mean(scores: Mapping[int, Array]) -> dict[int, Array]:
    return {k: s / mean if (mean := s.mean()) > 0 else s for k, s in scores.items()}
