"""The stages of a Keras run: what each finds is journalled, and a training that was stopped goes on at the epoch it was in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coppice.config import RunConfig, sha256
from coppice.cost import Cost
from coppice.coupling import Coupling, Mask
from coppice.deadline import Clock, start_clock
from coppice.errors import CoppiceError
from coppice.keras.apply import build, weights_in
from coppice.keras.data import KerasData
from coppice.keras.evaluate import BATCH, Part, batches_of, evaluate, sample
from coppice.keras.masking import hold_masks
from coppice.keras.regularise import regulariser
from coppice.keras.rehearsal import choose
from coppice.keras.train import Epoch, fine_tune, fitting, reestimate, steps_per_epoch
from coppice.masking import unpacked
from coppice.planning import Plan
from coppice.planning import make_plan as plan_that_keeps
from coppice.progress import Progress
from coppice.recipe import Recipe, described
from coppice.run import Json, Run, replacing
from coppice.snapshot import Snapshot, as_snapshot
from coppice.timing import Setting

SLACK = 1e-9  # percentages are quotients of counts: let rounding not decide


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
        if isinstance(data, cls):
            return data
        if isinstance(data, KerasData):
            return cls(data.train, data.val, data.test, data.classes, data.mirror)
        if not isinstance(data, (tuple, list)) or len(data) != 3:
            raise CoppiceError(
                "give the data as the name of a data set, or (train, validation, test), each of batches of (inputs, targets)"
            )
        return cls(*data)


@dataclass(frozen=True)
class Bench:
    """What every stage works with; `dense` stays as it is."""

    dense: Any
    data: Parts
    coupling: Coupling
    cost: Cost
    run: Run
    progress: Progress
    clock: Clock | None = None  # where the target asks for a latency

    @property
    def config(self) -> RunConfig:
        return self.run.config


def example_shape(data: Parts) -> tuple[int, ...]:
    first = next(iter(batches_of(data.val, 1)), None)
    if first is None or not len(first[0]):
        raise CoppiceError("the validation data is empty: there is nothing to decide on")
    return (1, *first[0].shape[1:])


def dense_step(bench: Bench) -> Snapshot:
    return stage(bench, "dense", lambda: Snapshot("dense", None, None, bench.cost.to_dict(), validate(bench, bench.dense, "dense")))


def on_the_clock(bench: Bench, setting: Setting) -> Bench:
    """The same with a clock for the target's latency; the dense model is timed once a run."""
    shape, folder = example_shape(bench.data)[1:], bench.run.state_path("dense").parent

    def work() -> Json:
        with bench.progress.bar(f"timing the dense model ({setting})"):
            return {"seconds": start_clock(setting, shape, bench.dense, folder).seconds}

    seconds = bench.run.stage("dense latency", work)["seconds"]
    return replace(bench, clock=start_clock(setting, shape, bench.dense, folder, seconds), cost=replace(bench.cost, latency=seconds))


def stage(bench: Bench, name: str, compute: Callable[[], Snapshot]) -> Snapshot:
    return as_snapshot(bench.run.stage(name, lambda: asdict(compute())))


def tune(bench: Bench, name: str, before: Snapshot, epochs: int, rate: float = 1.0, enough: float = math.inf) -> Snapshot:
    """Fine-tune for some epochs by the recipe; what training makes worse on validation is not taken."""
    if epochs == 0:
        return before

    def work() -> Snapshot:
        model = materialise(bench, before)
        recipe, epochs_said = trained(bench, name, model, before, epochs, rate, enough)
        val = validate(bench, model, name)
        done: Json = {"epochs": epochs, "training": epochs_said, "optimizer": described(recipe)}
        worse = float(val["top1"]) < before.top1
        if worse:
            bench.progress.say(f"{name}: training made it worse ({val['top1']:.2f} % after {before.top1:.2f} %): its result is not taken")
        state = before.state if worse else store(bench, name, model)
        checkpoint_of(bench, name).unlink(missing_ok=True)
        return replace(before, stage=name, state=state, val=before.val if worse else val, **done, taken=not worse)

    return stage(bench, name, work)


def trained(
    bench: Bench, name: str, model: Any, before: Snapshot, epochs: int, rate: float = 1.0, enough: float = math.inf, along: Any = None
) -> tuple[Recipe, list[Json]]:
    """Train ``model``, which is ``before``'s, in place by the run's recipe; a stage that was stopped goes on at the epoch it was in."""
    config = bench.config
    recipe = settled(bench, before, epochs, rate)
    bench.progress.say(f"{name}: fine-tuning for {epochs} epoch{'s' if epochs > 1 else ''}")

    def judge() -> tuple[float, float]:
        val = validate(bench, model, name)
        return float(val["top1"]), float(val["loss"])

    def told(epoch: Epoch) -> None:
        line = f"  epoch {epoch.epoch} of {epochs}: loss {epoch.train_loss:.3f}, validation top-1 {epoch.val_top1:.2f} %"
        bench.progress.say(f"{line}, {along.said()}" if along is not None else line)

    with hold_masks(model, masks_of(before)), bench.progress.bar(f"{name}: fine-tuning") as advance:
        history = fine_tune(
            model, bench.data.train, recipe, mirror=bench.data.mirror, judge=judge, teacher=_teacher(bench, recipe), seed=config.seed,
            along=along, checkpoint=checkpoint_of(bench, name), on_epoch=told, enough=lambda e: e.val_top1 >= enough, progress=advance,
        )  # fmt: skip
    if not recipe.freeze_norm:
        reestimate(model, (x for x, _ in sample(bench.data.train, config.calibration, config.seed, BATCH)))
    return recipe, [asdict(epoch) for epoch in history]


