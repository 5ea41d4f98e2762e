"""The loop for Keras models: cut, verify and fine-tune until target and floor hold. Decisions on validation images, the verdict on test.

It keeps a run folder as the PyTorch loop does (`coppice.run`): every stage is journalled, a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from coppice.allocate import plan as make_plan
from coppice.config import MEASURED, RunConfig, dump_config, sha256
from coppice.cost import Cost
from coppice.coupling import Coupling, couple
from coppice.criteria import CRITERIA, score
from coppice.errors import CoppiceError, VerificationError
from coppice.floor import has_seen_validation
from coppice.keras.apply import apply, build, weights_in
from coppice.keras.capture import capture
from coppice.keras.data import KerasData, load_images
from coppice.keras.evaluate import BATCH, Part, batches_of, evaluate, sample
from coppice.keras.files import load_keras
from coppice.keras.opening import open_model
from coppice.keras.recovery import recover
from coppice.keras.regularise import regulariser
from coppice.keras.rehearsal import choose
from coppice.keras.train import Epoch, check_recipe, fine_tune, fitting, reestimate, steps_per_epoch
from coppice.keras.verify import verify
from coppice.keras.walk import function_of, require_plain
from coppice.mending import Recovery
from coppice.pictures import check_renderer
from coppice.planning import Plan, compose, kept_widths
from coppice.planning import make_plan as plan_that_keeps
from coppice.progress import Progress, Silent
from coppice.recipe import Recipe, described
from coppice.report import AxisWidth, render_report
from coppice.result import Result
from coppice.run import (
    KERAS,
    METRICS,
    PLAN,
    REPORT,
    Json,
    Run,
    check_manifest,
    check_out,
    create_run,
    read_json,
    replacing,
    resume_run,
    write_text,
)
from coppice.stepwise import of_one_shape
from coppice.targets import Target, humanise, interpolate, parse_target

DEFAULTS = {"criterion": "taylor", "allocation": "global"}  # what a Keras model is cut by, if nothing else is said
_LATER = 0.5  # each further round of fine-tuning has half the learning rate
_SLACK = 1e-9
_IMAGES = 8


@dataclass(frozen=True)
class Parts:
    """The data of a run: train, validation and test."""

    train: Part
    val: Part
    test: Part
    classes: tuple[str, ...] = ()
    mirror: bool = False

    @classmethod
    def of(cls, data: Any) -> Parts:
        if isinstance(data, KerasData):
            return cls(data.train, data.val, data.test, data.classes, data.mirror)
        if not isinstance(data, (tuple, list)) or len(data) != 3:
            raise CoppiceError("give the data as (train, validation, test), each of batches of (inputs, targets)")
        return cls(*data)


@dataclass(frozen=True)
class Step:
    """A model on the way: a plan against the dense model (None: itself), its stored weights, what it costs and reaches."""

    stage: str
    plan: str | None
    state: Mapping[str, str] | None
    cost: Mapping[str, float]
    val: Mapping[str, Any]
    epochs: int = 0
    checks: Sequence[str] = ()
    max_error: float = 0.0
    training: Sequence[Mapping[str, Any]] = field(default=())
    optimizer: str = ""
    taken: bool = True  # False: training made it worse, and this is what was there before
    recovery: Mapping[str, Any] | None = None  # of the last cut: `coppice.mending.Recovery`
    regularised: Mapping[str, Any] | None = None  # the kind, its strength, and how far it came

    @property
    def top1(self) -> float:
        return float(self.val["top1"])


@dataclass(frozen=True)
class Bench:
    """What every stage works with; `dense` stays as it is."""

    dense: Any
    data: Parts
    coupling: Coupling
    cost: Cost
    run: Run
    progress: Progress

    @property
    def config(self) -> RunConfig:
        return self.run.config


def prune(
    model: Any,
    data: Any,
    target: str | Mapping[str, str | float] | Target = Target(),
    *,
    max_drop: float | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result[Any]:
    """Prune a trained Keras classifier; `model` is left as it is. See `coppice.prune`.

    data: `coppice.keras.data.load_images(...)`, or (train, validation, test), each batches of (inputs, targets): `tf.data`, a list, ...
    """
    config = RunConfig(target=parse_target(target) if target else Target(), max_drop=max_drop, **{**DEFAULTS, **settings}).absolute()
    parts = Parts.of(data)
    with ExitStack() as stack:
        path = Path(out) if out else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coppice-")))
        check_feasible(model, parts, config)
        run = stack.enter_context(create_run(path, config))
        result = _work(model, parts, run, progress or Silent())
    return result if out else replace(result, path=None)


def prune_run(config: RunConfig, out: Path, *, progress: Progress) -> Result[Any]:
    """Prune what the configuration names into the folder `out`. Bad input is found before the folder is made."""
    config = config.absolute()
    check_out(out, config)
    model, data = open_inputs(config)
    check_feasible(model, data, config)
    with create_run(out, config) as run:
        return _work(model, data, run, progress)


def resume(out: Path, *, progress: Progress) -> Result[Any]:
    """Go on with a run from where it stopped; a finished one is only read."""
    with resume_run(out) as run:
        return _work(*open_inputs(run.config), run, progress)


def open_inputs(config: RunConfig) -> tuple[Any, Parts]:
    """The dense model and the data of a configuration."""
    model = open_model(config.model, config.weights, config.code, config.num_classes)
    return model, Parts.of(load_images(config.data, config.preprocess, config.val_fraction, config.seed, config.splits))


def check_feasible(model: Any, data: Parts, config: RunConfig) -> None:
    """Find bad input while nothing has been written."""
    check_renderer()
    require_plain(model)
    check_settings(config)
    shape = example_shape(data)
    coupling = couple(capture(model, shape))
    outputs = function_of(model).outputs[0].shape[-1]
    if data.classes and outputs != len(data.classes):
        raise CoppiceError(
            f"the data has {len(data.classes)} classes and the model {outputs} outputs: give the data it was trained on, or another model"
        )
    if config.target:
        make_plan(
            coupling, score(model, coupling, "random", None, None, config.seed), config.target.resolve(coupling.cost()),
            round_to=config.round_to, min_width=config.min_width,
        )  # fmt: skip


def check_settings(config: RunConfig) -> None:
    """CoppiceError for what only PyTorch models can be asked for."""
    if not config.target and config.max_drop is None:
        raise CoppiceError("nothing to reach: give --target, for example macs=0.5, or --max-drop, or both")
    if not config.target:
        raise CoppiceError("--max-drop alone works on PyTorch models only: name the size as well, as in --target macs=0.5")
    if config.target.setting is not None:
        raise CoppiceError("a latency can be a target of PyTorch models only: give a target of macs, params or bytes")
    if config.criterion not in CRITERIA or config.criterion == "obs" or config.allocation == MEASURED:
        raise CoppiceError("--criterion obs and auto, and --allocation measured, work on PyTorch models only: leave them out")
    if config.masks or config.depth or config.int8 or config.cut_after:
        raise CoppiceError("--sparsity, --nm, --depth, --int8 and --cut-after work on PyTorch models only: leave them out")
    check_recipe(config.recipe)


def example_shape(data: Parts) -> tuple[int, ...]:
    first = next(iter(batches_of(data.val, 1)), None)
    if first is None or not len(first[0]):
        raise CoppiceError("the validation data is empty: there is nothing to decide on")
    return (1, *first[0].shape[1:])


def _work(model: Any, data: Parts, run: Run, progress: Progress) -> Result[Any]:
    if run.complete:
        check_manifest(run.path)
        progress.say(f"{run.path} is finished already")
    else:
        coupling = couple(capture(model, example_shape(data)))
        bench = Bench(model, data, coupling, coupling.cost(), run, progress)
        history = [_dense(bench)]
        progress.say(f"dense: {humanise(bench.cost.macs, 'macs')} MACs, validation top-1 {history[0].top1:.2f} %")
        reached = _towards_target(bench, history)
        _finish(bench, history, reached)
    code = Path(run.config.code) if run.config.code else None
    plan = Plan.from_json((run.path / PLAN).read_text(encoding="utf-8"))
    return Result(load_keras(run.path / KERAS, code), plan, read_json(run.path / METRICS), run.path)


# --- stages ---------------------------------------------------------------------------------------------------------


def _dense(bench: Bench) -> Step:
    return _stage(bench, "dense", lambda: Step("dense", None, None, bench.cost.to_dict(), _validate(bench, bench.dense, "dense")))


def _stage(bench: Bench, name: str, compute: Callable[[], Step]) -> Step:
    return Step(**bench.run.stage(name, lambda: asdict(compute())))


def _towards_target(bench: Bench, history: list[Step]) -> Step:
    """Regularise if asked to, cut and fine-tune to the target, then fine-tune again for as long as the floor is not held and it helps."""
    config, dense = bench.config, history[0]
    budgets, epochs, now = config.target.resolve(bench.cost), config.recipe.epochs, dense
    if config.regularise:
        before = -(-epochs // 2)  # as many epochs in all as without it
        now = _noted(bench, history, _regularised(bench, "regularised", dense, before, budgets))
        epochs -= before
    between, enough = epochs // (config.steps + 1), _enough(bench, dense)
    for step in range(1, config.steps + 1):
        now = _noted(bench, history, _cut(bench, f"cut {step}", now, interpolate(budgets, bench.cost, step / config.steps)))
        last = step == config.steps
        spent = epochs - between * (config.steps - 1) if last else between
        now = _noted(bench, history, _tune(bench, f"tuned {step}", now, spent, enough=enough if last else math.inf))
    for again in range(2, config.rounds + 1):
        if _holds_floor(bench, dense, now) or epochs == 0:
            break
        longer = _noted(bench, history, _tune(bench, f"tuned, round {again}", now, epochs, _LATER ** (again - 1), enough))
        if longer.top1 <= now.top1:
            break
        now = longer
    return now


def _enough(bench: Bench, dense: Step) -> float:
    """The top-1 on validation with which fine-tuning may end early."""
    config = bench.config
    return dense.top1 - config.max_drop - _SLACK if config.stop_early and config.max_drop is not None else math.inf


def _noted(bench: Bench, history: list[Step], step: Step) -> Step:
    if step.stage != history[-1].stage:
        history.append(step)
        bench.progress.say(f"{step.stage}: {step.cost['macs'] / bench.cost.macs:.3f} of the MACs, validation top-1 {step.top1:.2f} %")
    return step


def _cut(bench: Bench, name: str, before: Step, budgets: Mapping[str, float]) -> Step:
    """Score, plan, apply and verify: a smaller model within `budgets`."""

    def work() -> Step:
        config, model = bench.config, _materialise(bench, before)
        coupling = couple(capture(model, example_shape(bench.data))) if before.plan else bench.coupling
        with bench.progress.bar(f"{name}: scoring by {config.criterion}"):
            batch = CRITERIA[config.criterion].batch
            images = list(sample(bench.data.train, config.calibration, config.seed, batch)) if batch else None
            scores = score(model, coupling, config.criterion, images, None, config.seed, config.aggregation, config.normalization)
        step = make_plan(coupling, scores, budgets, config.allocation, config.round_to, config.min_width)
        with bench.progress.bar(f"{name}: building and verifying"):
            pruned = apply(model, step)
            proof = verify(model, pruned, coupling, step)
        recovery = _repaired(bench, name, model, pruned, coupling, step)
        whole = compose(Plan.from_json(before.plan), step) if before.plan else step
        cost = bench.coupling.cost(kept_widths(bench.coupling, whole))
        checks = [*before.checks, *(f"{name}: {line}" for line in proof.checked)]
        state = _store(bench, name, pruned)
        val = _validate(bench, pruned, name)
        worst, said = max(before.max_error, proof.max_error), asdict(recovery) | {"criterion": config.criterion}
        return Step(
            name, whole.to_json(), state, cost.to_dict(), val, checks=checks, max_error=worst, recovery=said, regularised=before.regularised
        )

    return _stage(bench, name, work)


def _repaired(bench: Bench, name: str, model: Any, pruned: Any, coupling: Coupling, plan: Plan) -> Recovery:
    """Mend ``pruned`` in place: its BatchNormalization re-estimated, and its layers refitted if that is asked for, where that helps."""
    config = bench.config
    images = of_one_shape(x for x, _ in sample(bench.data.train, config.calibration, config.seed, BATCH))
    with bench.progress.bar(f"{name}: repairing"):
        found = recover(
            model, pruned, coupling, plan, images, lambda cut: reestimate(cut, images), refit=config.repair, seed=config.seed
        )  # fmt: skip
    change = f"{dict(found.tried)['as cut']:.3f} -> {dict(found.tried)[found.kept]:.3f}"
    bench.progress.say(f"{name} by {config.criterion}: {found.kept}: distance from the dense outputs {change} (held out)")
    if found.refused:
        bench.progress.say(f"{name}: layers were not refitted: {found.refused}")
    return found


def _tune(bench: Bench, name: str, before: Step, epochs: int, rate: float = 1.0, enough: float = math.inf) -> Step:
    """Fine-tune for some epochs by the recipe; what training makes worse on validation is not taken."""
    if epochs == 0:
        return before

    def work() -> Step:
        model = _materialise(bench, before)
        recipe, epochs_said = _trained(bench, name, model, before, epochs, rate, enough)
        val = _validate(bench, model, name)
        done: Json = {"epochs": epochs, "training": epochs_said, "optimizer": described(recipe)}
        if float(val["top1"]) < before.top1:
            bench.progress.say(f"{name}: training made it worse ({val['top1']:.2f} % after {before.top1:.2f} %): its result is not taken")
            return replace(before, stage=name, **done, taken=False)
        return replace(before, stage=name, state=_store(bench, name, model), val=val, **done, taken=True)

    return _stage(bench, name, work)


def _trained(
    bench: Bench, name: str, model: Any, before: Step, epochs: int, rate: float = 1.0, enough: float = math.inf, along: Any = None
) -> tuple[Recipe, list[Json]]:
    """Train ``model``, which is ``before``'s, in place by the run's recipe; a stage that was stopped goes on at the epoch it was in."""
    config = bench.config
    recipe = _settled(bench, before, epochs, rate)
    bench.progress.say(f"{name}: fine-tuning for {epochs} epoch{'s' if epochs > 1 else ''}")

    def judge() -> tuple[float, float]:
        val = _validate(bench, model, name)
        return float(val["top1"]), float(val["loss"])

    def told(epoch: Epoch) -> None:
        line = f"  epoch {epoch.epoch} of {epochs}: loss {epoch.train_loss:.3f}, validation top-1 {epoch.val_top1:.2f} %"
        bench.progress.say(f"{line}, {along.said()}" if along is not None else line)

    checkpoint = bench.run.state_path(f"{name}.checkpoint").with_suffix(".npz")
    with bench.progress.bar(f"{name}: fine-tuning") as advance:
        history = fine_tune(
            model, bench.data.train, recipe, mirror=bench.data.mirror, judge=judge, teacher=_teacher(bench, recipe), seed=config.seed,
            along=along, checkpoint=checkpoint, on_epoch=told, enough=lambda epoch: epoch.val_top1 >= enough, progress=advance,
        )  # fmt: skip
    if not recipe.freeze_norm:
        reestimate(model, (x for x, _ in sample(bench.data.train, config.calibration, config.seed, BATCH)))
    return recipe, [asdict(epoch) for epoch in history]


def _teacher(bench: Bench, recipe: Recipe) -> Any:
    return build(bench.dense, None, weights_in(bench.dense)) if recipe.distill else None


def _settled(bench: Bench, before: Step, epochs: int, rate: float) -> Recipe:
    """The run's recipe with its optimiser; an open one is rehearsed once a run, on the first model that is to be trained."""
    config = bench.config
    recipe = replace(config.recipe, epochs=epochs)

    def work() -> Json:
        bench.progress.say("choosing an optimiser")
        tried = choose(
            lambda: _materialise(bench, before), bench.data.train, bench.data.val, recipe, mirror=bench.data.mirror,
            teacher=_teacher(bench, recipe), seed=config.seed,
        )  # fmt: skip
        for rehearsed in tried:
            bench.progress.say(f"  {described(rehearsed.recipe)}: validation loss {rehearsed.loss:.3f}")
        first = tried[0].recipe
        return {"optimizer": first.optimizer, "lr": first.lr, "freeze_norm": first.freeze_norm}

    if recipe.open:
        recipe = replace(recipe, **bench.run.stage("optimiser", work))
    return replace(recipe, lr=recipe.peak_lr() * rate)


