"""Depth and width under one target: shallower models to narrow from, each without the modules that lose least for what they save.

Every candidate's loss is measured by itself. For some shares of what a target asks for, the modules that save so much at the least sum of
losses are found by dynamic programming over the forward pass (as LayerMerge does for a chain of layers: Kim et al., ICML 2024). Each such
model is then narrowed to the target like the dense one, and the cut whose repaired outputs are nearest to the dense ones on held-out
images is taken: losses of modules don't add up, so no sum of them decides.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from coppice.coupling import Coupling, PrunableAxis, couple
from coppice.deadline import Clock
from coppice.errors import CoppiceError
from coppice.latency import LatencyModel, latency_model
from coppice.microbench import OpShape
from coppice.modules import removable
from coppice.optable import OpTable
from coppice.planning import Removal, plan_without
from coppice.removals import PRODUCTS, Composed, Removable
from coppice.saliency import Scores
from coppice.torch.apply import apply
from coppice.torch.capture import capture
from coppice.torch.module_scores import module_scores

SHARES = (1 / 3, 2 / 3, 1.0)  # of what a target asks for, saved by modules
BATCHES = 8  # of calibration images that each candidate is judged on: there are many candidates
STEPS = 400  # amounts saved that are told apart
LEAST = 0.002  # of the MACs: what saves less is left to the widths
MOST = 0.5  # of the MACs: what is more than that is the network


@dataclass(frozen=True)
class Shallow:
    """A model without some modules, before it is narrowed, with scores for its axes and, for a latency, what predicts that."""

    removed: Removal
    model: nn.Module
    coupling: Coupling
    scores: Scores
    predictor: LatencyModel | None


def shallower(
    model: nn.Module,
    coupling: Coupling,
    images: Sequence[Tensor],
    budgets: Mapping[str, float],
    scored: Callable[[nn.Module, Coupling], Scores],
    scores: Scores,
    predictor: LatencyModel | None,
    clock: Clock | None,
    least: int,
    progress: Callable[[int, int], None],
) -> Iterator[Shallow]:
    """Models with ever fewer modules. ``scores`` are those of the dense model's axes; ``scored`` scores a model that has others."""
    over = excess(coupling, budgets, predictor)
    priced = _measured(model, coupling, images, over, predictor, progress) if over else []
    tried: list[list[Removable]] = []
    for share in SHARES:
        gone = cheapest(priced, share)
        if gone is None or gone in tried:
            continue
        tried.append(gone)
        try:
            plan = plan_without(coupling, gone)
        except CoppiceError:  # all branches of a concat, say: apart in the forward pass, and yet one must stay
            continue
        shallow = apply(model, plan)
        here = couple(capture(shallow, coupling.graph.origin.inputs))
        timed = None
        if clock is not None and predictor is not None:
            timed = latency_model(here, clock.setting, clock.time(shallow).seconds, least)
        assert plan.removed is not None
        yield Shallow(plan.removed, shallow, here, carried(coupling, here, scores) or scored(shallow, here), timed)


def worthwhile(coupling: Coupling) -> list[Removable]:
    """The candidates that a search looks at: those that save MACs, without plain layers inside or around another one."""
    total = coupling.cost().macs
    saving = [c for c in removable(coupling) if c.composed is not None or LEAST * total <= c.macs <= MOST * total]
    layers, others = ([c for c in saving if c.dead and (c.kind == "layer") is plain] for plain in (True, False))
    alone = [c for c in layers if not any(c.dead <= o.dead or o.dead <= c.dead for o in others)]
    doubled = {c for c in alone for o in alone if c.dead < o.dead and c.macs == o.macs}
    return [c for c in saving if c.kind != "layer" or (c in alone and c not in doubled)]


def excess(coupling: Coupling, budgets: Mapping[str, float], predictor: LatencyModel | None) -> dict[str, float]:
    """By how much the model exceeds each budget that it exceeds."""
    cost = coupling.cost().to_dict()
    if predictor is not None:
        cost["latency"] = predictor.dense
    return {key: cost[key] - budget for key, budget in budgets.items() if cost[key] > budget}


def saved(candidate: Removable, coupling: Coupling, predictor: LatencyModel | None) -> dict[str, float]:
    """What a candidate saves of every cost; its latency by the ops that go, and by that of the one that two become."""
    cost = coupling.cost()
    itemsize = cost.bytes / max(cost.params, 1)
    found = {"macs": float(candidate.macs), "params": float(candidate.params), "bytes": candidate.params * itemsize}
    if predictor is not None:
        found["latency"] = _seconds_saved(candidate, coupling, predictor)
    return found