def masks_of(step: Snapshot) -> dict[str, Mask]:
    """What is masked in a step's model."""
    return unpacked(Plan.from_json(step.plan)) if step.plan else {}


def checkpoint_of(bench: Bench, name: str) -> Path:
    """Of a training under way; gone when its result is stored."""
    return bench.run.state_path(f"{name}.checkpoint").with_suffix(".npz")


def _teacher(bench: Bench, recipe: Recipe) -> Any:
    return build(bench.dense, None, weights_in(bench.dense)) if recipe.distill else None


def settled(bench: Bench, before: Snapshot, epochs: int, rate: float = 1.0, taught: bool = True) -> Recipe:
    """The run's recipe with its optimiser; an open one is rehearsed once a run, on the first model that is to be trained.

    ``taught``: False where the dense model is no teacher, in the rehearsal neither.
    """
    config = bench.config
    recipe = replace(config.recipe, epochs=epochs, distill=config.recipe.distill if taught else 0.0)

    def work() -> Json:
        bench.progress.say("choosing an optimiser")
        tried = choose(
            lambda: materialise(bench, before), bench.data.train, bench.data.val, recipe, mirror=bench.data.mirror,
            teacher=_teacher(bench, recipe), seed=config.seed,
        )  # fmt: skip
        for rehearsed in tried:
            bench.progress.say(f"  {described(rehearsed.recipe)}: validation loss {rehearsed.loss:.3f}")
        first = tried[0].recipe
        return {"optimizer": first.optimizer, "lr": first.lr, "freeze_norm": first.freeze_norm}

    if recipe.open:
        recipe = replace(recipe, **bench.run.stage("optimiser", work))
    return replace(recipe, lr=recipe.peak_lr() * rate)


def regularised(bench: Bench, name: str, before: Snapshot, epochs: int, budgets: Mapping[str, float]) -> Snapshot:
    """The dense model after ``epochs`` with the run's regularisation; nothing is removed yet: what is near zero is for the cut to find."""

    def work() -> Snapshot:
        config, model = bench.config, materialise(bench, before)
        fitted = fitting(bench.data.train, config.recipe)
        reg = regulariser(
            model, bench.coupling, config.regularise, steps=epochs * steps_per_epoch(bench.data.train, fitted), target=budgets,
            strength=config.strength, round_to=config.round_to, min_width=config.min_width,
        )  # fmt: skip
        bench.progress.say(f"{name}: {reg.kind} of strength {reg.strength:.3g}")
        recipe, epochs_said = trained(bench, name, model, before, epochs, along=reg)
        bench.progress.say(f"{name}: {reg.said()}")
        facts = {"kind": reg.kind, "strength": reg.strength, "said": reg.said()}
        done: Json = {"epochs": epochs, "training": epochs_said, "optimizer": described(recipe), "regularised": facts}
        plan = plan_that_keeps(bench.coupling, {}).to_json()
        state = store(bench, name, model)
        checkpoint_of(bench, name).unlink(missing_ok=True)
        return replace(before, stage=name, plan=plan, state=state, val=validate(bench, model, name), **done)

    return stage(bench, name, work)


def materialise(bench: Bench, step: Snapshot) -> Any:
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


def store(bench: Bench, name: str, model: Any) -> dict[str, str]:
    path = bench.run.state_path(name).with_suffix(".npz")
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **weights_in(model))  # type: ignore[arg-type]  # no weight is called allow_pickle
    return {"file": path.name, "sha256": sha256(path)}


def validate(bench: Bench, model: Any, name: str) -> Json:
    with bench.progress.bar(f"{name}: measuring on the validation split") as advance:
        found = evaluate(model, bench.data.val, advance)
    return {"top1": found.top1, "top5": found.top5, "loss": found.loss, "n": found.n, "top1_ci95": list(found.top1_ci95)}


def test_metrics(bench: Bench, step: Snapshot) -> Json:
    def work() -> Json:
        with bench.progress.bar(f"{step.stage}: measuring on the test split") as advance:
            return asdict(evaluate(materialise(bench, step), bench.data.test, advance))

    return bench.run.stage(f"test {step.stage}", work)
