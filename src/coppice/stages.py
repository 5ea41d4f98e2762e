"""What stages of the loop do: measure the dense model, cut and repair, measure on the test split; and what they all work with.

Each stage begins from what the stages before it left on disk and ends by writing what the next one needs; see `coppice.run`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coppice.allocate import plan as make_plan
from coppice.config import MEASURED
from coppice.cost import Cost
from coppice.coupling import Coupling, couple
from coppice.criteria import AUTO, CRITERIA, TRIED, measure, score
from coppice.data import ImageData, Loaders, batches, sample_batches
from coppice.deadline import Clock, OnTime, plan_on_time, start_clock
from coppice.depth_search import shallower
from coppice.errors import CoppiceError, UnreachableError
from coppice.evaluate import evaluate, reestimate_batchnorm
from coppice.forward import device_of
from coppice.latency import LatencyModel, latency_model
from coppice.mending import Recovery, least
from coppice.metrics import Metrics
from coppice.parallel import current
from coppice.planning import Plan, compose, kept_widths
from coppice.progress import Progress
from coppice.recovery import outputs, recover
from coppice.run import Json, Run
from coppice.saliency import Scores
from coppice.snapshot import Snapshot, as_snapshot
from coppice.timing import Setting
from coppice.torch.apply import apply, build
from coppice.torch.capture import capture
from coppice.torch.elimination import divergence
from coppice.torch.program import is_held_out, of_one_shape
from coppice.torch.verify import verify
from coppice.verification import Verification

REPAIRED_AT_ONCE = 32  # images in step: few enough for large maps to fit in memory, many enough for small ones to keep a core busy
JUDGED = 1024  # validation images that criteria are compared on
Data = ImageData | Loaders
_CPU = torch.device("cpu")
TrainFunction = Callable[[nn.Module, int], None]
"""A user's own training: (model, epochs) -> None, in place."""


@dataclass(frozen=True)
class Workbench:
    """What every stage works with. `dense` stays as it is; `coupling` is the dense model's."""

    dense: nn.Module
    data: Data
    coupling: Coupling
    cost: Cost
    run: Run
    progress: Progress
    train: TrainFunction | None
    clock: Clock | None = None  # where the target asks for a latency; the first process's alone
    device: torch.device = _CPU  # of training and evaluation


def preprocessing(data: Data) -> Any:
    """None for a user's own loaders: their batches are model inputs already."""
    return data.preprocess if isinstance(data, ImageData) else None


def example_input(data: Data, images: int = 1) -> Tensor:
    """The first validation images as a model input (float32, NCHW). Raises CoppiceError if there is none."""
    order = range(min(images, len(data.val))) if isinstance(data, ImageData) else None
    first = next(iter(batches(data.val, preprocessing(data), batch_size=images, order=order)), None)
    if first is None:
        raise CoppiceError("the validation data is empty: there is nothing to decide on")
    return first[0][:images]


def dense_snapshot(bench: Workbench) -> Snapshot:
    """The model as it came, on the validation split."""

    def measure() -> Json:
        return asdict(Snapshot("dense", None, None, bench.cost.to_dict(), validate(bench, bench.dense, "dense")))

    return as_snapshot(bench.run.stage("dense", measure, shared=True))


def on_the_clock(bench: Workbench, setting: Setting) -> Workbench:
    """The same with a clock for the target's latency; the dense model is timed once a run."""
    shape = tuple(example_input(bench.data).shape[1:])
    folder = bench.run.state_path("dense").parent

    def work() -> Json:
        with bench.progress.bar(f"timing the dense model ({setting})"):
            return {"seconds": start_clock(setting, shape, bench.dense, folder).seconds}

    seconds = bench.run.stage("dense latency", work)["seconds"]
    clock = start_clock(setting, shape, bench.dense, folder, seconds) if current().rank == 0 else None
    return replace(bench, clock=clock, cost=replace(bench.cost, latency=seconds))


def cut(bench: Workbench, name: str, before: Snapshot, budgets: Mapping[str, float]) -> Snapshot:
    """Score, plan, apply, verify, repair: a smaller model within `budgets`."""

    def work() -> Json:
        model = materialise(bench, before)
        coupling = couple(capture(model, (example_input(bench.data),))) if before.plan else bench.coupling
        predictor = _predictor(bench, coupling, before)
        chosen = _best_cut(bench, name, model, coupling, budgets, predictor)
        whole = compose(Plan.from_json(before.plan), chosen.plan) if before.plan else chosen.plan
        seconds = chosen.on_time.timed.seconds if chosen.on_time else None
        cost = replace(_cost(bench, whole, chosen.model), latency=seconds)
        state = bench.run.save_state(name, chosen.model.state_dict())
        val = validate(bench, chosen.model, name)
        return asdict(
            Snapshot(
                name,
                whole.to_json(),
                state,
                cost.to_dict(),
                val,
                checks=[*before.checks, *(f"{name}: {line}" for line in chosen.verification.checked)],
                max_error=max(before.max_error, chosen.verification.max_error),
                recovery=asdict(chosen.recovery) | {"criterion": chosen.criterion},
                latency=chosen.on_time.to_dict() if chosen.on_time else None,
                regularised=before.regularised,
            )
        )

    return as_snapshot(bench.run.stage(name, work))