def _seconds_saved(candidate: Removable, coupling: Coupling, predictor: LatencyModel) -> float:
    ops, made = coupling.graph.ops, candidate.composed
    gone = candidate.dead if made is None else {made.first, made.second}
    places = {ops[k].module for k in gone if ops[k].rule in PRODUCTS}
    seconds = sum(price.evaluate({}) for price in predictor.ops if price.op.name in places)
    scale = predictor.dense / sum(price.evaluate({}) for price in predictor.ops)
    if made is not None:
        seconds -= predictor.ops[0].scale * sum(OpTable.of_this_machine(*_where(predictor)).seconds([_shape(made, coupling, predictor)]))
    elif not places:  # a stride that moved, or a pooling
        return predictor.dense * candidate.macs / coupling.cost().macs
    return seconds * scale


def _where(predictor: LatencyModel) -> tuple[str, int]:
    return predictor.setting.runtime, predictor.setting.threads


def _shape(made: Composed, coupling: Coupling, predictor: LatencyModel) -> OpShape:
    """The composed layer as an op that a runtime can be timed on."""
    first, second = (next(p for p in predictor.ops if p.op.name == coupling.graph.ops[k].module) for k in (made.first, made.second))
    if not made.kernel:
        return OpShape("linear", (first.sizes({})[0], made.inputs, made.outputs))
    one = (1,) * len(made.kernel)
    return OpShape(
        "conv", (first.sizes({})[0], made.groups, made.inputs, made.outputs), first.op.shape.space, made.kernel, made.stride, made.padding,
        one, second.op.shape.activation,
    )  # fmt: skip


def _measured(
    model: nn.Module,
    coupling: Coupling,
    images: Sequence[Tensor],
    over: Mapping[str, float],
    predictor: LatencyModel | None,
    progress: Callable[[int, int], None],
) -> list[Priced]:
    """Every candidate with what it saves of the excess, and its loss."""
    gains = {c: min(part / over[k] for k, part in saved(c, coupling, predictor).items() if k in over) for c in worthwhile(coupling)}
    found = [c for c, gain in gains.items() if gain > 0]
    losses = module_scores(model, coupling, "loss", images[:BATCHES], found, progress=progress) if found else {}
    return [Priced(c, gains[c], max(loss, 0.0)) for c in found if (loss := losses[c.name]) is not None]


@dataclass(frozen=True)
class Priced:
    """A candidate, the part of the excess that it saves, and its loss."""

    candidate: Removable
    gain: float
    loss: float


def cheapest(priced: Sequence[Priced], share: float) -> list[Removable] | None:
    """The candidates that save ``share`` of the excess at the least sum of losses; None where they can't.

    Dynamic programming over the forward pass: candidates are spans of ops, of which no two taken overlap, and for every amount saved so far
    (in STEPS of the share) the least loss is kept.
    """
    ends = sorted(priced, key=lambda p: p.candidate.span[1])
    starts = [p.candidate.span[1] for p in ends]
    nothing: tuple[int, ...] = ()
    best = [[(0.0, nothing)] + [(math.inf, nothing)] * STEPS]
    for k, p in enumerate(ends):
        before = best[bisect_right(starts, p.candidate.span[0], 0, k)]
        row = list(best[k])
        step = int(STEPS * p.gain / share)
        for amount, (loss, taken) in enumerate(before):
            at = min(STEPS, amount + step)
            if loss + p.loss < row[at][0]:
                row[at] = (loss + p.loss, (*taken, k))
        best.append(row)
    loss, taken = best[-1][STEPS]
    return [ends[k].candidate for k in taken] if math.isfinite(loss) else None


def carried(dense: Coupling, shallow: Coupling, scores: Scores) -> Scores | None:
    """The dense model's scores for the axes of a shallower one; None where it has others."""
    by_site: dict[tuple[str, int], list[PrunableAxis]] = {}
    for axis in dense.prunable:
        for site in axis.sites:
            by_site.setdefault(site, []).append(axis)
    found = {}
    for axis in shallow.prunable:
        shared = Counter(other.id for site in axis.sites for other in by_site.get(site, ()) if other.width == axis.width)
        (best, times), *others = shared.most_common(2) or [(-1, 0)]
        if times < len(axis.sites) or (others and others[0][1] == times):
            return None
        found[axis.id] = scores[best]
    return Scores(found, scores.additive)
