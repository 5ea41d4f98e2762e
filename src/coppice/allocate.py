"""Allocation: from scores, costs and a target to a plan: how many indices every axis keeps, and which.

Widths move on a grid: the channel count of every dim that an axis lies on stays a multiple of ``round_to``, or keeps its full width. Axes
that the user's code ties together move as one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from coppice.axes import Axis, atoms
from coppice.cost import Cost, Priced
from coppice.coupling import Coupling, Mask, PrunableAxis
from coppice.errors import CoppiceError, UnreachableError
from coppice.planning import Plan, make_plan
from coppice.saliency import Scores
from coppice.targets import humanise

ALLOCATIONS = ("global", "uniform")
RECONSIDERED = 48  # bundles whose cut is looked back at: those with the widest steps
FINEST = 32  # steps an axis is cut in at most: finer steps cost time and change nothing that a grid of 8 lets through


@dataclass(slots=True, eq=False)
class Bundle:
    """Axes whose widths move in proportion, mostly one.

    ``levels``: the parts of ``whole`` it may keep, rising; ``at``: the present one; ``least``: the lowest it may go to. ``terms`` are the
    costs that its widths are in, ``near`` the bundles whose widths are in one of these too, itself included, and ``step_down`` what its
    next step down saves and loses, as long as no bundle nearby moved.
    """

    axes: list[PrunableAxis]
    whole: int
    levels: list[int]
    at: int
    least: int = 0
    order: list[np.ndarray] = field(default_factory=list)
    terms: list[Priced] = field(default_factory=list)
    near: list[Bundle] = field(default_factory=list)
    step_down: tuple[dict[str, float], float] | None = None

    def kept(self, axis: PrunableAxis, level: int) -> int:
        return axis.width // self.whole * self.levels[level]


def plan(
    coupling: Coupling,
    scores: Scores,
    target: Mapping[str, float],
    allocation: str = "global",
    round_to: int = 8,
    min_width: int = 8,
    spare: bool = False,
    prices: Sequence[Priced] = (),
    offset: int = 0,
) -> Plan:
    """Choose what stays so that the cost meets ``target`` (absolute budgets: ``macs``, ``params``, ``bytes``, what ``prices`` are of).

    ``global``: the cheapest steps go first, wherever they are: least score for what they save where scores are in one unit (loss), else
    least mean score (each axis against its own mean). ``uniform``: every axis keeps the same share. Within an axis the lowest scores go.
    No dim gets narrower than ``min_width`` (where it was wider). ``offset``: channel counts are that much above a multiple of ``round_to``
    where an axis lies on dims by itself. ``spare``: look back at the widest steps of a global cut in units of
    loss, and spare what need not have gone.
    UnreachableError where the target can't be reached, with the smallest cost that can.
    """
    if allocation not in ALLOCATIONS:
        raise CoppiceError(f"unknown allocation {allocation!r}; choose one of {', '.join(ALLOCATIONS)}")
    work = _Allocation(coupling, scores, dict(target), bundles_on_grid(coupling, round_to, min_width, offset), prices)
    work.check_reachable()
    if allocation == "uniform":
        work.cut_uniformly()
    else:
        work.cut_globally(spare and scores.additive)
    return make_plan(coupling, work.masks())


class _Allocation:
    def __init__(
        self, coupling: Coupling, scores: Scores, target: dict[str, float], bundles: list[Bundle], prices: Sequence[Priced]
    ) -> None:
        self.coupling, self.scores, self.target = coupling, scores, target
        self.bundles = bundles
        self.widths: dict[Axis, int] = {}
        moving = {axis.atom for bundle in self.bundles for axis in bundle.axes}
        self.terms: list[Priced] = [t.within(moving) for t in (*coupling.cost_terms, *prices) if t.kind in target]
        self.values: dict[int, float] = {}  # of the terms at the present widths
        for bundle in self.bundles:
            bundle.order = [np.argsort(scores[a.id], kind="stable") for a in bundle.axes]
        self._find_neighbours()

    def _find_neighbours(self) -> None:
        moved_by = {axis.atom: bundle for bundle in self.bundles for axis in bundle.axes}
        for term in self.terms:
            together = list(dict.fromkeys(moved_by[a] for axis in term.axes for a in atoms(axis) if a in moved_by))
            for bundle in together:
                bundle.terms.append(term)
                bundle.near += together
        for bundle in self.bundles:
            bundle.near = list(dict.fromkeys([bundle, *bundle.near]))

    def total(self) -> dict[str, float]:
        spent = dict.fromkeys(self.target, 0.0)
        for term in self.terms:
            spent[term.kind] += self._value(term)
        return spent

    def excess(self, spent: Mapping[str, float]) -> dict[str, float]:
        return {k: spent[k] - budget for k, budget in self.target.items() if spent[k] > budget}

    def set_level(self, bundle: Bundle, level: int) -> None:
        bundle.at = level
        for axis in bundle.axes:
            self.widths[axis.atom] = bundle.kept(axis, level)
        for term in bundle.terms:
            self.values.pop(id(term), None)
        for other in bundle.near:
            other.step_down = None

    def _value(self, term: Priced) -> float:
        found = self.values.get(id(term))
        if found is None:
            found = self.values[id(term)] = term.evaluate(self.widths)
        return found

    def check_reachable(self) -> None:
        for bundle in self.bundles:
            self.set_level(bundle, 0)
        spent = self.total()
        over = self.excess(spent)
        for bundle in self.bundles:
            self.set_level(bundle, len(bundle.levels) - 1)
        if over:
            dense = self.total()
            key = max(over, key=lambda k: spent[k] / self.target[k])
            asked, least = (humanise(x, key) if key == "latency" else f"{x:,.0f}" for x in (self.target[key], spent[key]))
            raise UnreachableError(
                f"the target {key}={asked} can't be reached: the smallest this model gets is {least} "
                f"({spent[key] / dense[key]:.3f} of dense); raise the target, or lower --round-to or --min-width"
            )

    def _saving(self, bundle: Bundle, level: int) -> dict[str, float]:
        """What going from the present level to ``level`` saves of every budget."""
        before = [self._value(term) for term in bundle.terms]
        widths = {a.atom: self.widths[a.atom] for a in bundle.axes}
        self.widths.update({a.atom: bundle.kept(a, level) for a in bundle.axes})
        saved = dict.fromkeys(self.target, 0.0)
        for term, value in zip(bundle.terms, before, strict=True):
            saved[term.kind] += value - term.evaluate(self.widths)
        self.widths.update(widths)
        return saved

    def _loss(self, bundle: Bundle, level: int) -> float:
        """The score of the indices that go between the present level and ``level``."""
        loss = 0.0
        for axis, order in zip(bundle.axes, bundle.order, strict=True):
            gone = order[axis.width - bundle.kept(axis, bundle.at) : axis.width - bundle.kept(axis, level)]
            loss += float(self.scores[axis.id][gone].sum())
        return loss

    def _price(self, bundle: Bundle, over: Mapping[str, float]) -> float:
        """What this bundle's next step down costs: score for each unit of excess saved, or mean score where scores have no unit."""
        if bundle.step_down is None:
            bundle.step_down = self._saving(bundle, bundle.at - 1), self._loss(bundle, bundle.at - 1)
        saved, loss = bundle.step_down
        gain = sum(saved[k] / amount for k, amount in over.items())
        if gain <= 0:
            return math.inf
        if self.scores.additive:
            return loss / gain
        return loss / sum(bundle.kept(a, bundle.at) - bundle.kept(a, bundle.at - 1) for a in bundle.axes)

    def cut_globally(self, spare: bool) -> None:
        """Greedy; with ``spare`` also with one bundle at a time spared a step or spared wholly, for as long as that loses less.

        A greedy cut takes a wide step early because it saves much for its loss, though the narrow ones that it then could have left alone
        would have done: this looks back at each such step once.
        """
        self._cut_greedily()
        if not spare:
            return
        best = self._lost()
        widest = sorted((b for b in self.bundles if b.at < len(b.levels) - 1), key=self._step_size, reverse=True)[:RECONSIDERED]
        for bundle in widest:
            for least in sorted({min(bundle.at + 1, len(bundle.levels) - 1), len(bundle.levels) - 1}):
                before, floor = [b.at for b in self.bundles], bundle.least
                bundle.least = least
                for other in self.bundles:
                    self.set_level(other, len(other.levels) - 1)
                reached = self._cut_greedily()
                if reached and self._lost() < best * (1 - 1e-9):
                    best = self._lost()
                    continue
                bundle.least = floor
                for other, level in zip(self.bundles, before, strict=True):
                    self.set_level(other, level)

    def _lost(self) -> float:
        """The scores of all that goes."""
        return sum(
            float(self.scores[axis.id][order[: axis.width - bundle.kept(axis, bundle.at)]].sum())
            for bundle in self.bundles
            for axis, order in zip(bundle.axes, bundle.order, strict=True)
        )

    def _step_size(self, bundle: Bundle) -> float:
        """What the bundle's last step saved, as a share of the budgets."""
        saved = self._saving(bundle, bundle.at + 1)
        return -sum(saved[k] / budget for k, budget in self.target.items())

    def _cut_greedily(self) -> bool:
        """Down to the target, the cheapest steps first; whether it was reached."""
        spent = self.total()
        history: list[Bundle] = []
        while over := self.excess(spent):
            keys = set(over)
            heap = [(self._price(b, over), k) for k, b in enumerate(self.bundles) if b.at > b.least]
            heapq.heapify(heap)
            if not heap:
                return False
            while heap and set(self.excess(spent)) == keys:  # prices hold while the same budgets are exceeded
                _, k = heapq.heappop(heap)
                bundle = self.bundles[k]
                price = self._price(bundle, over)
                if heap and price > heap[0][0]:
                    heapq.heappush(heap, (price, k))  # it got dearer since it was priced
                    continue
                assert bundle.step_down is not None  # it was priced just now
                for kind, saved in bundle.step_down[0].items():
                    spent[kind] -= saved
                self.set_level(bundle, bundle.at - 1)
                history.append(bundle)
                if bundle.at > bundle.least:
                    heapq.heappush(heap, (self._price(bundle, over), k))
        self._give_back(history, spent)
        return True

    def _give_back(self, history: list[Bundle], spent: dict[str, float]) -> None:
        """The last step overshoots: take back whatever still fits, the dearest first."""
        for bundle in reversed(history):
            back = self._saving(bundle, bundle.at + 1)  # negative: what it costs to grow again
            if all(spent[k] - saved <= self.target[k] for k, saved in back.items()):
                self.set_level(bundle, bundle.at + 1)
                spent.update({k: spent[k] - saved for k, saved in back.items()})

    def cut_uniformly(self) -> None:
        """The largest common share that meets the target, by bisection; then what still fits, the widest axes first."""
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            self._set_share(share)
            low, high = (low, share) if self.excess(self.total()) else (share, high)
        self._set_share(low)
        order = sorted((b for b in self.bundles if b.at < len(b.levels) - 1), key=lambda b: b.levels[b.at] / b.whole, reverse=True)
        self._give_back(order, self.total())

    def _set_share(self, share: float) -> None:
        for bundle in self.bundles:
            level = min(range(len(bundle.levels)), key=lambda k: (abs(bundle.levels[k] / bundle.whole - share), -k))
            self.set_level(bundle, level)

    def masks(self) -> dict[int, Mask]:
        found: dict[int, Mask] = {}
        for bundle in self.bundles:
            for axis, order in zip(bundle.axes, bundle.order, strict=True):
                mask = np.ones(axis.width, bool)
                mask[order[: axis.width - bundle.kept(axis, bundle.at)]] = False
                found[axis.id] = mask
        return found


