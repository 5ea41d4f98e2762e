"""Regularised training: shrink what could go while the model trains, so that little is lost when it does. On the axes of the analysis.

After every step of the optimiser the weights take a proximal step of a penalty: exact zeros, the same for any optimiser, no term in the
loss. `group-lasso`: over everything an index touches (filters, norms, consumers), by its norm (Wen et al., Structured Sparsity Learning,
NIPS 2016; Fang et al., DepGraph, CVPR 2023). `slimming`: |gamma| of the BatchNorms (Liu et al., Network Slimming, ICCV 2017). `l1`, `l2`:
every weight on an axis that can be cut. `growing`: a rising L2 on the indices that are to go, chosen at the start (Wang et al., Neural
Pruning via Growing Regularization, ICLR 2021). `soft`: the filters of the indices that would go now are set to zero every so often and
may grow back (He et al., Soft Filter Pruning, IJCAI 2018), none larger than it was at the start.

Strengths are relative: 1 shrinks an index by its axis's mean norm over the whole training, if the loss does not hold it. `auto` is twice
what takes the last index that has to go for the target down to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from coppice.allocate import bundles_on_grid
from coppice.allocate import plan as make_plan
from coppice.axes import Axis, Form, find
from coppice.config import REGULARISATIONS
from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.graph import Kind
from coppice.masks import sites
from coppice.planning import Plan
from coppice.planning import make_plan as plan_that_keeps
from coppice.saliency import Array, Scores

NEAR_ZERO = 0.05  # of its axis's mean norm at the start: an index below that is as good as gone
_SPARED = 0.05  # of the indices that have to go may be above the automatic strength: a few outliers must not set it for all
_SPREAD = 4.0
_SOFT_CUTS = 20  # of soft pruning, over the whole training
_MARGIN = 2.0  # times the strength that would do if the loss held nothing
_GROWN = 8.0  # what is to go is down to exp(-8) of itself at the end of a growing regularisation of strength 1, if the loss holds nothing


@dataclass(frozen=True, slots=True)
class Place:
    """A dim of the parameter of this name, and for each of its positions the group that lies there, -1 for none.

    Groups: all indices of all prunable axes, one after the other. ``makes``: what makes an index, and neither its scale nor what reads it.
    """

    name: str
    dim: int
    groups: Array
    makes: bool


class Weights(Protocol):
    """A model's weights on its axes, wherever they lie; of a parameter on several axes each counts."""

    def count(self) -> Array:
        """How many weights there are of each group."""

    def squares(self) -> Array:
        """The sum of their squares, in double precision."""

    def scale(self, factors: Array) -> None:
        """Each times the factor of its group."""

    def scale_filters(self, factors: Array) -> None:
        """The same for what makes an index alone: so that gradients can bring it back."""

    def cap_filters(self) -> None:
        """What makes an index no larger than it was at the start."""

    def soften(self, limits: Array) -> None:
        """Each nearer to zero by the limit of its group, as a part of its parameter's mean size at the start."""


