"""The stage that trains a Keras model by the whole recipe and cuts it on the way: see `coppice.keras.schedules`."""

from __future__ import annotations

from dataclasses import asdict, replace

from coppice.keras.schedules import train_and_prune
from coppice.keras.stages import Bench, settled, stage, store, validate
from coppice.keras.train import Epoch
from coppice.planning import kept_widths
from coppice.recipe import described
from coppice.snapshot import Snapshot


def trained_and_cut(bench: Bench, name: str, before: Snapshot) -> Snapshot:
    """The dense model after all epochs, cut to the target after the run's shares of them; it is mostly not trained yet, so no teacher."""
    config = bench.config

    def told(epoch: Epoch) -> None:
        line = f"  epoch {epoch.epoch} of {config.recipe.epochs}: loss {epoch.train_loss:.3f}, validation top-1 {epoch.val_top1:.2f} %"
        bench.progress.say(f"{line}, {epoch.seconds:.0f} s")

    def work() -> Snapshot:
        bench.progress.say(f"{name}: cuts after {', '.join(f'{share:.0%}' for share in config.cut_after)} of {config.recipe.epochs} epochs")
        recipe = settled(bench, before, config.recipe.epochs, taught=False)
        found = train_and_prune(
            bench.dense, bench.data, recipe, config.target, at=config.cut_after, criterion=config.criterion, round_to=config.round_to,
            min_width=config.min_width, seed=config.seed, calibration=config.calibration, on_epoch=told,
            checkpoint=bench.run.state_path(f"{name}.checkpoint").with_suffix(".npz"),
        )  # fmt: skip
        return replace(
            before, stage=name, plan=found.plan.to_json(), state=store(bench, name, found.model), val=validate(bench, found.model, name),
            cost=bench.coupling.cost(kept_widths(bench.coupling, found.plan)).to_dict(), epochs=config.recipe.epochs,
            training=[asdict(epoch) for epoch in found.history], checks=found.checks, max_error=found.max_error,
            optimizer=described(recipe),
        )  # fmt: skip

    return stage(bench, name, work)
