"""What the stage that cuts does for a model of either framework: score, plan, keep the best of several cuts, note it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from coppice.allocate import plan as make_plan
from coppice.config import MEASURED, RunConfig
from coppice.cost import Cost
from coppice.coupling import Coupling
from coppice.criteria import AUTO, CRITERIA, TRIED, measure, score
from coppice.deadline import Clock, OnTime, plan_on_time
from coppice.latency import LatencyModel
from coppice.linear import Array
from coppice.mending import Recovery, divergence, least
from coppice.planning import Plan, compose
from coppice.progress import Progress
from coppice.saliency import Scores
from coppice.snapshot import Snapshot
from coppice.verification import Verification

JUDGED = 1024  # validation images that criteria are compared on
_Timed = tuple[Plan, OnTime | None]


@dataclass(frozen=True)
class Task:
    """What is to be cut, to which budgets, and how; `predictor` and `clock` where a budget is of time. `name`: of the stage."""

    name: str
    model: Any
    coupling: Coupling
    budgets: Mapping[str, float]
    config: RunConfig
    progress: Progress
    predictor: LatencyModel | None = None
    clock: Clock | None = None


@dataclass(frozen=True)
class Cut:
    """A verified and repaired cut by one criterion; `loss` is its distance from the dense outputs on held-out calibration images."""

    criterion: str
    plan: Plan
    model: Any
    recovery: Recovery
    verification: Verification
    on_time: OnTime | None

    @property
    def loss(self) -> float:
        return dict(self.recovery.tried)[self.recovery.kept]


def best_cut(task: Task, cut_by: Callable[[str], Cut], judged: Callable[[], list[Any]], answers: Callable[[Any, list[Any]], Array]) -> Cut:
    """The cut by the criterion that was asked for; with "auto" that of several whose repaired model is nearest to the dense one.

    `judged`: validation images, since what is left of the calibration images is enough to tell repairs apart, but not criteria;
    `answers`: what a model says of them.
    """
    cuts = []
    for criterion in TRIED if task.config.criterion == AUTO else (task.config.criterion,):
        cuts.append(cut_by(criterion))
        said = cuts[-1].recovery
        change = f"{dict(said.tried)['as cut']:.3f} -> {cuts[-1].loss:.3f}"
        task.progress.say(f"{task.name} by {criterion}: {said.kept}: distance from the dense outputs {change} (held out)")
        if said.refused:
            task.progress.say(f"{task.name}: layers were not refitted: {said.refused}")
    if task.config.criterion != AUTO:
        return cuts[0]
    with task.progress.bar(f"{task.name}: comparing the criteria on validation images"):
        images = judged()
        goal = answers(task.model, images)
        distances = {cut.criterion: divergence(answers(cut.model, images), goal, temperature=1.0) for cut in cuts}
    best = least(distances)
    each = ", ".join(f"{criterion} {distance:.3f}" for criterion, distance in distances.items())
    task.progress.say(f"{task.name}: {best} it is; distance from the dense outputs on validation images: {each}")
    return next(cut for cut in cuts if cut.criterion == best)


def scored(task: Task, criterion: str, images: Callable[[int], Iterable[Any]], at_once: int) -> Scores:
    """Scores by `criterion`. `images`: the calibration images in batches of a size; `at_once`: that of batches that need no gradients."""
    config = task.config
    with task.progress.bar(f"{task.name}: scoring by {criterion}"):
        given = images(CRITERIA[criterion].batch or 1)
        scores = score(task.model, task.coupling, criterion, given, None, config.seed, config.aggregation, config.normalization)
    if config.allocation == MEASURED and criterion != "obs":  # whose scores are measured losses already
        with task.progress.bar(f"{task.name}: measuring what each axis can lose"):
            scores = measure(task.model, task.coupling, scores, images(at_once), config.seed)
    return scores


def both_ways(scores: Scores) -> tuple[bool, ...]:
    """Losses that were measured axis by axis don't add up exactly, so both ways of adding are tried; scores have one."""
    return (False, True) if scores.additive else (False,)


def plans(task: Task, scores: Scores, ways: Sequence[bool]) -> list[_Timed]:
    """For each of `ways` the plan that looks back (True) or does not, if it is another one; for milliseconds, each as it was timed."""
    config = task.config
    allocation = "global" if config.allocation == MEASURED else config.allocation
    found: list[_Timed] = []
    for spare in ways:
        if task.clock is None or task.predictor is None:
            plan = make_plan(task.coupling, scores, task.budgets, allocation, config.round_to, config.min_width, spare)
            found.append((plan, None))
            continue
        with task.progress.bar(f"{task.name}: planning and timing"):
            on_time = plan_on_time(
                task.model, task.coupling, scores, task.budgets, task.clock, task.predictor,
                allocation=allocation, round_to=config.round_to, min_width=config.min_width, spare=spare,
            )  # fmt: skip
        task.progress.say(f"{task.name}: {on_time.said(task.budgets['latency'])}")
        found.append((on_time.plan, on_time))
    return found if found[0][0] != found[-1][0] else found[:1]


def whole_plan(before: Snapshot, chosen: Cut) -> Plan:
    """From the dense model to what the cut made."""
    return compose(Plan.from_json(before.plan), chosen.plan) if before.plan else chosen.plan


def noted(name: str, before: Snapshot, chosen: Cut, cost: Cost, state: Mapping[str, str], val: Mapping[str, Any]) -> Snapshot:
    """What the stage ends with; `cost` but for the time, which the cut knows."""
    timed = replace(cost, latency=chosen.on_time.timed.seconds if chosen.on_time else None)
    return Snapshot(
        name,
        whole_plan(before, chosen).to_json(),
        state,
        timed.to_dict(),
        val,
        checks=[*before.checks, *(f"{name}: {line}" for line in chosen.verification.checked)],
        max_error=max(before.max_error, chosen.verification.max_error),
        recovery=asdict(chosen.recovery) | {"criterion": chosen.criterion},
        latency=chosen.on_time.to_dict() if chosen.on_time else None,
        regularised=before.regularised,
    )
