"""The loop around the stages: cut, repair and fine-tune again until the target and the floor on accuracy both hold, or say which can't.

Every decision is taken on the validation split, the verdict on the test split (see `coppice.floor`). `prune` runs it on a module and data
of your own, `prune_run` on a configuration; it is the same loop.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coppice.allocate import plan as make_plan
from coppice.allocate import smallest
from coppice.config import RunConfig, load_config
from coppice.cost import Priced
from coppice.coupling import couple
from coppice.criteria import batch_of, score
from coppice.curves import Sensitivity, sensitivity
from coppice.cut_stage import cut
from coppice.data import ImageData, Loaders, check_classes, load_data, sample_batches
from coppice.deadline import SLACK, feasible_prices
from coppice.depth_search import worthwhile
from coppice.errors import CoppiceError, UnreachableError
from coppice.finish import finish
from coppice.floor import has_seen_validation
from coppice.forward import device_of, logits, placed
from coppice.machine import usable_cores
from coppice.mask_stage import grown, masked
from coppice.masking import rounds, zeros_said
from coppice.masks import NOTHING, sites
from coppice.models import load_model, one_line
from coppice.parallel import current, joined, leads
from coppice.pictures import check_renderer
from coppice.planning import Plan
from coppice.progress import Progress, Silent
from coppice.regularise_stage import regularised
from coppice.result import Result
from coppice.run import CONFIG, METRICS, PLAN, Run, check_manifest, check_out, create_run, load, opened, read_json, resume_run
from coppice.schedule_stage import trained_and_cut
from coppice.seeding import seeded
from coppice.snapshot import Snapshot
from coppice.stages import (
    REPAIRED_AT_ONCE,
    Data,
    TrainFunction,
    Workbench,
    as_the_first,
    dense_snapshot,
    example_input,
    on_the_clock,
    test_metrics,
    threads,
)
from coppice.stretches import cut_epochs
from coppice.targets import Target, humanise, interpolate, parse_target
from coppice.torch.capture import capture
from coppice.tune_stage import tune

LATER = 0.5  # each further round of fine-tuning has half the learning rate: at the first one's it would mostly undo what that had settled
_SLACK = 1e-9  # percentages are quotients of counts: let rounding not decide


def prune(
    model: nn.Module,
    data: Data | tuple[Iterable[Any], Iterable[Any], Iterable[Any]] | str | Path,
    target: str | Mapping[str, str | float] | Target = Target(),
    *,
    max_drop: float | None = None,
    out: str | Path | None = None,
    train: TrainFunction | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result[nn.Module]:
    """Prune a trained classifier; `model` is left as it is.

    data: the name of a data set, `load_data(...)`, or your own loaders (train, val, test), each yielding (float inputs NCHW, int64 labels).
    target: `"macs=0.5"`, `{"macs": 0.5, "params": "2.0M"}`; empty with `max_drop` set: the smallest model that holds it.
    max_drop: points of top-1 on validation that may be lost.
    train: your own training, called as `train(model, epochs)`, in place of the recipe.
    out: a folder for the run (see `coppice.run`); a run that was interrupted there goes on. Without it nothing is kept on disk.
    settings: the other fields of `RunConfig`: criterion, allocation, round_to, steps, recipe, seed, ...
    Raises CoppiceError for a target that can't be reached, bad settings or unusable data; VerificationError if the pruned model is wrong.
    """
    target = parse_target(target) if target else Target()
    config = RunConfig(target=target, max_drop=max_drop, **settings).absolute()
    if isinstance(data, str | Path):
        config = replace(config, data=str(data)).absolute()
        data = _data_of(config)
    images = _parts(data)
    dense = copy.deepcopy(model).eval()
    if device_of(dense).type != "cpu":
        raise CoppiceError(f"the model is on {device_of(dense)}: move it to the CPU (your own training function may use any device)")
    with ExitStack() as stack:
        world = stack.enter_context(joined(config.device))
        stack.enter_context(threads(config.threads))
        as_the_first(dense)
        made = Path(out) if out else None
        path = made or world.first(lambda: Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coppice-"))))
        world.first(lambda: _check_feasible(dense, images, config))
        run = stack.enter_context(opened(lambda: create_run(path, config)))
        result = _work(dense, images, run, train, progress if progress and leads() else Silent())
        world.numbers([0.0])  # a temporary folder stays until all have read it
    return result if out else replace(result, path=None)


def prune_run(config: RunConfig, out: Path, *, progress: Progress) -> Result[nn.Module]:
    """Prune what the configuration names into the folder `out`. Bad input is found before the folder is made."""
    config = config.absolute()
    with joined(config.device) as world, threads(config.threads):
        world.first(lambda: check_out(out, config))
        dense, data = open_inputs(config)
        world.first(lambda: _check_feasible(dense, data, config))
        with opened(lambda: create_run(out, config)) as run:
            return _work(dense, data, run, None, progress)


def resume(out: Path, *, progress: Progress) -> Result[nn.Module]:
    """Go on with a run from where it stopped; a finished one is only read."""
    device = load_config(out / CONFIG)[0].device if (out / CONFIG).exists() else "auto"
    with joined(device), opened(lambda: resume_run(out)) as run, threads(run.config.threads or usable_cores()):
        if not run.config.model:
            raise CoppiceError(f"--resume {out}: the run was started from Python, call coppice.prune again with out={str(out)!r}")
        dense, data = open_inputs(run.config)
        return _work(dense, data, run, None, progress)


def open_inputs(config: RunConfig) -> tuple[nn.Module, ImageData]:
    """The dense model and the data of a configuration."""
    with seeded(config.seed, "model"):  # a model without weights must come out the same when the run is resumed
        model = load_model(config.model, Path(config.weights) if config.weights else None, config.num_classes or None)
    return model.eval(), _data_of(config)


def _parts(data: Data | tuple[Iterable[Any], Iterable[Any], Iterable[Any]]) -> Data:
    if isinstance(data, ImageData | Loaders):
        return data
    if not isinstance(data, tuple | list) or len(data) != 3:
        raise CoppiceError(
            "give the data as the name of a data set, load_data(...), or loaders (train, validation, test) of (inputs, labels)"
        )
    return Loaders(*data)


def _data_of(config: RunConfig) -> ImageData:
    return load_data(
        config.data, preprocess=config.preprocess, val_fraction=config.val_fraction, seed=config.seed, split_names=config.splits
    )


def some_images(run: Path, count: int = 8) -> tuple[Tensor, str]:
    """Images for a finished run's model, and what they are: validation images of its data; noise, where that was handed over in Python."""
    config, _ = load_config(run / CONFIG)
    if config.data:
        images = example_input(_data_of(config), count)
        return (images if len(images) >= 4 else images.repeat(4, 1, 1, 1)), "images of its data"
    with seeded(0, "export"):
        return torch.randn(count, *read_json(run / METRICS)["input"][1:]), "random images"


