"""Regularised training: shrink what could go while the model trains, so that little is lost when it does. On the axes of the analysis.

After every step of the optimiser the weights take a proximal step of a penalty: exact zeros, the same for any optimiser, no term in the
loss. `group-lasso`: over everything an index touches (filters, norms, consumers), by its norm (Wen et al., Structured Sparsity Learning,
NIPS 2016; Fang et al., DepGraph, CVPR 2023). `slimming`: |gamma| of the BatchNorms (Liu et al., Network Slimming, ICCV 2017). `l1`, `l2`:
every weight on an axis that can be cut. `growing`: a rising L2 on the indices that are to go, chosen at the start (Wang et al., Neural
Pruning via Growing Regularization, ICLR 2021). `soft`: the filters of the indices that would go now are set to zero every so often and
may grow back (He et al., Soft Filter Pruning, IJCAI 2018).

Strengths are relative: 1 shrinks an index by its axis's mean norm over the whole training, if the loss does not hold it. `auto` is twice
what takes the last index that has to go for the target down to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

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
from coppice.torch.trees import named_tensors

NEAR_ZERO = 0.05  # of its axis's mean norm at the start: an index below that is as good as gone
_SPARED = 0.05  # of the indices that have to go may be above the automatic strength: a few outliers must not set it for all
_SPREAD = 4.0
_SOFT_CUTS = 20  # of soft pruning, over the whole training
_MARGIN = 2.0  # times the strength that would do if the loss held nothing
_GROWN = 8.0  # what is to go is down to exp(-8) of itself at the end of a growing regularisation of strength 1, if the loss holds nothing


@dataclass(frozen=True, slots=True)
class _Site:
    """A dim of a parameter, and for each of its positions the group (an index of an axis) that lies there, -1 for none."""

    parameter: nn.Parameter
    dim: int
    groups: Tensor
    valid: Tensor

    def sums(self, elements: Tensor, into: Tensor) -> None:
        """Add up `elements`, of the parameter's shape, by group."""
        others = [d for d in range(elements.dim()) if d != self.dim]
        line = elements.sum(others) if others else elements
        into.index_add_(0, self.groups[self.valid], line[self.valid].to(into.dtype))

    def scale(self, factors: Tensor) -> None:
        self.parameter.mul_(self._along(factors, 1.0))

    def soften(self, limits: Tensor) -> None:
        """Every weight nearer to zero by the limit of its group."""
        self.parameter.copy_(self.parameter.sign() * (self.parameter.abs() - self._along(limits, 0.0)).clamp_min(0))

    def _along(self, by_group: Tensor, otherwise: float) -> Tensor:
        line = torch.where(self.valid, by_group[self.groups.clamp_min(0)], otherwise).to(self.parameter.dtype)
        return line.view([-1 if d == self.dim else 1 for d in range(self.parameter.dim())])