def _regularised(bench: Bench, name: str, before: Step, epochs: int, budgets: Mapping[str, float]) -> Step:
    """The dense model after ``epochs`` with the run's regularisation; nothing is removed yet: what is near zero is for the cut to find."""

    def work() -> Step:
        config, model = bench.config, _materialise(bench, before)
        fitted = fitting(bench.data.train, config.recipe)
        reg = regulariser(
            model, bench.coupling, config.regularise, steps=epochs * steps_per_epoch(bench.data.train, fitted), target=budgets,
            strength=config.strength, round_to=config.round_to, min_width=config.min_width,
        )  # fmt: skip
        bench.progress.say(f"{name}: {reg.kind} of strength {reg.strength:.3g}")
        recipe, epochs_said = _trained(bench, name, model, before, epochs, along=reg)
        bench.progress.say(f"{name}: {reg.said()}")
        facts = {"kind": reg.kind, "strength": reg.strength, "said": reg.said()}
        done: Json = {"epochs": epochs, "training": epochs_said, "optimizer": described(recipe), "regularised": facts}
        plan = plan_that_keeps(bench.coupling, {}).to_json()
        return replace(before, stage=name, plan=plan, state=_store(bench, name, model), val=_validate(bench, model, name), **done)

    return _stage(bench, name, work)