def _cost(bench: Workbench, plan: Plan, model: nn.Module) -> Cost:
    """What ``model``, which ``plan`` made, costs."""
    if plan.removed is not None or plan.then is not None:
        return couple(capture(model, (example_input(bench.data),))).cost()
    return bench.coupling.cost(kept_widths(bench.coupling, plan))


@dataclass(frozen=True)
class _Cut:
    """A verified and repaired cut by one criterion; `loss` is its distance from the dense outputs on held-out calibration images."""

    criterion: str
    plan: Plan
    model: nn.Module
    recovery: Recovery
    verification: Verification
    on_time: OnTime | None

    @property
    def loss(self) -> float:
        return dict(self.recovery.tried)[self.recovery.kept]


def _predictor(bench: Workbench, coupling: Coupling, before: Snapshot) -> LatencyModel | None:
    """What any cut of the model will take, where the target asks for that."""
    if bench.clock is None:
        return None
    with bench.progress.bar("timing the ops of the model one by one") as advance:
        return latency_model(coupling, bench.clock.setting, before.cost["latency"], bench.run.config.min_width, progress=advance)


def _best_cut(
    bench: Workbench, name: str, model: nn.Module, coupling: Coupling, budgets: Mapping[str, float], predictor: LatencyModel | None
) -> _Cut:
    """The cut by the criterion that was asked for; with "auto" that of several whose repaired model is nearest to the dense one."""
    asked = bench.run.config.criterion
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
        # what is left of the calibration images is enough to tell repairs apart, not criteria
        images = of_one_shape(
            x
            for x, _ in sample_batches(
                bench.data.val, preprocessing(bench.data), images=JUDGED, seed=bench.run.config.seed, batch_size=REPAIRED_AT_ONCE
            )
        )
        goal = outputs(model, images)
        distances = {cut.criterion: divergence(outputs(cut.model, images), goal, temperature=1.0) for cut in cuts}
    best = least(distances)
    each = ", ".join(f"{criterion} {distance:.3f}" for criterion, distance in distances.items())
    bench.progress.say(f"{name}: {best} it is; distance from the dense outputs on validation images: {each}")
    return next(cut for cut in cuts if cut.criterion == best)


def _cut_by(
    bench: Workbench,
    name: str,
    criterion: str,
    model: nn.Module,
    coupling: Coupling,
    budgets: Mapping[str, float],
    predictor: LatencyModel | None,
) -> _Cut:
    """The better of two plans: losses that were measured axis by axis don't add up exactly, so both ways of adding them are tried."""
    scores = _scores(bench, name, criterion, model, coupling)

    def made(step: Plan, on_time: OnTime | None) -> _Cut:
        with bench.progress.bar(f"{name}: building and verifying"):
            pruned = apply(model, step)
            verification = verify(model, pruned, coupling, step)
        with bench.progress.bar(f"{name}: repairing"):
            return _Cut(criterion, step, *_repaired(bench, model, pruned, coupling, step), verification, on_time)

    ways = (False, True) if scores.additive else (False,)  # only losses can be looked back at
    try:
        cuts = [made(*found) for found in _plans(bench, name, model, coupling, scores, budgets, predictor, ways)]
    except UnreachableError as error:
        if not bench.run.config.depth:
            raise
        cuts, out_of_reach = [], error
    if bench.run.config.depth:
        cuts += _shallower_cuts(bench, name, criterion, model, coupling, scores, budgets, predictor, made)
    if not cuts:
        raise out_of_reach
    return min(cuts, key=lambda cut: cut.loss)


def _scores(bench: Workbench, name: str, criterion: str, model: nn.Module, coupling: Coupling) -> Scores:
    config = bench.run.config
    with bench.progress.bar(f"{name}: scoring by {criterion}"):
        images = calibration_images(bench, CRITERIA[criterion].batch or 1)
        scores = score(model, coupling, criterion, images, F.cross_entropy, config.seed, config.aggregation, config.normalization)
    if config.allocation == MEASURED and criterion != "obs":  # whose scores are measured losses already
        with bench.progress.bar(f"{name}: measuring what each axis can lose"):
            scores = measure(model, coupling, scores, calibration_images(bench, REPAIRED_AT_ONCE), config.seed)
    return scores