class Regulariser:
    """Call `step()` after every `optimizer.step()`; `said()` says how far it is, `plan(...)` makes a plan of what it shrank.

    Made by :func:`regulariser`. It goes along with `coppice.train.fine_tune` as it is.
    """

    def __init__(
        self, model: nn.Module, coupling: Coupling, kind: str, strength: float | None, steps: int, target: Plan | None = None
    ) -> None:
        self.kind, self._coupling, self._steps = kind, coupling, steps
        self._ends = np.cumsum([0, *(axis.width for axis in coupling.prunable)])
        self._sites = _sites(model, coupling, self._ends)
        gammas = _gammas(coupling)
        names = self._names = {id(p): name for name, p in model.named_parameters()}
        self._scored = [s for s in self._sites if kind != "slimming" or names[id(s.parameter)] in gammas]
        self._parameters = list({id(s.parameter): s.parameter for s in self._scored}.values())
        if not self._scored:
            raise CoppiceError(f"{kind}: no BatchNorm with a scale lies on an axis that can be cut, choose another regularisation")
        with torch.no_grad():
            self._counts = self._by_group(torch.ones_like).clamp_min(1)
            start = self._norms()
            self._means = torch.cat([torch.full_like(part, float(part.mean()) or 1.0) for part in self._split(start)])
            self._element_means = {id(p): float(p.abs().mean()) for p in self._parameters}
        self._going = None if target is None else self._gone_by(target)
        self._how_many = [None] * len(coupling.prunable) if self._going is None else [int(part.sum()) for part in self._split(self._going)]
        self.strength = self._automatic() if strength is None else strength
        self._done = torch.zeros((), dtype=torch.int64)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What has to be remembered to go on: where it began is found again from the model that it was made for."""
        return {"done": self._done}

    def after_step(self, done: int, total: int) -> None:
        self._steps = total
        self.step()

    @torch.no_grad()
    def step(self) -> None:
        """One proximal step; the shares of all steps add up to 1, falling by half a cosine as learning rates do."""
        done = int(self._done)
        self._done += 1
        if self.kind == "growing":
            rising = self.strength * _GROWN * 2 * (done + 1) / self._steps**2
            self._scale(torch.where(self._chosen(), 1 / (1 + rising), 1.0).to(self._means.dtype))
            return
        if self.kind == "soft":
            if (done + 1) % max(1, self._steps // _SOFT_CUTS) == 0:
                self._scale_filters((self._pressure(self._norms()) < 1).to(self._means.dtype))
            return
        share = (1 + math.cos(math.pi * min(1.0, (done + 0.5) / self._steps))) / self._steps
        norms = self._norms()
        amounts = self.strength * share * self._pressure(norms)
        if self.kind == "l1":
            for site in self._scored:
                site.soften(amounts * self._element_means[id(site.parameter)])
        elif self.kind == "l2":
            self._scale(1 / (1 + amounts))
        else:
            self._scale((1 - amounts * self._means / norms.clamp_min(1e-30)).clamp_min(0))

    def _pressure(self, norms: Tensor) -> Tensor:
        """How much of the strength is on each index: where a target says how many of each axis have to go, 1 on that many, those that are
        smallest now, and 0 on the others. Else 1 on the smallest of an axis, falling by powers of two to 1 / 2^_SPREAD on the largest
        (DepGraph, section 3.3). All alike would take the axis down as a whole.
        """
        parts = []
        for part, going in zip(self._split(norms), self._how_many, strict=True):
            if going is None:
                low, high = part.min(), part.max()
                parts.append(torch.exp2(-_SPREAD * (part - low) / (high - low).clamp_min(1e-30)))
            else:
                parts.append(torch.zeros_like(part).index_fill_(0, part.argsort(stable=True)[:going], 1.0))
        return torch.cat(parts)

    def said(self) -> str:
        """The sparsity reached: how many indices are near zero, and the MACs that would stay without them."""
        near = self._relative() < NEAR_ZERO
        keep = [~part.numpy() for part in self._split(near.cpu())]
        widths = {axis.id: max(1, int(k.sum())) for axis, k in zip(self._coupling.prunable, keep, strict=True)}
        left = self._coupling.cost(widths).macs / self._coupling.cost().macs
        return f"{100 * float(near.float().mean()):.0f} % of the indices are near zero, {left:.2f} of the MACs would stay without them"

    def scores(self) -> Scores:
        """The norm of each index relative to its axis's mean at the start: for `coppice.plan` with a target."""
        parts = self._split(self._relative().cpu())
        return Scores(
            {axis.id: part.numpy().astype(np.float64) for axis, part in zip(self._coupling.prunable, parts, strict=True)}, additive=False
        )

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

    # --- groups: all indices of all prunable axes, one after the other

    def _by_group(self, elements: Callable[[Tensor], Tensor]) -> Tensor:
        total = torch.zeros(int(self._ends[-1]), dtype=torch.float64, device=self._sites[0].parameter.device)
        for site in self._scored:
            site.sums(elements(site.parameter.detach()), total)
        return total

    def _norms(self) -> Tensor:
        """Root mean square of all weights that an index touches."""
        return (self._by_group(lambda p: p.double().square()) / self._counts).sqrt()

    def _relative(self) -> Tensor:
        with torch.no_grad():
            return self._norms() / self._means

    def _split(self, groups: Tensor) -> list[Tensor]:
        return list(groups.split([axis.width for axis in self._coupling.prunable]))

    def _scale(self, factors: Tensor) -> None:
        for site in self._scored:
            site.scale(factors)

    def _scale_filters(self, factors: Tensor) -> None:
        """What makes an index, and neither its scale nor what reads it: so that gradients can bring it back."""
        reads = {site.name: site.along for site in sites(self._coupling)[0]}
        for site in self._scored:
            if site.parameter.dim() > 1 and site.dim != reads.get(self._names[id(site.parameter)], -1):
                site.scale(factors)

    def _chosen(self) -> Tensor:
        if self._going is None:
            raise CoppiceError("growing regularisation has to know what is to go: give it a target")
        return self._going

    def _gone_by(self, plan: Plan) -> Tensor:
        kept = {axis.name: axis.keep for axis in plan.axes}
        gone = [~np.isin(np.arange(axis.width), kept[axis.name]) for axis in self._coupling.prunable]
        return torch.from_numpy(np.concatenate(gone)).to(self._means.device)

    def _automatic(self) -> float:
        if self.kind in ("growing", "soft"):
            return 1.0
        if self.kind == "l2":
            return _GROWN  # it never takes anything to zero: as far down as growing does
        going = self._relative()[self._chosen()]
        return _MARGIN * float(going.quantile(1 - _SPARED)) if len(going) else 0.0


def regulariser(
    model: nn.Module,
    coupling: Coupling,
    kind: str = "group-lasso",
    *,
    steps: int,
    target: Mapping[str, float] | None = None,
    strength: float | str = "auto",
    round_to: int = 8,
    min_width: int = 8,
) -> Regulariser:
    """A regulariser for a training of `steps` steps, in a loop of your own: `reg.step()` after every `optimizer.step()`.

    `target`: absolute budgets as for `coppice.plan` (`{"macs": 0.5 * coupling.cost().macs}`), on whose grid it is worked out how many
    indices have to go, and an automatic `strength`. CoppiceError for an unknown kind, a strength that is none, or nothing to regularise.
    """
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
        return Regulariser(model, coupling, kind, given, steps)
    norms = Regulariser(model, coupling, kind, 1.0, steps).scores()
    return Regulariser(model, coupling, kind, given, steps, make_plan(coupling, norms, target, round_to=round_to, min_width=min_width))


def read_strength(text: float | str) -> float:
    """A number above zero. Raises CoppiceError."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < 1e6:
        raise CoppiceError(f"the strength is {text}: write auto, or a number above 0")
    return found


def _sites(model: nn.Module, coupling: Coupling, ends: Array) -> list[_Site]:
    first = {axis.atom: int(start) for axis, start in zip(coupling.prunable, ends, strict=False)}
    tensors = named_tensors(model)
    found = []
    for value in coupling.graph.weights():
        parameter = tensors.get(value.names[0])
        if value.kind is not Kind.PARAMETER or not isinstance(parameter, nn.Parameter) or not parameter.requires_grad:
            continue
        for dim, axis in enumerate(coupling.dims[value.id]):
            for groups in _groups(axis, first):
                where = torch.from_numpy(groups).to(parameter.device)
                found.append(_Site(parameter, dim, where, where >= 0))
    return found


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