def _materialise(bench: Bench, step: Step) -> Any:
    """The model of a step, built from what is on disk: a resumed run must see the same bits."""
    if step.plan is None or step.state is None:
        return _compiled(bench, build(bench.dense, None, weights_in(bench.dense)))
    path = bench.run.state_path("").parent / step.state["file"]
    if not path.exists() or sha256(path) != step.state["sha256"]:
        raise CoppiceError(f"{path} is missing or changed since the run wrote it, start the run again in another folder")
    with np.load(path, allow_pickle=False) as found:
        weights = {name: found[name] for name in found.files}
    return _compiled(bench, build(bench.dense, Plan.from_json(step.plan), weights))


def _compiled(bench: Bench, model: Any) -> Any:
    """With the loss and the metrics that the dense model was compiled with, if it was."""
    if bench.dense.compiled:
        model.compile_from_config(bench.dense.get_compile_config())
    return model


def _store(bench: Bench, name: str, model: Any) -> dict[str, str]:
    path = bench.run.state_path(name).with_suffix(".npz")
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **weights_in(model))  # type: ignore[arg-type]  # no weight is called allow_pickle
    return {"file": path.name, "sha256": sha256(path)}


def _validate(bench: Bench, model: Any, name: str) -> Json:
    with bench.progress.bar(f"{name}: measuring on the validation split") as advance:
        found = evaluate(model, bench.data.val, advance)
    return {"top1": found.top1, "top5": found.top5, "loss": found.loss, "n": found.n, "top1_ci95": list(found.top1_ci95)}


