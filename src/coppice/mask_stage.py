"""The stages that make single weights zero, after any structured cut: all at once, in rounds, or while the model trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from coppice.coupling import Coupling, couple
from coppice.data import sample_batches
from coppice.errors import CoppiceError
from coppice.evaluate import reestimate_batchnorm
from coppice.masking import facts, plan_of
from coppice.masks import MaskRecipe, sites
from coppice.planning import Plan, compose
from coppice.recovery import recover
from coppice.run import Json
from coppice.snapshot import Snapshot, as_snapshot
from coppice.stages import REPAIRED_AT_ONCE, Workbench, example_input, materialise, preprocessing, validate
from coppice.torch.capture import capture
from coppice.torch.masking import Growing, mask
from coppice.torch.program import is_held_out, of_one_shape
from coppice.tune_stage import how_trained, trained


def masked(bench: Workbench, name: str, before: Snapshot, recipe: MaskRecipe) -> Snapshot:
    """Make the weights zero that the recipe says, and re-estimate BatchNorm where that brings the outputs nearer to the dense ones."""

    def work() -> Json:
        model = materialise(bench, before)
        coupling = couple(capture(model, (example_input(bench.data),)))
        with bench.progress.bar(f"{name}: masking by {recipe.criterion}"):
            batches = list(_calibration(bench))
            found, step = mask(model, coupling, recipe, batches, bench.run.config.seed)
            images = of_one_shape(x for x, _ in batches)
            fitted = [(x, x) for k, x in enumerate(images) if not is_held_out(k)]

            def reestimate(edited: nn.Module) -> None:
                reestimate_batchnorm(edited, fitted, None, images=bench.run.config.calibration)

            best, recovery = recover(bench.dense, found, coupling, step, images, reestimate, refit=False)
        said = {"recovery": asdict(recovery) | {"criterion": f"masks by {recipe.criterion}"}}
        return _noted(bench, name, before, best, coupling, step, recipe, said)

    return as_snapshot(bench.run.stage(name, work))


def grown(bench: Workbench, name: str, before: Snapshot, epochs: int, recipe: MaskRecipe) -> Snapshot:
    """Fine-tune while the masks grow by the cubic curve; always taken, since it ends with the sparsity that was asked for."""
    if bench.train is not None:
        raise CoppiceError("masks can't grow inside your own training function: use the schedule iterative, or coppice's own training")
    if epochs == 0:
        raise CoppiceError("masks that grow while the model trains need epochs to grow in: give some, or use the schedule one-shot")

    def work() -> Json:
        model = materialise(bench, before)
        coupling = couple(capture(model, (example_input(bench.data),)))
        model.to(bench.device)
        growing = Growing(model, sites(coupling)[0], recipe)
        results = trained(bench, name, model, before, epochs, along=growing)
        step = plan_of(coupling, growing.finish())
        said = {"epochs": epochs, "training": [asdict(result) for result in results], "optimizer": how_trained(bench, before, epochs)}
        return _noted(bench, name, before, model, coupling, step, recipe, said)

    return as_snapshot(bench.run.stage(name, work, shared=True))


def _noted(
    bench: Workbench,
    name: str,
    before: Snapshot,
    model: nn.Module,
    coupling: Coupling,
    step: Plan,
    recipe: MaskRecipe,
    said: Mapping[str, Any],
) -> Json:
    whole = compose(Plan.from_json(before.plan), step) if before.plan else step
    state = bench.run.save_state(name, model.state_dict())
    val = validate(bench, model, name)
    untrained = {"epochs": 0, "training": (), "optimizer": "", "taken": True}  # what was before may have been
    return asdict(
        replace(
            before, stage=name, plan=whole.to_json(), state=state, val=val, masks=facts(coupling, step, recipe), **{**untrained, **said}
        )
    )


def _calibration(bench: Workbench) -> Iterator[tuple[Tensor, Tensor]]:
    config, data = bench.run.config, bench.data
    return sample_batches(data.train, preprocessing(data), images=config.calibration, seed=config.seed, batch_size=REPAIRED_AT_ONCE)
