"""Accuracy at a given size, beside Torch-Pruning 1.6.1 on the same weights, images and MACs: `python bench/accuracy.py --out FILE.json`.

Without training (the default) every method gets the same 512 calibration images; `--epochs N` then fine-tunes every result by the same
recipe, seeds and teacher (MobileNetV2: with the optimiser that the same rehearsal chooses for each). Rows: ours as `coppice prune` cuts and
repairs, by its default criterion, by others and by `auto`, and without the refit; Torch-Pruning's criteria by each of its settings, with
the same rounding, raw and with BatchNorm re-estimated (`bench/peer.py` says how it is configured, and why); random choices through both;
and, with epochs, a smaller dense model trained from scratch.

Every method has three seeds: what it is calibrated, re-estimated or trained on is drawn. Intervals are of 95 %: Wilson's for one; for
several the mean over seeds, with the variance between seeds and that of the test images. Seconds are the process's, whoever shares its
core. The table, the picture (`.svg`, accuracy against MACs) and the JSON are written next to each other. Rows that are in `--out` already
are not done again, and `--minutes` stops before that much time is spent, so that it can run in pieces; `--only` names rows by a regular
expression.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, variance
from typing import Any

import torch
from torch import Tensor, nn

import coppice
import pareto
import peer
from coppice.config import RunConfig
from coppice.coupling import Coupling
from coppice.criteria import AUTO
from coppice.criteria import CRITERIA as EVERY
from coppice.cut_stage import cut
from coppice.data import ImageData, load_data, sample_batches
from coppice.evaluate import evaluate, reestimate_batchnorm, wilson_interval
from coppice.models import load_model
from coppice.preprocess import Preprocess
from coppice.progress import Silent
from coppice.recipe import Recipe
from coppice.run import create_run
from coppice.snapshot import Snapshot
from coppice.stages import Workbench, materialise, threads
from coppice.train import fine_tune

IMAGES = 512  # for calibration
CUTS = (1.33, 2.0, 3.0)
SEEDS = (0, 1, 2)
CRITERIA = ("obs", AUTO, *(name for name in EVERY if name != "obs"))
SCRATCH = "smaller dense model, trained from scratch"
IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SYMMETRIC = Preprocess(mean=(0.5,), std=(0.5,))
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A trained network, its data, how it is fine-tuned, and whether the peer can only cut the inner channels of its blocks."""

    factory: str
    weights: str
    data: str
    preprocess: Preprocess
    recipe: Recipe
    inner_only: bool


_CIFAR = Recipe(optimizer="sgd", distill=0.9)
_SMALL = Recipe(optimizer="sgd", distill=0.9, batch_size=32, lr=1e-3)
_REHEARSED = Recipe(distill=0.9, batch_size=32)  # no one rate suits both what was repaired and what was not: each row's own is rehearsed
JOBS = {
    "ResNet-20": Job("resnet20", "resnet20_cifar10", "cifar10", IMAGENET, _CIFAR, True),
    "ResNet-56": Job("resnet56", "resnet56_cifar10", "cifar10", IMAGENET, _CIFAR, True),
    "MobileNetV1-0.75": Job("mobilenet_v1_075", "mobilenet_v1_075_imagenette", "imagenette224", SYMMETRIC, _SMALL, False),
    "MobileNetV2": Job("mobilenet_v2", "mobilenet_v2_imagenette", "imagenette224", SYMMETRIC, _REHEARSED, False),
}


@dataclass(frozen=True)
class Settings:
    """What all rows of one file have in common. ``test_images``, ``train_images``: 0 for all."""

    round_to: int
    images: int
    test_images: int = 0
    train_images: int = 0


@dataclass
class Bench:
    """One network, opened; ``peer`` learns what its criteria need of it once."""

    job: Job
    settings: Settings
    dense: nn.Module
    data: ImageData
    coupling: Coupling
    peer: peer.Peer

    @property
    def macs(self) -> int:
        return self.coupling.cost().macs


Method = Callable[[Bench, float, int], nn.Module]
"""(network, cut, seed) -> the pruned model."""


def open_job(job: Job, shared: Path, settings: Settings) -> Bench:
    dense = load_model(f"{shared}/models.py:{job.factory}", shared / "data" / "weights" / f"{job.weights}.safetensors").eval()
    data = load_data(str(shared / "data" / job.data), preprocess=job.preprocess)
    if settings.train_images:
        data = replace(data, train=data.train.subset(range(settings.train_images)))

    def batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return sample_batches(data.train, data.preprocess, images=settings.images, seed=seed, batch_size=size)

    example = next(batches(1, 0))[0]
    other = peer.Peer(dense, example, batches, lambda model: macs_of(model, example), settings.round_to, job.inner_only)
    return Bench(job, settings, dense, data, coppice.couple(coppice.capture(dense, example)), other)