def _test(bench: Bench, step: Step) -> Json:
    def work() -> Json:
        with bench.progress.bar(f"{step.stage}: measuring on the test split") as advance:
            return asdict(evaluate(_materialise(bench, step), bench.data.test, advance))

    return bench.run.stage(f"test {step.stage}", work)


# --- the end --------------------------------------------------------------------------------------------------------


def _finish(bench: Bench, history: Sequence[Step], reached: Step) -> None:
    """Check that what is saved is what was measured, write every output, and the manifest last."""
    assert reached.plan is not None, "a run always ends with a cut"
    began, plan, model = time.perf_counter(), Plan.from_json(reached.plan), _materialise(bench, reached)
    dense_test, pruned_test = _test(bench, history[0]), _test(bench, reached)
    met, statement = _verdict(bench, history[0], reached, dense_test, pruned_test)
    checks = [*reached.checks]
    if bench.config.steps > 1:
        with bench.progress.bar("verifying the whole plan against the dense model"):
            checks += [f"all cuts as one: {line}" for line in verify(bench.dense, apply(bench.dense, plan), bench.coupling, plan).checked]
    checks.append(_save(bench, model))
    metrics: Json = {
        "dense": {**dense_test, **history[0].cost, "val": dict(history[0].val)},
        "pruned": {**pruned_test, **reached.cost, "val": dict(reached.val)},
        "target": {**bench.config.target.to_dict(), "max_drop": bench.config.max_drop},
        **dict.fromkeys(("latency", "masks", "int8", "modules")),  # what only PyTorch models are asked for
        "regularised": reached.regularised,
        "drop": {"val": history[0].top1 - reached.top1, "test": dense_test["top1"] - pruned_test["top1"]},
        "met": met,
        "verified": True,  # what fails a check raises, and nothing is saved
        "statement": statement,
        "verification": {"checks": checks, "max_error": reached.max_error},
        "history": [_said(bench, step) for step in history],
        "classes": list(bench.data.classes) or [str(k) for k in range(len(dense_test["per_class"]))],
        "input": list(example_shape(bench.data)),
        "backend": keras.backend.backend(),
        "notes": [],
        "seconds": round(sum(bench.run.seconds().values()) + time.perf_counter() - began, 1),
    }
    _write(bench, plan, metrics)
    bench.run.finish()


