"""The stage that makes a Keras model smaller: of several cuts, each verified and repaired, the nearest to the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coppice.coupling import couple
from coppice.cuts import JUDGED, Cut, Task, best_cut, both_ways, noted, plans, scored, whole_plan
from coppice.deadline import OnTime
from coppice.keras.apply import apply
from coppice.keras.capture import capture
from coppice.keras.evaluate import BATCH, sample
from coppice.keras.recovery import recover, scores_of
from coppice.keras.stages import Bench, example_shape, materialise, stage, store, validate
from coppice.keras.train import reestimate
from coppice.keras.verify import verify
from coppice.latency import latency_model
from coppice.linear import Array
from coppice.planning import Plan, kept_widths
from coppice.snapshot import Snapshot
from coppice.stepwise import is_held_out, of_one_shape


def cut(bench: Bench, name: str, before: Snapshot, budgets: Mapping[str, float]) -> Snapshot:
    """A smaller model within `budgets`."""

    def work() -> Snapshot:
        task = _task(bench, name, before, budgets)
        chosen = best_cut(task, lambda criterion: _cut_by(bench, task, criterion), lambda: _judged(bench), scores_of)
        cost = bench.coupling.cost(kept_widths(bench.coupling, whole_plan(before, chosen)))
        state = store(bench, name, chosen.model)
        return noted(name, before, chosen, cost, state, validate(bench, chosen.model, name))

    return stage(bench, name, work)


def _task(bench: Bench, name: str, before: Snapshot, budgets: Mapping[str, float]) -> Task:
    model = materialise(bench, before)
    coupling = couple(capture(model, example_shape(bench.data))) if before.plan else bench.coupling
    config, predictor = bench.config, None
    if bench.clock is not None:
        predictor = latency_model(coupling, bench.clock.setting, before.cost["latency"], config.min_width)
    return Task(name, model, coupling, budgets, config, bench.progress, predictor, bench.clock)


def _judged(bench: Bench) -> list[Array]:
    return of_one_shape(x for x, _ in sample(bench.data.val, JUDGED, bench.config.seed, BATCH))


def _cut_by(bench: Bench, task: Task, criterion: str) -> Cut:
    """The better of two plans."""

    def given(size: int) -> Iterator[tuple[Array, Array]]:
        return sample(bench.data.train, bench.config.calibration, bench.config.seed, size)

    scores = scored(task, criterion, given, BATCH)
    images = of_one_shape(x for x, _ in given(BATCH))
    cuts = [_made(task, criterion, step, on_time, images) for step, on_time in plans(task, scores, both_ways(scores))]
    return min(cuts, key=lambda cut: cut.loss)


def _made(task: Task, criterion: str, step: Plan, on_time: OnTime | None, images: list[Array]) -> Cut:
    """Cut by a plan, verified; BatchNormalization re-estimated, and layers refitted if that is asked for, where that helps."""
    with task.progress.bar(f"{task.name}: building and verifying"):
        pruned = apply(task.model, step)
        proof = verify(task.model, pruned, task.coupling, step)
    fitted = [x for k, x in enumerate(images) if not is_held_out(k)]

    def mend(edited: Any) -> None:
        reestimate(edited, fitted)

    with task.progress.bar(f"{task.name}: repairing"):
        found = recover(task.model, pruned, task.coupling, step, images, mend, refit=task.config.repair, seed=task.config.seed)
    return Cut(criterion, step, pruned, found, proof, on_time)
