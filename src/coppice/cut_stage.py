"""The stage that makes a PyTorch model smaller: of several cuts, each verified and repaired, the nearest to the dense model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace

from torch import Tensor, nn

from coppice.cost import Cost
from coppice.coupling import couple
from coppice.cuts import JUDGED, Cut, Task, best_cut, both_ways, noted, plans, scored, whole_plan
from coppice.data import sample_batches
from coppice.deadline import OnTime
from coppice.depth_search import shallower
from coppice.errors import UnreachableError
from coppice.evaluate import reestimate_batchnorm
from coppice.latency import latency_model
from coppice.linear import Array
from coppice.mending import Recovery
from coppice.planning import Plan, kept_widths
from coppice.recovery import outputs, recover
from coppice.run import Json
from coppice.saliency import Scores
from coppice.snapshot import Snapshot, as_snapshot
from coppice.stages import REPAIRED_AT_ONCE, Workbench, calibration_images, example_input, materialise, preprocessing, validate
from coppice.torch.apply import apply
from coppice.torch.capture import capture
from coppice.torch.linear import array_of
from coppice.torch.program import is_held_out, of_one_shape
from coppice.torch.verify import verify

Made = Callable[[Plan, OnTime | None], Cut]


def cut(bench: Workbench, name: str, before: Snapshot, budgets: Mapping[str, float]) -> Snapshot:
    """Score, plan, apply, verify, repair: a smaller model within `budgets`."""

    def work() -> Json:
        task = _task(bench, name, before, budgets)
        chosen = best_cut(task, lambda criterion: _cut_by(bench, task, criterion), lambda: _judged(bench), _answers)
        cost = _cost(bench, whole_plan(before, chosen), chosen.model)
        state = bench.run.save_state(name, chosen.model.state_dict())
        return asdict(noted(name, before, chosen, cost, state, validate(bench, chosen.model, name)))

    return as_snapshot(bench.run.stage(name, work))


def _task(bench: Workbench, name: str, before: Snapshot, budgets: Mapping[str, float]) -> Task:
    model = materialise(bench, before)
    coupling = couple(capture(model, (example_input(bench.data),))) if before.plan else bench.coupling
    config, predictor = bench.run.config, None
    if bench.clock is not None:
        with bench.progress.bar("timing the ops of the model one by one") as advance:
            predictor = latency_model(coupling, bench.clock.setting, before.cost["latency"], config.min_width, progress=advance)
    return Task(name, model, coupling, budgets, config, bench.progress, predictor, bench.clock)


def _cost(bench: Workbench, plan: Plan, model: nn.Module) -> Cost:
    """What `model`, which `plan` made, costs."""
    if plan.removed is not None or plan.then is not None:
        return couple(capture(model, (example_input(bench.data),))).cost()
    return bench.coupling.cost(kept_widths(bench.coupling, plan))


def _judged(bench: Workbench) -> list[Tensor]:
    data, seed = bench.data, bench.run.config.seed
    found = sample_batches(data.val, preprocessing(data), images=JUDGED, seed=seed, batch_size=REPAIRED_AT_ONCE)
    return of_one_shape(x for x, _ in found)


def _answers(model: nn.Module, images: list[Tensor]) -> Array:
    return array_of(outputs(model, images))


def _cut_by(bench: Workbench, task: Task, criterion: str) -> Cut:
    """The better of two plans, or of those that also have fewer modules."""

    def given(batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        return calibration_images(bench, batch_size)

    scores = scored(task, criterion, given, REPAIRED_AT_ONCE)

    def made(step: Plan, on_time: OnTime | None) -> Cut:
        with bench.progress.bar(f"{task.name}: building and verifying"):
            pruned = apply(task.model, step)
            verification = verify(task.model, pruned, task.coupling, step)
        with bench.progress.bar(f"{task.name}: repairing"):
            return Cut(criterion, step, *_repaired(bench, task, pruned, step), verification, on_time)

    try:
        cuts = [made(*found) for found in plans(task, scores, both_ways(scores))]
    except UnreachableError as error:
        if not task.config.depth:
            raise
        cuts, out_of_reach = [], error
    if task.config.depth:
        cuts += _shallower_cuts(bench, task, scores, lambda one: scored(one, criterion, given, REPAIRED_AT_ONCE), made)
    if not cuts:
        raise out_of_reach
    return min(cuts, key=lambda cut: cut.loss)


def _shallower_cuts(bench: Workbench, task: Task, scores: Scores, score: Callable[[Task], Scores], made: Made) -> list[Cut]:
    """The same budgets by fewer modules and wider layers, for as long as the next such cut is better than the one before."""
    images = of_one_shape(x for x, _ in calibration_images(bench, REPAIRED_AT_ONCE))
    cuts: list[Cut] = []
    with bench.progress.bar(f"{task.name}: measuring what the model loses with each module") as advance:
        found = shallower(
            task.model, task.coupling, images, task.budgets, lambda m, c: score(replace(task, model=m, coupling=c)), scores, task.predictor,
            task.clock, task.config.min_width, advance,
        )  # fmt: skip
        first = next(found, None)
    for shallow in () if first is None else itertools.chain((first,), found):
        smaller = replace(task, model=shallow.model, coupling=shallow.coupling, predictor=shallow.predictor)
        try:
            ((step, on_time),) = plans(smaller, shallow.scores, (False,))
        except UnreachableError:
            continue
        cuts.append(made(replace(step, removed=shallow.removed), on_time))
        gone = f"without {', '.join(shallow.removed.names)}"
        bench.progress.say(f"{task.name}: {gone}: distance from the dense outputs {cuts[-1].loss:.3f} (held out)")
        if len(cuts) > 1 and cuts[-1].loss > cuts[-2].loss:
            break
    return cuts


def _repaired(bench: Workbench, task: Task, pruned: nn.Module, step: Plan) -> tuple[nn.Module, Recovery]:
    images = of_one_shape(x for x, _ in calibration_images(bench, REPAIRED_AT_ONCE))
    fitted = [x for k, x in enumerate(images) if not is_held_out(k)]

    def reestimate(edited: nn.Module) -> None:
        reestimate_batchnorm(edited, [(x, x) for x in fitted], None, images=task.config.calibration)

    return recover(task.model, pruned, task.coupling, step, images, reestimate, refit=task.config.repair, seed=task.config.seed)