def measure_sensitivity(config: RunConfig, parts: Sequence[float], images: int, limit: float | None, *, progress: Progress) -> Sensitivity:
    """What each axis of the configuration's model loses as it gets narrower, judged on that many validation images."""
    config = config.absolute()
    with threads(config.threads):
        dense, data = open_inputs(config)
        check_classes(data, count_outputs(dense, data))
        coupling = couple(capture(dense, (example_input(data),)))

        def calibration(batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            return sample_batches(data.train, data.preprocess, images=config.calibration, seed=config.seed, batch_size=batch_size)

        with progress.bar(f"scoring by {config.criterion}"):
            images_of = calibration(batch_of(config.criterion))
            scores = score(dense, coupling, config.criterion, images_of, seed=config.seed, aggregation=config.aggregation)
        with progress.bar("narrowing axis by axis") as advance:
            judge = sample_batches(data.val, data.preprocess, images=images, seed=config.seed, batch_size=REPAIRED_AT_ONCE)
            return sensitivity(
                dense, coupling, scores, calibration(REPAIRED_AT_ONCE), judge, parts=parts, round_to=config.round_to,
                min_width=config.min_width, repair=config.repair, limit=limit, seed=config.seed, progress=advance,
            )  # fmt: skip


def _check_feasible(dense: nn.Module, data: Data, config: RunConfig) -> None:
    """Find bad input while nothing has been written: classes, shapes, a target that no cut can reach, packages that the end will need."""
    check_renderer()
    if not config.target and config.max_drop is None and not config.masks:
        raise CoppiceError("nothing to reach: give --target, for example macs=0.5, or --max-drop, or both, or --sparsity")
    example = example_input(data)
    if config.input and tuple(config.input[1:]) != tuple(example.shape[1:]):
        raise CoppiceError(f"--input {config.input} does not fit the data, whose images are {tuple(example.shape[1:])} after preprocessing")
    outputs = count_outputs(dense, data)
    if isinstance(data, ImageData):
        check_classes(data, outputs)
    coupling = couple(capture(dense, (example,)))
    if config.cut_after:
        cut_epochs(config.cut_after, config.recipe.epochs)
    if config.masks and not sites(coupling)[0]:
        raise CoppiceError(NOTHING)
    if config.target:
        cost, grid = coupling.cost(), 1
        prices: Sequence[Priced] = ()
        if config.target.setting is not None:
            seconds, found = feasible_prices(dense, coupling, config.target.setting, tuple(example.shape[1:]), config.min_width)
            cost, prices, grid = replace(cost, latency=seconds), found.prices, found.grid
        budgets = config.target.resolve(cost)
        control = score(dense, coupling, "random", None, None, config.seed)  # reaching a budget depends on widths, not on what is kept
        try:
            make_plan(coupling, control, budgets, round_to=math.lcm(config.round_to, grid), min_width=config.min_width, prices=prices)
        except UnreachableError as error:
            if not worthwhile(coupling):
                raise
            if not config.depth:  # with it, what modules save as well shows once they are gone
                raise UnreachableError(f"{error}, or let whole modules go (--depth)") from error


def count_outputs(dense: nn.Module, data: Data) -> int:
    """How many classes the model tells apart. Raises CoppiceError if it can't run on the data's images, or answers what is not finite."""
    example = example_input(data)
    with torch.no_grad():
        try:
            output = dense(example)
        except Exception as error:  # whatever a user's own code raises
            kinds = {p.dtype for p in dense.parameters() if p.is_floating_point()} - {example.dtype}
            hint = f" (its weights are {str(kinds.pop())[6:]}, the images {str(example.dtype)[6:]}: convert it)" if kinds else ""
            raise CoppiceError(f"the model can't run on the data's images {tuple(example.shape)}: {one_line(error)}{hint}") from error
    found = logits(output)
    if not found.isfinite().all():
        raise CoppiceError("the model's outputs are not finite on the data's first image: look for NaN or infinite weights or inputs")
    return found.shape[1]


def _work(dense: nn.Module, data: Data, run: Run, train: TrainFunction | None, progress: Progress) -> Result[nn.Module]:
    world = current()
    if world.first(lambda: run.complete):
        world.first(lambda: check_manifest(run.path))
        progress.say(f"{run.path} is finished already")
    else:
        coupling = couple(capture(dense, (example_input(data),)))
        bench = Workbench(dense, data, coupling, coupling.cost(), run, progress, train, device=placed(run.config.device))
        if run.config.target.setting is not None:
            bench = on_the_clock(bench, run.config.target.setting)
        history = [dense_snapshot(bench)]
        progress.say(f"dense: {humanise(bench.cost.macs, 'macs')} MACs, validation top-1 {history[0].top1:.2f} %")
        reached = _with_masks(bench, history, _narrowed(bench, history))
        met, statement = _verdict(bench, history[0], reached)
        world.first(lambda: finish(bench, history, reached, met, statement))
    plan = Plan.from_json((run.path / PLAN).read_text(encoding="utf-8"))
    return Result(load(run.path, copy.deepcopy(dense)), plan, read_json(run.path / METRICS), run.path)


def _narrowed(bench: Workbench, history: list[Snapshot]) -> Snapshot:
    """What the structured cuts end with: at the target, else the smallest model that holds the floor, unless there are masks to go by."""
    if bench.run.config.target:
        return _towards_target(bench, history)
    return history[0] if bench.run.config.masks else _smallest(bench, history)


def _with_masks(bench: Workbench, history: list[Snapshot], now: Snapshot) -> Snapshot:
    """Single weights to zero as the run asks for, with fine-tuning as after a cut."""
    config = bench.run.config
    if not config.masks:
        return now
    if config.masks.schedule == "cubic":
        now = _noted(bench, history, grown(bench, "masks grown", now, config.recipe.epochs, config.masks))
        return _again(bench, "masks grown", history, now, config.recipe.epochs, config.rounds)
    for name, recipe, epochs in rounds(config.masks, config.recipe.epochs):
        now = _noted(bench, history, masked(bench, name, now, recipe))
        now = _noted(bench, history, tune(bench, f"{name}, tuned", now, epochs, enough=_enough(bench, history[0])))
    return _again(bench, f"{name}, tuned", history, now, config.recipe.epochs, config.rounds)


def _towards_target(bench: Workbench, history: list[Snapshot]) -> Snapshot:
    """Cut to the target, then fine-tune again for as long as the floor is not held and it helps."""
    config = bench.run.config
    budgets, epochs = config.target.resolve(bench.cost), config.recipe.epochs
    if config.cut_after:
        return _noted(bench, history, trained_and_cut(bench, "trained", history[0]))
    if not config.regularise:
        return _approach(bench, "", history, budgets, config.steps, epochs, config.rounds)
    before = -(-epochs // 2)  # as many epochs in all as without it
    _noted(bench, history, regularised(bench, "regularised", history[0], before, budgets))
    return _approach(bench, "", history, budgets, config.steps, epochs - before, config.rounds)


def _approach(
    bench: Workbench, prefix: str, history: list[Snapshot], budgets: Mapping[str, float], steps: int, epochs: int, rounds: int
) -> Snapshot:
    """From the dense model, or what regularised training made of it, to `budgets` in `steps` cuts; most epochs after the last."""
    dense = history[0]
    now = history[-1] if history[-1].stage == "regularised" else dense
    between = epochs // (steps + 1)
    for step in range(1, steps + 1):
        now = _noted(bench, history, cut(bench, f"{prefix}cut {step}", now, interpolate(budgets, bench.cost, step / steps)))
        spent = between if step < steps else epochs - between * (steps - 1)
        last = step == steps
        now = _noted(bench, history, tune(bench, f"{prefix}tuned {step}", now, spent, enough=_enough(bench, dense) if last else math.inf))
    return _again(bench, f"{prefix}tuned {steps}", history, now, epochs, rounds)


def _again(bench: Workbench, name: str, history: list[Snapshot], now: Snapshot, epochs: int, rounds: int) -> Snapshot:
    """Fine-tune again for as long as the floor is not held and it helps."""
    dense = history[0]
    for again in range(2, rounds + 1):
        if _holds_floor(bench, dense, now) or epochs == 0:
            break
        longer = _noted(bench, history, tune(bench, f"{name}, round {again}", now, epochs, LATER ** (again - 1), _enough(bench, dense)))
        if longer.top1 <= now.top1:
            break
        now = longer
    return now


def _enough(bench: Workbench, dense: Snapshot) -> float:
    """The top-1 on validation with which fine-tuning may end early."""
    config = bench.run.config
    return dense.top1 - config.max_drop - _SLACK if config.stop_early and config.max_drop is not None else math.inf


def _smallest(bench: Workbench, history: list[Snapshot]) -> Snapshot:
    """Bisect the fraction of MACs for the smallest model that holds the floor; short trials, then one in full.

    A trial is fine-tuned for a third of the epochs, so what it holds the full run should hold; if not, the next larger trial is taken.
    """
    config = bench.run.config
    short = max(1, config.recipe.epochs // 3) if config.recipe.epochs else 0
    low, high = smallest(bench.coupling, config.round_to, config.min_width).macs / bench.cost.macs, 1.0
    held: list[float] = []
    for trial in range(1, config.trials + 1):
        middle = (low + high) / 2
        tried = _approach(bench, f"trial {trial}, ", history, {"macs": middle * bench.cost.macs}, 1, short, 1)
        if _holds_floor(bench, history[0], tried):
            held.append(middle)
            high = middle
        else:
            low = middle
    candidates = sorted(held) or [middle]
    for fraction in candidates:
        prefix = f"{fraction:.3g} of MACs, "
        reached = _approach(bench, prefix, history, {"macs": fraction * bench.cost.macs}, config.steps, config.recipe.epochs, config.rounds)
        if _holds_floor(bench, history[0], reached):
            break
    return reached


def _noted(bench: Workbench, history: list[Snapshot], snapshot: Snapshot) -> Snapshot:
    if snapshot is not history[-1]:
        history.append(snapshot)
        share = snapshot.cost["macs"] / bench.cost.macs
        bench.progress.say(f"{snapshot.stage}: {share:.3f} of the MACs, validation top-1 {snapshot.top1:.2f} %")
    return snapshot


def _holds_floor(bench: Workbench, dense: Snapshot, now: Snapshot) -> bool:
    limit = bench.run.config.max_drop
    return limit is None or dense.top1 - now.top1 <= limit + _SLACK


def _verdict(bench: Workbench, dense: Snapshot, reached: Snapshot) -> tuple[bool, str]:
    """Whether target and floor (on test) hold, and one sentence that says so, or what does not and how close it came."""
    config = bench.run.config
    parts, met = [], True
    for key, budget in config.target.resolve(bench.cost).items():
        holds = reached.cost[key] <= budget * (1 + SLACK if key == "latency" else 1)
        parts.append(f"{_share(bench, reached, key)}, {'within' if holds else 'over'} the target of {humanise(budget, key)}")
        met &= holds
    if not config.target and not config.masks:
        parts.append(_share(bench, reached, "macs"))
    if reached.masks:
        parts.append(zeros_said(reached.masks))
    before, after = test_metrics(bench, dense), test_metrics(bench, reached)
    drop = before["top1"] - after["top1"]
    parts.append(_floor("test", drop, config.max_drop))
    validation = _floor("validation", dense.top1 - reached.top1, None)
    if has_seen_validation(dense.val, before):
        validation += " (the dense model was trained on those images, which overstates it)"
    said = "; ".join([*parts, validation])
    if config.max_drop is not None and drop > config.max_drop + _SLACK:
        return False, said + ": the floor on accuracy does not hold at this size; try more epochs, more steps, or a milder target."
    return met, said + "."


def _floor(split: str, drop: float, limit: float | None) -> str:
    moved = f"{split} top-1 {'down' if drop >= 0 else 'up'} {abs(drop):.2f} points"
    return moved if limit is None else f"{moved}, {'within' if drop <= limit + _SLACK else 'over'} the limit of {limit:g}"


def _share(bench: Workbench, reached: Snapshot, key: str) -> str:
    dense = getattr(bench.cost, key)
    label = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": f"latency ({bench.run.config.target.setting})"}[key]
    return f"{label} {humanise(dense, key)} → {humanise(reached.cost[key], key)} (× {reached.cost[key] / dense:.3f})"
