"""The loop for Keras models: cut, verify and fine-tune until target and floor hold. Decisions on validation images, the verdict on test.

It keeps a run folder as the PyTorch loop does (`coppice.run`): every stage is journalled, a run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from coppice.allocate import plan as make_plan
from coppice.config import RunConfig
from coppice.cost import Priced
from coppice.coupling import couple
from coppice.criteria import score
from coppice.deadline import feasible_prices
from coppice.errors import CoppiceError
from coppice.keras.capture import capture
from coppice.keras.cut_stage import cut
from coppice.keras.data import load_images
from coppice.keras.files import load_keras
from coppice.keras.finish import finish
from coppice.keras.mask_stage import grown, masked
from coppice.keras.masking import check_masks
from coppice.keras.opening import open_model
from coppice.keras.schedule_stage import trained_and_cut
from coppice.keras.stages import SLACK, Bench, Parts, dense_step, example_shape, on_the_clock, regularised, tune
from coppice.keras.train import check_recipe
from coppice.keras.walk import function_of, require_plain
from coppice.masking import rounds
from coppice.masks import NOTHING, sites
from coppice.pictures import check_renderer
from coppice.planning import Plan
from coppice.progress import Progress, Silent
from coppice.result import Result
from coppice.run import KERAS, METRICS, PLAN, Run, check_manifest, check_out, create_run, read_json, resume_run
from coppice.snapshot import Snapshot
from coppice.stretches import cut_epochs
from coppice.targets import Target, humanise, interpolate, parse_target

_LATER = 0.5  # each further round of fine-tuning has half the learning rate


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

    data: the name of a data set, `coppice.keras.data.load_images(...)`, or (train, validation, test), each batches of (inputs, targets):
    `tf.data`, a list, ...
    """
    config = RunConfig(target=parse_target(target) if target else Target(), max_drop=max_drop, **settings).absolute()
    if isinstance(data, (str, Path)):
        config = replace(config, data=str(data)).absolute()
        data = _data_of(config)
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
    return model, _data_of(config)


def _data_of(config: RunConfig) -> Parts:
    return Parts.of(load_images(config.data, config.preprocess, config.val_fraction, config.seed, config.splits))


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
    if config.masks and not sites(coupling)[0]:
        raise CoppiceError(NOTHING)
    if config.target:
        cost, prices = coupling.cost(), list[Priced]()
        if config.target.setting is not None:
            seconds, found = feasible_prices(model, coupling, config.target.setting, shape[1:], config.min_width)
            cost, prices = replace(cost, latency=seconds), [*found.prices]
        make_plan(
            coupling, score(model, coupling, "random", None, None, config.seed), config.target.resolve(cost),
            round_to=config.round_to, min_width=config.min_width, prices=prices,
        )  # fmt: skip


def check_settings(config: RunConfig) -> None:
    """CoppiceError for what only PyTorch models can be asked for."""
    if not config.target and config.max_drop is None and not config.masks:
        raise CoppiceError("nothing to reach: give --target, for example macs=0.5, or --max-drop, or both, or --sparsity")
    if not config.target and not config.masks:
        raise CoppiceError("--max-drop alone works on PyTorch models only: name the size as well, as in --target macs=0.5")
    if config.depth or config.int8:
        raise CoppiceError("--depth and --int8 work on PyTorch models only: leave them out")
    if config.cut_after:
        cut_epochs(config.cut_after, config.recipe.epochs)
    check_masks(config.masks)
    check_recipe(config.recipe)