def macs_of(model: nn.Module, example: Tensor) -> int:
    return coppice.couple(coppice.capture(model, example)).cost().macs


# --- methods --------------------------------------------------------------------------------------------------------


def ours(bench: Bench, factor: float, seed: int, criterion: str, refit: bool = True) -> nn.Module:
    """The cut of `coppice prune`: score, plan, apply, verify, repair."""
    grid = bench.settings.round_to
    config = RunConfig(
        criterion=criterion, round_to=grid, min_width=grid, calibration=bench.settings.images, repair=refit, seed=seed, threads=1
    )
    with tempfile.TemporaryDirectory() as folder, create_run(Path(folder) / "run", config) as run:
        work = Workbench(bench.dense, bench.data, bench.coupling, bench.coupling.cost(), run, Silent(), None)
        dense = Snapshot("dense", None, None, asdict(work.cost), {"top1": 100.0})
        return materialise(work, cut(work, "cut", dense, {"macs": bench.macs / factor}))


def theirs(bench: Bench, factor: float, seed: int, criterion: str, setting: str, norms: bool) -> nn.Module:
    model = bench.peer.pruned(bench.macs / factor, criterion, setting, seed)
    if norms:
        reestimate_batchnorm(model, bench.data.train, bench.data.preprocess, images=bench.settings.images, seed=seed, batch_size=64)
    return model


def smaller(bench: Bench, factor: float, seed: int) -> nn.Module:
    """All axes narrowed by one share, and initialised anew."""
    scores = coppice.score(bench.dense, bench.coupling, "random", seed=seed)
    grid = bench.settings.round_to
    plan = coppice.plan(bench.coupling, scores, {"macs": bench.macs / factor}, "uniform", grid, grid)
    model = coppice.apply(bench.dense, plan)
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def methods(epochs: int) -> Iterator[tuple[str, Method]]:
    for criterion in CRITERIA:
        yield f"ours, {criterion}", partial(ours, criterion=criterion)
    yield "ours, obs, layers not refitted", partial(ours, criterion="obs", refit=False)
    if epochs:
        yield SCRATCH, smaller
    for criterion in (*peer.CRITERIA, peer.RANDOM):
        for setting in peer.SETTINGS:
            for norms in (False, True):
                name = f"Torch-Pruning, {criterion}, {setting}" + (", BatchNorm re-estimated" if norms else "")
                yield name, partial(theirs, criterion=criterion, setting=setting, norms=norms)


# --- rows -----------------------------------------------------------------------------------------------------------


def work(epochs: int, cuts: tuple[float, ...], only: list[str], seeds: tuple[int, ...] = SEEDS) -> Iterator[tuple[Row, Method]]:
    """What identifies each row that was asked for, and its method."""
    yield {"method": "dense", "cut": 1.0, "epochs": 0, "seed": 0}, lambda bench, *_: bench.dense
    for factor in cuts:
        for name, method in methods(epochs):
            if not only or any(re.search(part, name) for part in only):
                for seed in seeds:
                    yield {"method": name, "cut": factor, "epochs": epochs, "seed": seed}, method


