"""The stage that trains the model by the whole recipe and cuts it on the way: see `coppice.schedules`."""

from __future__ import annotations

from dataclasses import asdict, replace

from coppice.errors import CoppiceError
from coppice.planning import kept_widths
from coppice.recipe import described
from coppice.run import Json
from coppice.schedules import train_and_prune
from coppice.snapshot import Snapshot, as_snapshot
from coppice.stages import Workbench, at, validate
from coppice.train import EpochResult
from coppice.tune_stage import settled_recipe


def trained_and_cut(bench: Workbench, name: str, before: Snapshot) -> Snapshot:
    """The dense model after all epochs, cut to the target after the run's shares of them; it is mostly not trained yet, so no teacher."""
    config = bench.run.config
    if bench.train is not None:
        raise CoppiceError("--cut-after can't cut inside your own training function: leave train out, or cut there (coppice.apply)")

    def told(result: EpochResult) -> None:
        line = f"  epoch {result.epoch} of {config.recipe.epochs}: loss {result.train_loss:.3f}, validation top-1 {result.val_top1:.2f} %"
        bench.progress.say(f"{line}, {result.seconds:.0f} s")

    def work() -> Json:
        bench.progress.say(f"{name}: cuts after {', '.join(f'{share:.0%}' for share in config.cut_after)} of {config.recipe.epochs} epochs")
        recipe = settled_recipe(bench, before, config.recipe.epochs, taught=False)
        found = train_and_prune(
            at(bench.device, bench.dense), bench.data, recipe, config.target, at=config.cut_after,
            criterion=config.criterion, round_to=config.round_to, min_width=config.min_width, seed=config.seed,
            calibration=config.calibration, on_epoch=told, checkpoint=bench.run.state_path(f"{name}.checkpoint"),
        )  # fmt: skip
        state = bench.run.save_state(name, found.model.state_dict())
        return asdict(
            replace(
                before, stage=name, plan=found.plan.to_json(), state=state, val=validate(bench, found.model, name),
                cost=bench.coupling.cost(kept_widths(bench.coupling, found.plan)).to_dict(), epochs=config.recipe.epochs,
                training=[asdict(result) for result in found.history], checks=found.checks, max_error=found.max_error,
                optimizer=described(recipe),
            )
        )  # fmt: skip

    return as_snapshot(bench.run.stage(name, work, shared=True))