def bundles_on_grid(coupling: Coupling, round_to: int, min_width: int, offset: int = 0) -> list[Bundle]:
    """What can move, and the levels that it can move to; what the grid leaves no level is left out."""
    bundles, by_atom = coupling.bundles(), {a.atom: a for a in coupling.prunable}
    found = [_bundle([by_atom[a] for a in together], round_to, min_width, offset) for together in bundles]
    return [bundle for bundle in found if len(bundle.levels) > 1]


def _bundle(axes: list[PrunableAxis], round_to: int, min_width: int, offset: int = 0) -> Bundle:
    whole = math.gcd(*(a.width for a in axes))
    step = 1
    for axis in axes:
        grid = round_to // math.gcd(round_to, axis.multiple)
        share = axis.width // whole
        step = math.lcm(step, grid // math.gcd(grid, share))
    least = max(math.ceil(min_width / (axis.multiple * (axis.width // whole))) for axis in axes)
    first = offset if step == round_to and offset else step  # heads and groups, whose steps are others, stay on the grid
    levels = [t for t in range(first, whole, step) if t >= least]
    coarse = max(1, math.ceil(len(levels) / FINEST))
    levels = [*levels[::coarse], whole]
    return Bundle(axes, whole, levels, len(levels) - 1)


def smallest(coupling: Coupling, round_to: int = 8, min_width: int = 8) -> Cost:
    """The cost of the smallest plan on the grid."""
    kept: dict[int, int] = {}
    bundles, by_atom = coupling.bundles(), {a.atom: a for a in coupling.prunable}
    for together in bundles:
        bundle = _bundle([by_atom[a] for a in together], round_to, min_width)
        kept.update({a.id: bundle.kept(a, 0) for a in bundle.axes})
    return coupling.cost(kept)