def result(bench: Bench, key: Row, method: Method) -> Row:
    """Prune, train, measure; a peer that can't is a row that says why."""
    start = time.process_time()
    try:
        model = method(bench, key["cut"], key["seed"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    seconds = time.process_time() - start
    if key["epochs"]:
        recipe = replace(bench.job.recipe, epochs=key["epochs"], precision="fp32")
        if key["method"] == SCRATCH:  # what suits a trained network is too gentle for a fresh one
            recipe = replace(recipe, optimizer="sgd", lr=4 * replace(recipe, optimizer="sgd").peak_lr(), freeze_norm=False)
        fine_tune(model, bench.data, recipe, teacher=bench.dense, seed=key["seed"])
    found = evaluate(model, bench.data.test, bench.data.preprocess, limit=bench.settings.test_images or None)
    macs = macs_of(model, bench.peer.example)
    trained = time.process_time() - start - seconds
    return {"top1": found.top1, "n": found.n, "macs_ratio": macs / bench.macs, "seconds": seconds, "seconds_training_and_test": trained}


def interval(rows: list[Row]) -> tuple[float, float, float]:
    """Mean top-1 over seeds and its 95 % interval."""
    centre, n = mean(row["top1"] for row in rows), rows[0]["n"]
    if len(rows) == 1:
        return centre, *wilson_interval(round(centre / 100 * n), n)
    share = centre / 100
    half = 1.96 * math.sqrt(1e4 * share * (1 - share) / n + variance(row["top1"] for row in rows) / len(rows))
    return centre, max(0.0, centre - half), min(100.0, centre + half)


def table(rows: list[Row]) -> str:
    lines = [
        "| model | cut | epochs | method | MACs × | top-1 (95 %) | seeds | CPU seconds to prune |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for (model, factor, epochs, method), group in grouped(rows):
        left = f"| {model} | {factor:g} | {epochs} | {method} | "
        held = [row for row in group if "error" not in row]
        if not held:
            lines.append(f"{left} | fails: {' '.join(group[0]['error'].split())[:120]} | {len(group)} | |")
            continue
        centre, low, high = interval(held)
        size, seconds = mean(row["macs_ratio"] for row in held), mean(row["seconds"] for row in held)
        lines.append(f"{left}{size:.3f} | {centre:.2f} ({low:.2f}–{high:.2f}) | {len(held)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def grouped(rows: list[Row]) -> list[tuple[tuple[str, float, int, str], list[Row]]]:
    """Rows that differ in the seed alone, together; by model, cut and epochs, the best method first."""
    found: dict[tuple[str, float, int, str], list[Row]] = defaultdict(list)
    for row in rows:
        found[row["model"], row["cut"], row["epochs"], row["method"]].append(row)
    return sorted(found.items(), key=lambda item: (*item[0][:3], -mean(row.get("top1", -1.0) for row in item[1])))


def points(rows: list[Row]) -> list[pareto.Point]:
    found = []
    for (model, factor, epochs, method), group in grouped(rows):
        held = [row for row in group if "error" not in row]
        if held:
            found.append(pareto.Point(model, factor, epochs, method, mean(row["macs_ratio"] for row in held), *interval(held)))
    return found


# --- the run --------------------------------------------------------------------------------------------------------


def write(out: Path, rows: list[Row], settings: Settings) -> None:
    text = json.dumps({"settings": asdict(settings), "versions": versions(), "rows": rows}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    pareto.draw(points(rows), out.with_suffix(".svg"))


def read(out: Path, settings: Any) -> list[Row]:
    """The rows of a file that were made with these settings, a dataclass."""
    if not out.exists():
        return []
    found = json.loads(out.read_text(encoding="utf-8"))
    if found["settings"] != asdict(settings):
        raise SystemExit(f"{out} has rows of other settings ({found['settings']}); name another file")
    rows: list[Row] = found["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=JOBS, default=[])
    parser.add_argument("--cut", action="append", type=float, default=[])
    parser.add_argument("--only", action="append", default=[], help="a regular expression for methods' names, such as 'ours, obs$'")
    parser.add_argument("--seed", action="append", type=int, default=[], help="without it 0, 1 and 2")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after this long")
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--images", type=int, default=IMAGES, help="for calibration")
    parser.add_argument("--test-images", type=int, default=0, help="0: all")
    parser.add_argument("--train-images", type=int, default=0, help="0: all; a few show that everything runs")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, required=True, help="the .json; the .md and the .svg go beside it")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * args.minutes
    settings = Settings(args.round_to, args.images, args.test_images, args.train_images)
    rows = read(args.out, settings)
    with threads(1):
        for model in args.model or JOBS:
            bench: Bench | None = None
            for key, method in work(args.epochs, tuple(args.cut) or CUTS, args.only, tuple(args.seed) or SEEDS):
                key = {"model": model, **key}
                if any(key.items() <= row.items() for row in rows):
                    continue
                if time.monotonic() > end:
                    print("time is up; the same command goes on")
                    return
                bench = bench or open_job(JOBS[model], args.shared.resolve(), settings)
                rows.append(key | result(bench, key, method))
                print(json.dumps(rows[-1]), flush=True)
                write(args.out, rows, settings)
    print(table(rows))


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "coppice": coppice.__version__}
    if importlib.util.find_spec("torch_pruning"):
        from importlib.metadata import version

        found["torch_pruning"] = version("torch-pruning")
    return found


if __name__ == "__main__":
    main()
