"""The stage that makes a Keras model smaller: of several cuts, each verified and repaired, the nearest to the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from coppice.allocate import plan as make_plan
from coppice.config import MEASURED
from coppice.coupling import Coupling, couple
from coppice.criteria import AUTO, CRITERIA, TRIED, measure, score
from coppice.deadline import OnTime, plan_on_time
from coppice.keras.apply import apply
from coppice.keras.capture import capture
from coppice.keras.evaluate import BATCH, sample
from coppice.keras.recovery import recover, scores_of
from coppice.keras.rehearsal import JUDGED
from coppice.keras.stages import Bench, example_shape, materialise, stage, store, validate
from coppice.keras.train import reestimate
from coppice.keras.verify import verify
from coppice.latency import LatencyModel, latency_model
from coppice.linear import Array
from coppice.mending import Recovery, divergence, least
from coppice.planning import Plan, compose, kept_widths
from coppice.saliency import Scores
from coppice.snapshot import Snapshot
from coppice.stepwise import is_held_out, of_one_shape
from coppice.verification import Verification


def cut(bench: Bench, name: str, before: Snapshot, budgets: Mapping[str, float]) -> Snapshot:
    """A smaller model within `budgets`."""

    def work() -> Snapshot:
        model = materialise(bench, before)
        coupling = couple(capture(model, example_shape(bench.data))) if before.plan else bench.coupling
        predictor = _predictor(bench, coupling, before)
        chosen = _best_cut(bench, name, model, coupling, budgets, predictor)
        whole = compose(Plan.from_json(before.plan), chosen.plan) if before.plan else chosen.plan
        on_time = chosen.on_time
        cost = replace(bench.coupling.cost(kept_widths(bench.coupling, whole)), latency=on_time.timed.seconds if on_time else None)
        checks = [*before.checks, *(f"{name}: {line}" for line in chosen.verification.checked)]
        state = store(bench, name, chosen.model)
        val = validate(bench, chosen.model, name)
        worst, said = max(before.max_error, chosen.verification.max_error), asdict(chosen.recovery) | {"criterion": chosen.criterion}
        return Snapshot(
            name, whole.to_json(), state, cost.to_dict(), val, checks=checks, max_error=worst, recovery=said,
            latency=on_time.to_dict() if on_time else None, regularised=before.regularised,
        )  # fmt: skip

    return stage(bench, name, work)


@dataclass(frozen=True)
class _Cut:
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


def _predictor(bench: Bench, coupling: Coupling, before: Snapshot) -> LatencyModel | None:
    """What any cut of the model will take, where the target asks for that."""
    if bench.clock is None:
        return None
    return latency_model(coupling, bench.clock.setting, before.cost["latency"], bench.config.min_width)


def _best_cut(
    bench: Bench, name: str, model: Any, coupling: Coupling, budgets: Mapping[str, float], predictor: LatencyModel | None
) -> _Cut:
    """The cut by the criterion that was asked for; with "auto" that of several whose repaired model is nearest to the dense one."""
    asked = bench.config.criterion
    cuts = []
    for criterion in TRIED if asked == AUTO else (asked,):
        cuts.append(_cut_by(bench, name, criterion, model, coupling, budgets, predictor))
        said = cuts[-1].recovery
        change = f"{dict(said.tried)['as cut']:.3f} -> {cuts[-1].loss:.3f}"
        bench.progress.say(f"{name} by {criterion}: {said.kept}: distance from the dense outputs {change} (held out)")
        if said.refused:
            bench.progress.say(f"{name}: layers were not refitted: {said.refused}")
    if asked != AUTO:
        return cuts[0]
    with bench.progress.bar(f"{name}: comparing the criteria on validation images"):
        images = of_one_shape(x for x, _ in sample(bench.data.val, JUDGED, bench.config.seed, BATCH))
        goal = scores_of(model, images)
        distances = {cut.criterion: divergence(scores_of(cut.model, images), goal, temperature=1.0) for cut in cuts}
    best = least(distances)
    each = ", ".join(f"{criterion} {distance:.3f}" for criterion, distance in distances.items())
    bench.progress.say(f"{name}: {best} it is; distance from the dense outputs on validation images: {each}")
    return next(cut for cut in cuts if cut.criterion == best)


def _cut_by(
    bench: Bench, name: str, criterion: str, model: Any, coupling: Coupling, budgets: Mapping[str, float], predictor: LatencyModel | None
) -> _Cut:
    """The better of two plans: losses that were measured axis by axis don't add up exactly, so both ways of adding them are tried."""
    config, scores = bench.config, _scores(bench, name, criterion, model, coupling)
    ways = (False, True) if scores.additive else (False,)  # only losses can be looked back at
    plans = [_plan(bench, name, model, coupling, scores, budgets, predictor, spare) for spare in ways]
    images = of_one_shape(x for x, _ in sample(bench.data.train, config.calibration, config.seed, BATCH))
    different = plans if plans[0][0] != plans[-1][0] else plans[:1]
    cuts = [_made(bench, name, criterion, model, coupling, step, on_time, images) for step, on_time in different]
    return min(cuts, key=lambda cut: cut.loss)


def _plan(
    bench: Bench, name: str, model: Any, coupling: Coupling, scores: Scores, budgets: Mapping[str, float],
    predictor: LatencyModel | None, spare: bool,
) -> tuple[Plan, OnTime | None]:  # fmt: skip
    """A plan within the budgets; for milliseconds, as it was timed."""
    config = bench.config
    allocation = "global" if config.allocation == MEASURED else config.allocation
    if bench.clock is None or predictor is None:
        return make_plan(coupling, scores, budgets, allocation, config.round_to, config.min_width, spare), None
    with bench.progress.bar(f"{name}: planning and timing"):
        found = plan_on_time(
            model, coupling, scores, budgets, bench.clock, predictor,
            allocation=allocation, round_to=config.round_to, min_width=config.min_width, spare=spare,
        )  # fmt: skip
    bench.progress.say(f"{name}: {found.said(budgets['latency'])}")
    return found.plan, found


def _scores(bench: Bench, name: str, criterion: str, model: Any, coupling: Coupling) -> Scores:
    config = bench.config

    def images(size: int) -> Iterator[tuple[Array, Array]]:
        return sample(bench.data.train, config.calibration, config.seed, size)

    with bench.progress.bar(f"{name}: scoring by {criterion}"):
        batch = CRITERIA[criterion].batch
        given = images(batch) if batch else None
        scores = score(model, coupling, criterion, given, None, config.seed, config.aggregation, config.normalization)
    if config.allocation == MEASURED and criterion != "obs":  # whose scores are measured losses already
        with bench.progress.bar(f"{name}: measuring what each axis can lose"):
            scores = measure(model, coupling, scores, images(BATCH), config.seed)
    return scores


def _made(
    bench: Bench, name: str, criterion: str, model: Any, coupling: Coupling, step: Plan, on_time: OnTime | None, images: list[Array]
) -> _Cut:
    """Cut by a plan, verified; BatchNormalization re-estimated, and layers refitted if that is asked for, where that helps."""
    with bench.progress.bar(f"{name}: building and verifying"):
        pruned = apply(model, step)
        proof = verify(model, pruned, coupling, step)
    fitted = [x for k, x in enumerate(images) if not is_held_out(k)]
    with bench.progress.bar(f"{name}: repairing"):
        found = recover(
            model, pruned, coupling, step, images, lambda edited: reestimate(edited, fitted), refit=bench.config.repair,
            seed=bench.config.seed,
        )  # fmt: skip
    return _Cut(criterion, step, pruned, found, proof, on_time)
