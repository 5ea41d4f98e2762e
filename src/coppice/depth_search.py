"""Depth and width under one target: shallower models to narrow from, each with the modules that lose least for what they save left out.

Every candidate's loss is measured by itself; the order is loss over what it saves of the budgets' excess. Some prefixes of that order, each
of which covers a share of the excess, are then narrowed to the target like the dense model, and the cut whose repaired outputs are nearest
to the dense ones on held-out images is taken: losses of modules don't add up, so no sum of them decides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from coppice.coupling import Coupling, PrunableAxis, couple
from coppice.deadline import Clock
from coppice.errors import CoppiceError
from coppice.latency import LatencyModel, latency_model
from coppice.modules import removable
from coppice.planning import Removal, plan_without
from coppice.removals import PRODUCTS, Removable, clash
from coppice.saliency import Scores
from coppice.torch.apply import apply
from coppice.torch.capture import capture
from coppice.torch.module_scores import module_scores

SHARES = (1 / 3, 2 / 3, 1.0)  # of what a target asks for, saved by modules
BATCHES = 8  # of calibration images that each candidate is judged on: there are many candidates
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
    order = _in_order(model, coupling, images, budgets, predictor, progress)
    for gone in prefixes(order, excess(coupling, budgets, predictor), predictor, coupling):
        plan = plan_without(coupling, gone)
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
    saving = [c for c in removable(coupling) if LEAST * total <= c.macs <= MOST * total]
    layers, others = ([c for c in saving if (c.kind == "layer") is plain] for plain in (True, False))
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
    """What a candidate saves of every cost; its latency by the ops that go, else in proportion to its MACs."""
    cost = coupling.cost()
    itemsize = cost.bytes / max(cost.params, 1)
    found = {"macs": float(candidate.macs), "params": float(candidate.params), "bytes": candidate.params * itemsize}
    if predictor is not None:
        ops = coupling.graph.ops
        places = {ops[k].module for k in candidate.dead if ops[k].rule in PRODUCTS}
        seconds = sum(price.evaluate({}) for price in predictor.ops if price.op.name in places)
        explained = sum(price.evaluate({}) for price in predictor.ops)
        found["latency"] = predictor.dense * (seconds / explained if places else candidate.macs / cost.macs)
    return found


def _in_order(
    model: nn.Module,
    coupling: Coupling,
    images: Sequence[Tensor],
    budgets: Mapping[str, float],
    predictor: LatencyModel | None,
    progress: Callable[[int, int], None],
) -> list[Removable]:
    """The candidates by loss for what they save of the excess, those that clash with an earlier one left out."""
    over, found = excess(coupling, budgets, predictor), worthwhile(coupling)
    losses = module_scores(model, coupling, "loss", images[:BATCHES], found, progress=progress) if found and over else {}
    priced = []
    for candidate in found:
        gain = sum(part / over[key] for key, part in saved(candidate, coupling, predictor).items() if key in over)
        loss = losses.get(candidate.name)
        if loss is not None and gain > 0:
            priced.append((loss / gain, candidate))
    chosen: list[Removable] = []
    for _, candidate in sorted(priced, key=lambda pair: pair[0]):
        if not any(clash(candidate, other) for other in chosen):
            chosen.append(candidate)
    return chosen


def prefixes(
    order: Sequence[Removable], over: Mapping[str, float], predictor: LatencyModel | None, coupling: Coupling
) -> Iterator[list[Removable]]:
    """The shortest beginnings of ``order`` that save each of SHARES of the largest excess, as far as modules go together."""
    got = dict.fromkeys(over, 0.0)
    shares, gone = list(SHARES), list[Removable]()
    for candidate in order:
        try:
            plan_without(coupling, [*gone, candidate])
        except CoppiceError:
            continue  # a concat's last branch, say
        gone.append(candidate)
        for key, part in saved(candidate, coupling, predictor).items():
            if key in got:
                got[key] += part
        reached = min((got[key] / amount for key, amount in over.items()), default=math.inf)
        if shares and reached >= shares[0]:
            yield list(gone)
            shares = [share for share in shares if share > reached]
        if not shares:
            return


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