def _work(model: Any, data: Parts, run: Run, progress: Progress) -> Result[Any]:
    if run.complete:
        check_manifest(run.path)
        progress.say(f"{run.path} is finished already")
    else:
        coupling = couple(capture(model, example_shape(data)))
        bench = Bench(model, data, coupling, coupling.cost(), run, progress)
        if run.config.target.setting is not None:
            bench = on_the_clock(bench, run.config.target.setting)
        history = [dense_step(bench)]
        progress.say(f"dense: {humanise(bench.cost.macs, 'macs')} MACs, validation top-1 {history[0].top1:.2f} %")
        reached = _with_masks(bench, history, _towards_target(bench, history) if run.config.target else history[0])
        finish(bench, history, reached)
    code = Path(run.config.code) if run.config.code else None
    plan = Plan.from_json((run.path / PLAN).read_text(encoding="utf-8"))
    return Result(load_keras(run.path / KERAS, code), plan, read_json(run.path / METRICS), run.path)


def _towards_target(bench: Bench, history: list[Snapshot]) -> Snapshot:
    """Regularise if asked to, cut and fine-tune to the target, then fine-tune again for as long as the floor is not held and it helps."""
    config, dense = bench.config, history[0]
    if config.cut_after:
        return _noted(bench, history, trained_and_cut(bench, "trained", dense))
    budgets, epochs, now = config.target.resolve(bench.cost), config.recipe.epochs, dense
    if config.regularise:
        before = -(-epochs // 2)  # as many epochs in all as without it
        now = _noted(bench, history, regularised(bench, "regularised", dense, before, budgets))
        epochs -= before
    between, enough = epochs // (config.steps + 1), _enough(bench, dense)
    for step in range(1, config.steps + 1):
        now = _noted(bench, history, cut(bench, f"cut {step}", now, interpolate(budgets, bench.cost, step / config.steps)))
        last = step == config.steps
        spent = epochs - between * (config.steps - 1) if last else between
        now = _noted(bench, history, tune(bench, f"tuned {step}", now, spent, enough=enough if last else math.inf))
    return _again(bench, f"tuned {config.steps}", history, now, epochs)


def _with_masks(bench: Bench, history: list[Snapshot], now: Snapshot) -> Snapshot:
    """Single weights to zero as the run asks for, with fine-tuning as after a cut."""
    config = bench.config
    if not config.masks:
        return now
    if config.masks.schedule == "cubic":
        now = _noted(bench, history, grown(bench, "masks grown", now, config.recipe.epochs, config.masks))
        return _again(bench, "masks grown", history, now, config.recipe.epochs)
    for name, recipe, epochs in rounds(config.masks, config.recipe.epochs):
        now = _noted(bench, history, masked(bench, name, now, recipe))
        now = _noted(bench, history, tune(bench, f"{name}, tuned", now, epochs, enough=_enough(bench, history[0])))
    return _again(bench, f"{name}, tuned", history, now, config.recipe.epochs)


def _again(bench: Bench, name: str, history: list[Snapshot], now: Snapshot, epochs: int) -> Snapshot:
    """Fine-tune again for as long as the floor is not held and it helps."""
    dense = history[0]
    for again in range(2, bench.config.rounds + 1):
        if _holds_floor(bench, dense, now) or epochs == 0:
            break
        longer = _noted(bench, history, tune(bench, f"{name}, round {again}", now, epochs, _LATER ** (again - 1), _enough(bench, dense)))
        if longer.top1 <= now.top1:
            break
        now = longer
    return now


def _enough(bench: Bench, dense: Snapshot) -> float:
    """The top-1 on validation with which fine-tuning may end early."""
    config = bench.config
    return dense.top1 - config.max_drop - SLACK if config.stop_early and config.max_drop is not None else math.inf


def _noted(bench: Bench, history: list[Snapshot], step: Snapshot) -> Snapshot:
    if step.stage != history[-1].stage:
        history.append(step)
        bench.progress.say(f"{step.stage}: {step.cost['macs'] / bench.cost.macs:.3f} of the MACs, validation top-1 {step.top1:.2f} %")
    return step


def _holds_floor(bench: Bench, dense: Snapshot, now: Snapshot) -> bool:
    limit = bench.config.max_drop
    return limit is None or dense.top1 - now.top1 <= limit + SLACK