def _save(bench: Bench, model: Any) -> str:
    """Save, load, and compare: weights bit by bit, and the outputs on real images."""
    path = bench.run.path / KERAS
    x = next(batches_of(bench.data.val, _IMAGES))[0]
    with replacing(path) as temporary:
        model.save(temporary)
        again = load_keras(temporary, Path(bench.config.code) if bench.config.code else None)
        have, want = weights_in(again), weights_in(model)
        same = have.keys() == want.keys() and all(have[name].tobytes() == want[name].tobytes() for name in want)
        if not same or not np.array_equal(model.predict_on_batch(x), again.predict_on_batch(x)):
            raise VerificationError(f"{KERAS} loaded again is not the model that was saved: a layer keeps state outside its weights")
    return f"saved and loaded again: the same bits, weights and outputs on {len(x)} images"


def _said(bench: Bench, step: Step) -> Json:
    seconds, cost = bench.run.seconds().get(step.stage, 0.0), step.cost
    training = [dict(entry) for entry in step.training]
    return {
        "stage": step.stage, **cost, "epochs": step.epochs, "val_top1": step.top1, "seconds": seconds,
        "repair": None if step.epochs else step.recovery, "training": training,
        "optimizer": step.optimizer, "taken": step.taken,
    }  # fmt: skip


