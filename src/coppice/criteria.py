"""Criteria: how much each element of a parameter, or each channel's activations, matter, and what that says of each index of an axis.

To add one, write a function and one line of ``CRITERIA`` (``docs/add-a-criterion.md``). Most are a small pure function of a parameter and
(for some) its gradient on one batch, which answers a saliency an element, not negative; the score of an index is the sum (or another of
``AGGREGATIONS``) over every element that goes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.saliency import AGGREGATIONS, Array, ByAxis, Scores, isomorphic, per_index, slices


class Unit(Enum):
    """What scores of different axes are to each other, if nothing else is asked for (``NORMALIZATIONS``)."""

    LOSS = "loss"  # an estimate of what the loss rises by: may be weighed against what is saved
    AXIS = "axis"  # no common unit: divided by the axis's mean
    RANK = "rank"  # made comparable by the criterion itself


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


def snip(weight: Array, gradient: Array | None) -> Array:
    """|w dL/dw|: connection sensitivity. Lee et al., SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019.

    Made for networks at their initialisation, where BatchNorm has no statistics yet: those of the batch are used then.
    """
    assert gradient is not None
    return np.asarray(np.abs(weight * gradient))


def fisher(weight: Array, gradient: Array | None) -> Array:
    """w^2 (dL/dw)^2 / 2 of one image: optimal brain damage with the Fisher diagonal for the Hessian's.

    LeCun et al., Optimal Brain Damage, NIPS 1989; Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018.
    """
    assert gradient is not None
    return np.asarray(np.square(weight * gradient) / 2)


@dataclass(frozen=True, slots=True)
class Request:
    """What a criterion may look at. ``batches`` are ``(inputs, targets)``; ``loss(outputs, targets)`` is cross-entropy where None."""

    model: Any
    coupling: Coupling
    batches: Iterable[Any]
    loss: Callable[..., Any] | None
    seed: int
    aggregation: str = "sum"

    @property
    def front_end(self) -> Any:
        return self.coupling.graph.origin

    def per_index(self, elements: Mapping[str, Array], saliency: Callable[[Array], Array] | None = None) -> ByAxis:
        """Saliencies of elements, put together as was asked for; with ``saliency`` what they are worked out from."""
        return per_index(self.coupling, elements, self.aggregation, saliency)


Element = Callable[[Array, Array | None], Array]


def of_weights(element: Element) -> Callable[[Request], ByAxis]:
    """Scores from a saliency of each weight."""

    def scores(request: Request) -> ByAxis:
        weights = request.front_end.parameters(request.model)
        return request.per_index(weights, lambda weight: element(weight, None))

    return scores


def of_gradients(element: Element) -> Callable[[Request], ByAxis]:
    """Scores from a saliency of each weight and its gradient, averaged over the batches."""

    def scores(request: Request) -> ByAxis:
        totals: dict[str, Array] = {}
        count = 0
        for pairs in request.front_end.gradients(request.model, request.batches, request.loss):
            count += 1
            for name, (weight, slope) in pairs.items():
                totals[name] = totals.get(name, 0) + element(weight, slope)
        return request.per_index({name: total / count for name, total in totals.items()})

    return scores


def taylor_gate(request: Request) -> ByAxis:
    """(sum of w dL/dw over all that goes with the index)^2: the first-order change of the loss when a gate on the index closes.

    Molchanov et al., CVPR 2019, section 3.2; over a coupled group as one.
    """
    totals: ByAxis = {axis.id: np.zeros(axis.width) for axis in request.coupling.prunable}
    for pairs in request.front_end.gradients(request.model, request.batches, request.loss):
        for axis, change in per_index(request.coupling, {name: weight * slope for name, (weight, slope) in pairs.items()}).items():
            totals[axis] += np.square(change)
    return totals


def lamp(request: Request) -> ByAxis:
    """Each index's squared norm over those of the indices that would outlive it: comparable between axes as it is.

    Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021; by index instead of by weight.
    """
    found: ByAxis = {}
    for axis, norms in of_weights(l2)(request).items():
        order = np.argsort(norms, kind="stable")
        found[axis] = np.empty_like(norms)
        found[axis][order] = norms[order] / np.maximum(np.cumsum(norms[order][::-1])[::-1], 1e-300)
    return found


def fpgm(request: Request) -> ByAxis:
    """Sum of distances to the other filters of the axis: what is near the geometric median can be stood in for.

    He et al., Filter Pruning via Geometric Median for Deep CNNs Acceleration, CVPR 2019; over filters and consumers.
    """
    scores: ByAxis = {axis.id: np.zeros(axis.width) for axis in request.coupling.prunable}
    weights = {name: w for name, w in request.front_end.parameters(request.model).items() if w.ndim > 1}
    for axis, rows in slices(request.coupling, weights):
        squares = np.square(rows, dtype=np.float64).sum(1)
        distances = squares[:, None] + squares[None] - 2 * (rows @ rows.T)
        scores[axis] += np.sqrt(np.maximum(distances, 0)).sum(1)
    return scores


def bn_scale(request: Request) -> ByAxis:
    """|gamma| of the BatchNorms that an index goes through; of an axis without one, |w|.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
    """
    graph, weights = request.coupling.graph, request.front_end.parameters(request.model)
    gammas = {graph.values[op.inputs[1]].names for op in graph.ops if op.rule == "batch_norm" and op.inputs[1] is not None}
    names = {name for group in gammas for name in group}
    scales = request.per_index({name: np.abs(w) for name, w in weights.items() if name in names})
    plain = request.per_index({name: np.abs(w) for name, w in weights.items()})
    return {axis: scale if scale.any() else plain[axis] for axis, scale in scales.items()}


def of_activations(statistic: str) -> Callable[[Request], ByAxis]:
    """Scores from a statistic of each channel that a layer reads (``coppice.activations``). Needs no labels."""

    def scores(request: Request) -> ByAxis:
        inputs = (x for x, _ in request.batches)
        found: ByAxis = request.front_end.activation_scores(request.model, request.coupling, inputs, statistic)
        return found

    return scores


def synflow(request: Request) -> ByAxis:
    """|w dR/dw| where R is the sum of the outputs of the network with |w| for w, on an input of ones: needs no data.

    Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, NeurIPS 2020. Made for networks at
    their initialisation, and for many steps; as published it ranks all axes together (normalization ``none``).
    """
    return request.per_index(request.front_end.synaptic_flow(request.model))


def obs(request: Request) -> ByAxis:
    """The loss that removing an index adds when all that reads it is refitted: see ``coppice.elimination``. Needs no labels."""
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
    """``batch``: the images that it wants at a time (0: none at all); ``elements``: it puts saliencies of single elements together."""

    scores: Callable[[Request], ByAxis]
    batch: int
    unit: Unit
    elements: bool = False


ONE_GRADIENT = 16  # squares of small batches' gradients tell more of an index than those of large ones
CRITERIA: dict[str, Criterion] = {
    "obs": Criterion(obs, 32, Unit.LOSS),
    "taylor": Criterion(of_gradients(taylor), ONE_GRADIENT, Unit.LOSS, elements=True),
    "taylor-gate": Criterion(taylor_gate, ONE_GRADIENT, Unit.LOSS),
    "fisher": Criterion(of_gradients(fisher), 1, Unit.LOSS, elements=True),
    "gradient": Criterion(of_gradients(gradient), ONE_GRADIENT, Unit.AXIS, elements=True),
    "snip": Criterion(of_gradients(snip), ONE_GRADIENT, Unit.AXIS, elements=True),
    "synflow": Criterion(synflow, 0, Unit.AXIS, elements=True),
    "l1": Criterion(of_weights(l1), 0, Unit.AXIS, elements=True),
    "l2": Criterion(of_weights(l2), 0, Unit.AXIS, elements=True),
    "lamp": Criterion(lamp, 0, Unit.RANK, elements=True),
    "fpgm": Criterion(fpgm, 0, Unit.AXIS),
    "bn-scale": Criterion(bn_scale, 0, Unit.AXIS, elements=True),
    "activation": Criterion(of_activations("magnitude"), 32, Unit.AXIS),
    "apoz": Criterion(of_activations("nonzero"), 32, Unit.AXIS),
    "rank": Criterion(of_activations("rank"), 32, Unit.AXIS),
    "independence": Criterion(of_activations("independence"), 32, Unit.AXIS),
    "wanda": Criterion(of_activations("times_weight"), 32, Unit.AXIS),
    "random": Criterion(random, 0, Unit.AXIS),
}
AUTO = "auto"  # a setting, no criterion: cut by each of TRIED, repair, and keep what is nearest to the dense model on validation images
TRIED = ("obs", "taylor", "fisher", "l2")


def batch_of(criterion: str) -> int:
    """How many images the criterion wants at a time; 1 where it wants none. CoppiceError where there is none of that name."""
    if criterion not in CRITERIA:
        raise CoppiceError(f"unknown criterion {criterion!r}; choose one of {', '.join(CRITERIA)}")
    return CRITERIA[criterion].batch or 1


NORMALIZATIONS = ("own", "axis", "isomorphic", "none")


def score(
    model: Any,
    coupling: Coupling,
    criterion: str = "l1",
    batches: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
    aggregation: str = "sum",
    normalization: str = "own",
) -> Scores:
    """The score of every index of every prunable axis; low means it can go.

    ``batches`` of ``(inputs, targets)`` are for the criteria that look at images, ``loss(outputs, targets)`` (default: cross-entropy) for
    those that need gradients, ``seed`` for what is drawn. ``aggregation`` (``coppice.saliency.AGGREGATIONS``) says how saliencies of
    elements become one of an index; ``normalization`` what axes are weighed against each other by: ``own``, what suits the criterion;
    ``axis``, each by its mean; ``isomorphic``, each by the mean over all that lie alike, so that those compete as they are; or ``none``.
    CoppiceError for an unknown name, missing batches, or a NaN.
    """
    check_options(criterion, aggregation, normalization)
    chosen = CRITERIA[criterion]
    if chosen.batch and batches is None:
        raise CoppiceError(f"the criterion {criterion!r} needs calibration batches; give batches of (inputs, targets)")
    scores = _finite(coupling, chosen.scores(Request(model, coupling, batches or (), loss, seed, aggregation)), f"{criterion} scores")
    if normalization == "isomorphic":
        return Scores(_by_mean(scores, [[axis.id for axis in group] for group in isomorphic(coupling)]), additive=False)
    if normalization == "axis" or (normalization == "own" and chosen.unit is Unit.AXIS):
        return Scores(_by_mean(scores, [[axis] for axis in scores]), additive=False)
    return Scores(scores, additive=chosen.unit is Unit.LOSS)


def check_options(criterion: str, aggregation: str, normalization: str) -> None:
    """CoppiceError for what can't be asked of :func:`score`."""
    batch_of(criterion)
    for name, given, known in (("aggregation", aggregation, tuple(AGGREGATIONS)), ("normalization", normalization, NORMALIZATIONS)):
        if given not in known:
            raise CoppiceError(f"unknown {name} {given!r}; choose one of {', '.join(known)}")
    if aggregation != "sum" and not CRITERIA[criterion].elements:
        raise CoppiceError(
            f"the criterion {criterion!r} scores indices as a whole, there are no elements to aggregate; drop the aggregation"
        )