def _shallower_cuts(
    bench: Workbench,
    name: str,
    criterion: str,
    model: nn.Module,
    coupling: Coupling,
    scores: Scores,
    budgets: Mapping[str, float],
    predictor: LatencyModel | None,
    made: Callable[[Plan, OnTime | None], _Cut],
) -> list[_Cut]:
    """The same budgets by fewer modules and wider layers, for as long as the next such cut is better than the one before."""
    images = of_one_shape(x for x, _ in calibration_images(bench, REPAIRED_AT_ONCE))
    cuts: list[_Cut] = []
    with bench.progress.bar(f"{name}: measuring what the model loses with each module") as advance:
        found = shallower(
            model, coupling, images, budgets, lambda m, c: _scores(bench, name, criterion, m, c), scores, predictor, bench.clock,
            bench.run.config.min_width, advance,
        )  # fmt: skip
        first = next(found, None)
    for shallow in () if first is None else itertools.chain((first,), found):
        try:
            ((step, on_time),) = _plans(bench, name, shallow.model, shallow.coupling, shallow.scores, budgets, shallow.predictor, (False,))
        except UnreachableError:
            continue
        cuts.append(made(replace(step, removed=shallow.removed), on_time))
        gone = f"without {', '.join(shallow.removed.names)}"
        bench.progress.say(f"{name}: {gone}: distance from the dense outputs {cuts[-1].loss:.3f} (held out)")
        if len(cuts) > 1 and cuts[-1].loss > cuts[-2].loss:
            break
    return cuts


def _plans(
    bench: Workbench,
    name: str,
    model: nn.Module,
    coupling: Coupling,
    scores: Scores,
    budgets: Mapping[str, float],
    predictor: LatencyModel | None,
    ways: Sequence[bool],
) -> list[tuple[Plan, OnTime | None]]:
    """For each of ``ways`` the plan that looks back (True) or does not, if it is another one; for milliseconds, each as it was timed."""
    config = bench.run.config
    allocation = "global" if config.allocation == MEASURED else config.allocation
    found: list[tuple[Plan, OnTime | None]] = []
    for spare in ways:
        if bench.clock is None or predictor is None:
            found.append((make_plan(coupling, scores, budgets, allocation, config.round_to, config.min_width, spare), None))
            continue
        with bench.progress.bar(f"{name}: planning and timing"):
            on_time = plan_on_time(
                model, coupling, scores, budgets, bench.clock, predictor,
                allocation=allocation, round_to=config.round_to, min_width=config.min_width, spare=spare,
            )  # fmt: skip
        bench.progress.say(f"{name}: {on_time.said(budgets['latency'])}")
        found.append((on_time.plan, on_time))
    return found if found[0][0] != found[-1][0] else found[:1]


def _repaired(bench: Workbench, model: nn.Module, pruned: nn.Module, coupling: Coupling, step: Plan) -> tuple[nn.Module, Recovery]:
    config = bench.run.config

    images = of_one_shape(x for x, _ in calibration_images(bench, REPAIRED_AT_ONCE))
    fitted = [x for k, x in enumerate(images) if not is_held_out(k)]

    def reestimate(edited: nn.Module) -> None:
        reestimate_batchnorm(edited, [(x, x) for x in fitted], None, images=config.calibration)

    return recover(model, pruned, coupling, step, images, reestimate, refit=config.repair, seed=config.seed)


def test_metrics(bench: Workbench, snapshot: Snapshot) -> Json:
    """Accuracy on the test split: reported, never decided on."""
    name = f"test {snapshot.stage}"

    def work() -> Json:
        with bench.progress.bar(f"{snapshot.stage}: measuring on the test split") as advance:
            model = materialise(bench, snapshot).to(bench.device)
            found = evaluate(model, bench.data.test, preprocessing(bench.data), progress=advance)
        return asdict(found)

    return bench.run.stage(name, work, shared=True)


def materialise(bench: Workbench, snapshot: Snapshot) -> nn.Module:
    """The model of a snapshot, built from what is on disk (even if it was in memory just now: a resumed run must see the same bits)."""
    if snapshot.plan is None or snapshot.state is None:
        return copy.deepcopy(bench.dense).eval()
    return build(copy.deepcopy(bench.dense), Plan.from_json(snapshot.plan), bench.run.load_state(snapshot.state)).eval()


def at(device: torch.device, model: nn.Module) -> nn.Module:
    """`model`, which stays where it is, or a copy of it on another device."""
    return model if device_of(model) == device else copy.deepcopy(model).to(device)


def as_the_first(model: nn.Module) -> None:
    """Give the model of every process the weights that the first process's has."""
    if current().size > 1:
        model.load_state_dict(current().first(lambda: {name: value.cpu() for name, value in model.state_dict().items()}))


def calibration_images(bench: Workbench, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    config = bench.run.config
    return sample_batches(bench.data.train, preprocessing(bench.data), images=config.calibration, seed=config.seed, batch_size=batch_size)


def validate(bench: Workbench, model: nn.Module, name: str) -> Json:
    """Accuracy on the validation split."""
    with bench.progress.bar(f"{name}: measuring on the validation split") as advance:
        found: Metrics = evaluate(at(bench.device, model), bench.data.val, preprocessing(bench.data), progress=advance)
    return {"top1": found.top1, "top5": found.top5, "loss": found.loss, "n": found.n, "top1_ci95": list(found.top1_ci95)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with a fixed number of PyTorch threads: sums come out in the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names with the same bits (NaN equal to itself)."""
    return left.keys() == right.keys() and all(_bits(left[name]).equal(_bits(right[name])) for name in left)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