def _write(bench: Bench, plan: Plan, metrics: Json) -> None:
    folder, config = bench.run.path, bench.config
    write_text(folder / PLAN, plan.to_json() + "\n")
    write_text(folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    page = render_report(
        title=f"{Path(config.model).stem or bench.dense.name}, {metrics['pruned']['macs'] / metrics['dense']['macs']:.3f} of the MACs",
        metrics=metrics,
        widths=[AxisWidth(axis.name, axis.width, len(axis.keep)) for axis in plan.axes],
        pins=bench.coupling.pins,
        config=dump_config(config),
    )
    write_text(folder / REPORT, page)


def _holds_floor(bench: Bench, dense: Step, now: Step) -> bool:
    limit = bench.config.max_drop
    return limit is None or dense.top1 - now.top1 <= limit + _SLACK


def _verdict(bench: Bench, dense: Step, reached: Step, before: Json, after: Json) -> tuple[bool, str]:
    """Whether target and floor (on test) hold, and one sentence that says so, or what does not and how close it came."""
    config, parts, met = bench.config, [], True
    for key, budget in config.target.resolve(bench.cost).items():
        holds, whole = reached.cost[key] <= budget, float(getattr(bench.cost, key))
        label = {"macs": "MACs", "params": "parameters"}.get(key, key)
        shares = f"{label} {humanise(whole, key)} → {humanise(reached.cost[key], key)} (× {reached.cost[key] / whole:.3f})"
        parts.append(f"{shares}, {'within' if holds else 'over'} the target of {humanise(budget, key)}")
        met &= holds
    drop, limit = before["top1"] - after["top1"], config.max_drop if config.max_drop is not None else math.inf
    moved = f"test top-1 {'down' if drop >= 0 else 'up'} {abs(drop):.2f} points"
    holds = drop <= limit + _SLACK
    parts.append(moved if limit == math.inf else f"{moved}, {'within' if holds else 'over'} the limit of {limit:g}")
    lost = dense.top1 - reached.top1
    parts.append(f"validation top-1 {'down' if lost >= 0 else 'up'} {abs(lost):.2f} points")
    if has_seen_validation(dense.val, before):
        parts[-1] += " (the dense model was trained on those images, which overstates it)"
    if not holds:
        parts[-1] += ": the floor on accuracy does not hold at this size; try more epochs, more steps, or a milder target"
    return met and holds, "; ".join(parts) + "."