def measure(model: Any, coupling: Coupling, scores: Scores, batches: Iterable[Any], seed: int = 0) -> Scores:
    """``scores`` in units of loss: along the order that they give within each axis, what removing the next index does to the outputs.

    So a criterion says which indices go, and a measurement how many of each axis. ``batches`` are ``(inputs, ...)``; no labels are used.
    See ``coppice.elimination``. CoppiceError where there are no batches, or what is measured is not finite.
    """
    orders = {axis.id: np.argsort(scores[axis.id], kind="stable").tolist() for axis in coupling.prunable}
    inputs = (batch[0] for batch in batches)
    losses = coupling.graph.origin.removal_losses(model, coupling, inputs, seed, orders)
    return Scores(_finite(coupling, losses, "measured losses"), additive=True)


def _finite(coupling: Coupling, scores: ByAxis, what: str) -> ByAxis:
    for axis in coupling.prunable:
        if not np.isfinite(scores[axis.id]).all():
            raise CoppiceError(f"the {what} of {axis.name} are not finite; look for NaN or infinite weights, inputs or losses")
    return scores


def _by_mean(scores: ByAxis, groups: Iterable[Iterable[int]]) -> ByAxis:
    """Each axis's scores over the mean of all scores of its group."""
    found: ByAxis = {}
    for group in groups:
        members = {axis: scores[axis] for axis in group}
        mean = float(np.concatenate(list(members.values())).mean())
        found.update({axis: own / mean if mean > 0 else own for axis, own in members.items()})
    return found