class Shrinking:
    """One kind of regularisation at work on a model; `said()` says how far it is, `plan(...)` makes a plan of what it shrank."""

    def __init__(
        self, weights: Weights, coupling: Coupling, kind: str, strength: float | None, steps: int, target: Plan | None = None
    ) -> None:
        self.kind, self._weights, self._coupling, self._steps = kind, weights, coupling, steps
        self._counts = np.maximum(weights.count(), 1)
        self._means = np.concatenate([np.full_like(part, float(part.mean()) or 1.0) for part in self._split(self._norms())])
        self._going = None if target is None else self._gone_by(target)
        self._how_many = [None] * len(coupling.prunable) if self._going is None else [int(part.sum()) for part in self._split(self._going)]
        self.strength = self._automatic() if strength is None else strength

    def shrink(self, done: int) -> None:
        """One proximal step, the one after `done`; the shares of all add up to 1, falling by half a cosine as learning rates do."""
        if self.kind == "growing":
            rising = self.strength * _GROWN * 2 * (done + 1) / self._steps**2
            self._weights.scale(np.where(self._chosen(), 1 / (1 + rising), 1.0))
            return
        if self.kind == "soft":
            if (done + 1) % max(1, self._steps // _SOFT_CUTS) == 0:
                self._weights.scale_filters((self._pressure(self._norms()) < 1).astype(np.float64))
            # A filter at zero has no variance: through a BatchNorm it would come back many times too large, in the place of trained ones.
            self._weights.cap_filters()
            return
        share = (1 + math.cos(math.pi * min(1.0, (done + 0.5) / self._steps))) / self._steps
        norms = self._norms()
        amounts = self.strength * share * self._pressure(norms)
        if self.kind == "l1":
            self._weights.soften(amounts)
        elif self.kind == "l2":
            self._weights.scale(1 / (1 + amounts))
        else:
            self._weights.scale(np.maximum(1 - amounts * self._means / np.maximum(norms, 1e-30), 0))

    def _pressure(self, norms: Array) -> Array:
        """How much of the strength is on each index: where a target says how many of each axis have to go, 1 on that many, those that are
        smallest now, and 0 on the others. Else 1 on the smallest of an axis, falling by powers of two to 1 / 2^_SPREAD on the largest
        (DepGraph, section 3.3). All alike would take the axis down as a whole.
        """
        parts = []
        for part, going in zip(self._split(norms), self._how_many, strict=True):
            if going is None:
                low, high = part.min(), part.max()
                parts.append(np.exp2(-_SPREAD * (part - low) / max(high - low, 1e-30)))
            else:
                parts.append((part.argsort(kind="stable").argsort(kind="stable") < going).astype(np.float64))
        return np.concatenate(parts)

    def said(self) -> str:
        """The sparsity reached: how many indices are near zero, and the MACs that would stay without them."""
        near = self._relative() < NEAR_ZERO
        keep = [~part for part in self._split(near)]
        widths = {axis.id: max(1, int(k.sum())) for axis, k in zip(self._coupling.prunable, keep, strict=True)}
        left = self._coupling.cost(widths).macs / self._coupling.cost().macs
        return f"{100 * float(near.mean()):.0f} % of the indices are near zero, {left:.2f} of the MACs would stay without them"

    def scores(self) -> Scores:
        """The norm of each index relative to its axis's mean at the start: for `coppice.plan` with a target."""
        parts = self._split(self._relative())
        return Scores({axis.id: part for axis, part in zip(self._coupling.prunable, parts, strict=True)}, additive=False)

    def plan(self, threshold: float = NEAR_ZERO, round_to: int = 8, min_width: int = 8) -> Plan:
        """The plan that removes the indices whose relative norm is below `threshold`; widths are rounded up to the grid."""
        scores = self.scores()
        keep: dict[int, Array] = {}
        for bundle in bundles_on_grid(self._coupling, round_to, min_width):
            wanted = {axis.id: int((scores[axis.id] >= threshold).sum()) for axis in bundle.axes}
            level = next(k for k in range(len(bundle.levels)) if all(bundle.kept(a, k) >= wanted[a.id] for a in bundle.axes))
            for axis in bundle.axes:
                best = np.argsort(-scores[axis.id], kind="stable")[: bundle.kept(axis, level)]
                keep[axis.id] = np.isin(np.arange(axis.width), best)
        return plan_that_keeps(self._coupling, keep)

    def _norms(self) -> Array:
        """Root mean square of all weights that an index touches."""
        return np.asarray(np.sqrt(self._weights.squares() / self._counts))

    def _relative(self) -> Array:
        return np.asarray(self._norms() / self._means)

    def _split(self, groups: Array) -> list[Array]:
        return np.split(groups, starts(self._coupling)[1:-1])

    def _chosen(self) -> Array:
        if self._going is None:
            raise CoppiceError("growing regularisation has to know what is to go: give it a target")
        return self._going

    def _gone_by(self, plan: Plan) -> Array:
        kept = {axis.name: axis.keep for axis in plan.axes}
        return np.concatenate([~np.isin(np.arange(axis.width), kept[axis.name]) for axis in self._coupling.prunable])

    def _automatic(self) -> float:
        if self.kind in ("growing", "soft"):
            return 1.0
        if self.kind == "l2":
            return _GROWN  # it never takes anything to zero: as far down as growing does
        going = self._relative()[self._chosen()]
        return _MARGIN * float(np.quantile(going, 1 - _SPARED)) if len(going) else 0.0


Made = TypeVar("Made", bound=Shrinking)


def prepared(
    make: Callable[[float | None, Plan | None], Made],
    coupling: Coupling,
    kind: str,
    steps: int,
    target: Mapping[str, float] | None,
    strength: float | str,
    round_to: int,
    min_width: int,
) -> Made:
    """What `make` gives for a strength (None: automatic) and for what has to go for `target`. CoppiceError for what makes no sense."""
    if kind not in REGULARISATIONS:
        raise CoppiceError(f"there is no regularisation {kind!r}: choose one of {', '.join(REGULARISATIONS)}")
    if steps < 1:
        raise CoppiceError(f"regularising for {steps} steps: there must be 1 or more")
    given = None if strength == "auto" else read_strength(strength)
    if not coupling.prunable:
        raise CoppiceError("no axis of this model can be cut, so there is nothing to regularise")
    if not target and (given is None or kind in ("growing", "soft")):
        raise CoppiceError(f"{kind} with the strength {strength} has to know how much is to go: give it a target")
    if not target:
        return make(given, None)
    norms = make(1.0, None).scores()
    return make(given, make_plan(coupling, norms, target, round_to=round_to, min_width=min_width))


def read_strength(text: float | str) -> float:
    """A number above zero. Raises CoppiceError."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < 1e6:
        raise CoppiceError(f"the strength is {text}: write auto, or a number above 0")
    return found


def starts(coupling: Coupling) -> Array:
    """Where the groups of each prunable axis begin, and the number of all."""
    return np.cumsum([0, *(axis.width for axis in coupling.prunable)])


def places(coupling: Coupling, kind: str) -> Iterator[Place]:
    """Where the groups lie that a kind of regularisation looks at."""
    first = {axis.atom: int(start) for axis, start in zip(coupling.prunable, starts(coupling), strict=False)}
    reads = {site.name: site.along for site in sites(coupling)[0]}
    gammas = _gammas(coupling)
    for value in coupling.graph.weights():
        name = value.names[0]
        if value.kind is not Kind.PARAMETER or (kind == "slimming" and name not in gammas):
            continue
        for dim, axis in enumerate(coupling.dims[value.id]):
            for groups in _groups(axis, first):
                yield Place(name, dim, groups, len(value.shape) > 1 and dim not in reads.get(name, ()))


def nothing_to_scale(kind: str) -> CoppiceError:
    return CoppiceError(f"{kind}: no BatchNorm with a scale lies on an axis that can be cut, choose another regularisation")


def _groups(axis: Axis, first: Mapping[Axis, int]) -> list[Array]:
    """For each prunable atom below a dim's axis, the group at each position of the dim (-1: none)."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        return [first[axis] + np.arange(axis.size)] if axis in first else []
    found = []
    before = 0
    for k, part in enumerate(axis.parts):
        size = find(part).size
        for groups in _groups(part, first):
            if axis.form is Form.SUM:
                whole = np.full(axis.size, -1)
                whole[before : before + size] = groups
            else:
                minor = math.prod(find(p).size for p in axis.parts[k + 1 :])
                whole = groups[np.arange(axis.size) // minor % size]
            found.append(whole)
        before += size
    return found


def _gammas(coupling: Coupling) -> set[str]:
    """Names of the scales of BatchNorms."""
    graph = coupling.graph
    found = [graph.values[op.inputs[1]] for op in graph.ops if op.rule == "batch_norm" and op.inputs[1] is not None]
    return {name for value in found for name in value.names}
