"""The stage that fine-tunes, and what every training of a run is done with: its precision and optimiser."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from coppice.along import Along
from coppice.forward import pick_precision
from coppice.masking import unpacked
from coppice.parallel import current
from coppice.planning import Plan
from coppice.recipe import Recipe, described
from coppice.run import Json
from coppice.snapshot import Snapshot, as_snapshot
from coppice.stages import Workbench, as_the_first, at, calibration_images, materialise, validate
from coppice.torch.masking import Held
from coppice.train import EpochResult, choose, fine_tune, fitting, steps_per_epoch


def tune(bench: Workbench, name: str, before: Snapshot, epochs: int, rate: float = 1.0, enough: float = math.inf) -> Snapshot:
    """Fine-tune for some epochs, by the recipe (its learning rate times `rate`) or with the user's own function.

    What training makes worse on validation is not taken. An epoch of the recipe that reaches `enough` percent there is the last.
    """
    if epochs == 0:
        return before

    def work() -> Json:
        model = to_train(bench, before)
        held = None if before.plan is None else Held(model, unpacked(Plan.from_json(before.plan)))
        results = trained(bench, name, model, before, epochs, rate, enough, held)
        if held is not None:
            held.after_step()  # a training function of the user's own knows of no masks
        val = validate(bench, model, name)
        worse = float(val["top1"]) < before.top1
        if worse:
            bench.progress.say(f"{name}: training made it worse ({val['top1']:.2f} % after {before.top1:.2f} %): its result is not taken")
        state = before.state if worse else bench.run.save_state(name, model.state_dict())
        bench.run.discard(f"{name}.checkpoint")
        kept = before.val if worse else val
        how = how_trained(bench, before, epochs, rate)
        training = [asdict(result) for result in results]
        after = replace(before, stage=name, state=state, val=kept, epochs=epochs, training=training, optimizer=how, taken=not worse)
        return asdict(after)

    return as_snapshot(bench.run.stage(name, work, shared=True))


def trained(
    bench: Workbench,
    name: str,
    model: nn.Module,
    before: Snapshot,
    epochs: int,
    rate: float = 1.0,
    enough: float = math.inf,
    along: Along | None = None,
) -> list[EpochResult]:
    """Train `model`, which is `before`'s, in place by the run's recipe, resumable, or with the user's own function."""
    bench.progress.say(f"{name}: fine-tuning for {epochs} epoch{'s' if epochs > 1 else ''}")
    if bench.train is not None:
        with bench.progress.bar(f"{name}: fine-tuning with your own function"):
            bench.train(model, epochs)
        as_the_first(model)
        return []

    def told(result: EpochResult) -> None:
        line = f"  epoch {result.epoch} of {epochs}: loss {result.train_loss:.3f}, validation top-1 {result.val_top1:.2f} %"
        bench.progress.say(f"{line}, {said}" if (said := along.said() if along else "") else line)

    config = bench.run.config
    recipe = settled_recipe(bench, before, epochs, rate)
    with bench.progress.bar(f"{name}: fine-tuning") as advance:
        return fine_tune(
            model,
            bench.data,
            recipe,
            teacher=at(bench.device, bench.dense) if recipe.taught else None,
            plan=None if before.plan is None else Plan.from_json(before.plan),
            seed=config.seed,
            checkpoint=bench.run.state_path(f"{name}.checkpoint"),
            progress=advance,
            on_epoch=told,
            enough=lambda result: result.val_top1 >= enough,
            along=along,
        )


def steps_of(bench: Workbench) -> int:
    """Steps of the optimiser in an epoch of the run's recipe."""
    return steps_per_epoch(bench.data, fitting(bench.data, bench.run.config.recipe))


def to_train(bench: Workbench, snapshot: Snapshot) -> nn.Module:
    """The model of a snapshot where it is to be trained: a training function of the user's own moves it by itself."""
    return materialise(bench, snapshot).to("cpu" if bench.train else bench.device)


def _precision(bench: Workbench) -> Any:
    """The precision of fine-tuning; "auto" is settled once a run and journalled, because timings differ from one moment to the next."""
    recipe = bench.run.config.recipe
    if recipe.precision != "auto" or bench.train is not None:
        return recipe.precision

    processes = current().size

    def measure() -> Json:
        model, batch = at(bench.device, bench.dense), next(calibration_images(bench, -(-recipe.batch_size // processes)))
        return {"precision": pick_precision(model, batch)}

    return bench.run.stage("precision", measure)["precision"]


def settled_recipe(bench: Workbench, before: Snapshot, epochs: int, rate: float = 1.0, taught: bool = True) -> Recipe:
    """The run's recipe with precision and optimiser; an open one is rehearsed once a run, on the first model that is to be trained.

    ``taught``: False where the dense model is no teacher, in the rehearsal neither.
    """
    recipe = replace(bench.run.config.recipe, epochs=epochs, precision=_precision(bench))
    recipe = recipe if taught else replace(recipe, distill=0.0, features=0.0)

    def work() -> Json:
        bench.progress.say("choosing an optimiser")
        teacher = at(bench.device, bench.dense) if recipe.taught else None
        plan = None if before.plan is None else Plan.from_json(before.plan)
        tried = choose(to_train(bench, before), bench.data, recipe, teacher=teacher, plan=plan, seed=bench.run.config.seed)
        for rehearsed in tried:
            bench.progress.say(f"  {described(rehearsed.recipe)}: validation loss {rehearsed.loss:.3f}")
        first = tried[0].recipe
        return {"optimizer": first.optimizer, "lr": first.lr, "freeze_norm": first.freeze_norm}

    if recipe.open:
        recipe = replace(recipe, **bench.run.stage("optimiser", work, shared=True))
    return replace(recipe, lr=recipe.peak_lr() * rate)


def how_trained(bench: Workbench, before: Snapshot, epochs: int, rate: float = 1.0, taught: bool = True) -> str:
    """The optimiser in words; nothing of a training function of the user's own."""
    return "" if bench.train is not None else described(settled_recipe(bench, before, epochs, rate, taught))
