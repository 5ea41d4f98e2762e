"""The stages of a Keras run that make single weights zero, after any structured cut: all at once, in rounds, or while the model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from coppice.coupling import Coupling, couple
from coppice.errors import CoppiceError
from coppice.keras.capture import capture
from coppice.keras.evaluate import BATCH, sample
from coppice.keras.masking import Growing, mask
from coppice.keras.recovery import recover
from coppice.keras.stages import Bench, checkpoint_of, example_shape, materialise, stage, store, trained, validate
from coppice.keras.train import fitting, reestimate, steps_per_epoch
from coppice.masking import facts, plan_of
from coppice.masks import MaskRecipe, sites
from coppice.planning import Plan, compose
from coppice.recipe import described
from coppice.snapshot import Snapshot
from coppice.stepwise import is_held_out, of_one_shape


def masked(bench: Bench, name: str, before: Snapshot, recipe: MaskRecipe) -> Snapshot:
    """Make the weights zero that the recipe says, and re-estimate BatchNormalization where that brings the outputs nearer to the dense."""

    def work() -> Snapshot:
        config, model = bench.config, materialise(bench, before)
        coupling = couple(capture(model, example_shape(bench.data)))
        with bench.progress.bar(f"{name}: masking by {recipe.criterion}"):
            batches = list(sample(bench.data.train, config.calibration, config.seed, BATCH))
            found, step = mask(model, coupling, recipe, batches, config.seed)
            images = of_one_shape(x for x, _ in batches)
            fitted = [x for k, x in enumerate(images) if not is_held_out(k)]
            recovery = recover(bench.dense, found, coupling, step, images, lambda cut: reestimate(cut, fitted), refit=False)
        said = {"recovery": asdict(recovery) | {"criterion": f"masks by {recipe.criterion}"}}
        return _noted(bench, name, before, found, coupling, step, recipe, said)

    return stage(bench, name, work)


def grown(bench: Bench, name: str, before: Snapshot, epochs: int, recipe: MaskRecipe) -> Snapshot:
    """Fine-tune while the masks grow by the cubic curve; always taken, since it ends with the sparsity that was asked for."""
    if epochs == 0:
        raise CoppiceError("masks that grow while the model trains need epochs to grow in: give some, or use the schedule one-shot")

    def work() -> Snapshot:
        model = materialise(bench, before)
        coupling = couple(capture(model, example_shape(bench.data)))
        steps = epochs * steps_per_epoch(bench.data.train, fitting(bench.data.train, bench.config.recipe))
        growing = Growing(model, sites(coupling)[0], recipe, steps)
        used, history = trained(bench, name, model, before, epochs, along=growing)
        step = plan_of(coupling, growing.finish())
        said = {"epochs": epochs, "training": history, "optimizer": described(used)}
        after = _noted(bench, name, before, model, coupling, step, recipe, said)
        checkpoint_of(bench, name).unlink(missing_ok=True)
        return after

    return stage(bench, name, work)


def _noted(
    bench: Bench,
    name: str,
    before: Snapshot,
    model: Any,
    coupling: Coupling,
    step: Plan,
    recipe: MaskRecipe,
    said: Mapping[str, Any],
) -> Snapshot:
    whole = compose(Plan.from_json(before.plan), step) if before.plan else step
    untrained = {"epochs": 0, "training": (), "optimizer": "", "taken": True}  # what was before may have been
    done = {**untrained, **said, "masks": facts(coupling, step, recipe)}
    return replace(before, stage=name, plan=whole.to_json(), state=store(bench, name, model), val=validate(bench, model, name), **done)
