"""Every classical strategy on ResNet-20 and CIFAR-10 at equal epochs: `python bench/strategies.py --out FILE.json`.

Parts: `structured`, half the MACs; `masks`, 90 % zeros; `2:4`; and `scratch`, a training from random weights that is cut after
a third of its epochs, beside the same training with the cut (and a fine-tuning of a sixth of the epochs) after it, and that with a group
lasso over its last two thirds. In the first three every
strategy has `--epochs` in all (`combined`: after the cut and after the masks), the dense model as the teacher, and no round more; random
choices are the control. Seconds are the process's on one thread, whoever shares its core, of the whole row (scoring, cutting, repairing,
training, validating and the test), bytes those of the file (the sparse one, where weights are masked), milliseconds those of
ONNX Runtime on one thread, the dense model's in turns with them (`--no-ms` leaves that out: it wants a core for itself; `--no-seconds`
leaves out the seconds, of rows that another machine adds).

Intervals are of 95 %: Wilson's for one seed, for several with the variance between them. Rows that are in `--out` are not done again,
`--minutes` begins no row after that long, `--only` and `--part` choose rows; the table is written beside the JSON.
"""

from __future__ import annotations

import argparse
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
from statistics import mean
from typing import Any

import torch
from torch import nn

import coppice
from accuracy import IMAGENET, Row, interval, read, versions
from coppice.data import ImageData, load_data
from coppice.evaluate import evaluate
from coppice.masks import MaskRecipe
from coppice.models import load_model
from coppice.recipe import Recipe
from coppice.run import MODEL, SPARSE
from coppice.stages import threads
from coppice.torch.regularise import Regulariser
from coppice.train import fine_tune, make_optimizer, steps_per_epoch

SEEDS = (0, 1, 2)
CUT = "macs=0.5"
RANDOM = "random"


@dataclass(frozen=True)
class Settings:
    """What all rows of one file have in common. `train_images`, `test_images`: 0 for all."""

    epochs: int = 4
    scratch_epochs: int = 12
    precision: str = "fp32"
    train_images: int = 0
    test_images: int = 0
    val_images: int = 1000
    calibration: int = 512


@dataclass
class Bench:
    settings: Settings
    dense: nn.Module
    fresh: Callable[[], nn.Module]
    data: ImageData
    timed: bool

    @property
    def recipe(self) -> Recipe:
        return Recipe(optimizer="sgd", epochs=self.settings.epochs, distill=0.9, precision=self.settings.precision)

    @property
    def scratch_recipe(self) -> Recipe:
        return Recipe(optimizer="sgd", epochs=self.settings.scratch_epochs, lr=0.1, precision=self.settings.precision)


Strategy = Callable[[Bench, int], Row]
"""(what is there, seed) -> what came of it."""


def open_bench(shared: Path, settings: Settings, timed: bool) -> Bench:
    data = load_data(str(shared / "data" / "cifar10"), preprocess=IMAGENET)
    data = replace(data, val=data.val.subset(range(settings.val_images)))
    if settings.train_images:
        data = replace(data, train=data.train.subset(range(settings.train_images)))
    spec = f"{shared}/models.py:resnet20"
    dense = load_model(spec, shared / "data" / "weights" / "resnet20_cifar10.safetensors").eval()
    return Bench(settings, dense, lambda: load_model(spec), data, timed)


# --- strategies -----------------------------------------------------------------------------------------------------


def dense(bench: Bench, seed: int) -> Row:
    return outcome(bench, bench.dense, 0.0, 1084544)


def pruned(bench: Bench, seed: int, target: str = "", **given: Any) -> Row:
    """What `coppice prune` makes of the trained network."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        options = {"recipe": bench.recipe, "rounds": 1, "seed": seed, "calibration": bench.settings.calibration, "threads": 1, **given}
        began = time.process_time()
        result = coppice.prune(bench.dense, bench.data, target, out=path, **options)
        took = time.process_time() - began
        file = path / SPARSE if (path / SPARSE).exists() else path / MODEL
        return outcome(bench, result.model, took, file.stat().st_size)


def masked(bench: Bench, seed: int, **given: Any) -> Row:
    return pruned(bench, seed, masks=MaskRecipe(**given))


def cut_early(bench: Bench, seed: int) -> Row:
    began = time.process_time()
    torch.manual_seed(seed)
    found = coppice.train_and_prune(bench.fresh(), bench.data, bench.scratch_recipe, CUT, at=(1 / 3,), seed=seed)
    return _from_scratch(bench, found.model, began) | {"epoch_seconds": [round(result.seconds, 1) for result in found.history]}


def cut_late(bench: Bench, seed: int, regularise: str = "", **given: Any) -> Row:
    """The whole training, the cut as `coppice prune` makes it, and a sixth of the epochs after it."""
    began = time.process_time()
    torch.manual_seed(seed)
    model = bench.fresh()
    epochs, recipe = bench.settings.scratch_epochs, bench.scratch_recipe
    settled = epochs // 3 if regularise else epochs
    optimizer = make_optimizer(model, recipe)
    train = partial(fine_tune, model, bench.data, recipe, seed=seed, optimizer=optimizer)
    train(span=(0, settled))
    if regularise:
        train(span=(settled, epochs), along=_regulariser(bench, model, regularise, epochs - settled))
    recipe = replace(bench.recipe, epochs=max(1, epochs // 6))
    options = {"rounds": 1, "seed": seed, "threads": 1, "calibration": bench.settings.calibration, **given}
    found = coppice.prune(model, bench.data, CUT, recipe=recipe, **options)
    return _from_scratch(bench, found.model, began)


def _regulariser(bench: Bench, model: nn.Module, kind: str, epochs: int) -> Regulariser:
    coupling = coppice.couple(coppice.capture(model.eval(), torch.zeros(2, *bench.data.input_shape)))
    steps = epochs * steps_per_epoch(bench.data, bench.scratch_recipe)
    return coppice.regulariser(model, coupling, kind, steps=steps, target={"macs": 0.5 * coupling.cost().macs})


def _from_scratch(bench: Bench, model: nn.Module, began: float) -> Row:
    took = time.process_time() - began
    return outcome(bench, model, took, sum(t.numel() * t.element_size() for t in model.state_dict().values()))


def strategies() -> Iterator[tuple[str, str, Strategy]]:
    """Part, name, how; those that the bars of the issue are about first."""
    cut = partial(pruned, target=CUT)
    magnitude = {"criterion": "l2", "allocation": "global", "repair": False}
    yield "dense", "dense", dense
    yield "structured", "one-shot, magnitude", partial(cut, **magnitude)
    yield "structured", "regularised, group lasso, then magnitude", partial(cut, regularise="group-lasso", **magnitude)
    yield "structured", "one-shot, default", cut
    yield "structured", "regularised, group lasso, then default", partial(cut, regularise="group-lasso")
    yield "structured", RANDOM, partial(cut, criterion="random", allocation="global", repair=False)
    for kind in ("growing", "slimming", "l1", "l2", "soft"):
        yield "structured", f"regularised, {kind}, then magnitude", partial(cut, regularise=kind, **magnitude)
    yield "structured", "iterative, 2 steps, default", partial(cut, steps=2)
    yield "structured", "one-shot, taylor", partial(cut, criterion="taylor")
    yield "masks", "cubic while training, magnitude", partial(masked, sparsity=0.9, schedule="cubic")
    yield "masks", "one-shot, magnitude", partial(masked, sparsity=0.9)
    yield "masks", RANDOM, partial(masked, sparsity=0.9, criterion="random")
    yield "masks", "one-shot, sparsegpt, erk", partial(masked, sparsity=0.9, criterion="sparsegpt", scope="erk")
    yield "masks", "iterative, 2 rounds, magnitude", partial(masked, sparsity=0.9, schedule="iterative", steps=2)
    yield "masks", "cubic while training, movement", partial(masked, sparsity=0.9, schedule="cubic", criterion="movement")
    for criterion in ("gradient", "taylor", "wanda", "sparsegpt"):
        yield "masks", f"one-shot, {criterion}", partial(masked, sparsity=0.9, criterion=criterion)
    for scope in ("layer", "erk"):
        yield "masks", f"one-shot, magnitude, {scope}", partial(masked, sparsity=0.9, scope=scope)
    for criterion in ("magnitude", RANDOM, "sparsegpt", "wanda"):
        yield "2:4", criterion, partial(masked, nm="2:4", criterion=criterion)
    yield "combined", "half the MACs, then 80 % zeros, all epochs after each", partial(cut, masks=MaskRecipe(0.8))
    yield "scratch", "cut after a third of the epochs", cut_early
    yield "scratch", "cut after the training, default", cut_late
    yield "scratch", "cut after the training, magnitude", partial(cut_late, **magnitude)
    yield "scratch", "trained with group lasso, then magnitude", partial(cut_late, regularise="group-lasso", **magnitude)


# --- rows -----------------------------------------------------------------------------------------------------------


def outcome(bench: Bench, model: nn.Module, seconds: float, size: int) -> Row:
    found = evaluate(model, bench.data.test, bench.data.preprocess, limit=bench.settings.test_images or None)
    example = torch.zeros(1, *bench.data.input_shape)
    macs = [coppice.couple(coppice.capture(m.eval(), example)).cost().macs for m in (model, bench.dense)]
    row = {"top1": found.top1, "n": found.n, "seconds": round(seconds, 1), "bytes": size, "macs_ratio": macs[0] / macs[1]}
    return row | (milliseconds(bench, model) if bench.timed else {})


def milliseconds(bench: Bench, model: nn.Module) -> Row:
    """Of one image in ONNX Runtime; where the machine is too busy to say, why."""
    try:
        found = coppice.measure({"dense": bench.dense, "this": model}, bench.data.input_shape, ("onnxruntime",), against="dense")
    except coppice.CoppiceError as error:
        return {"ms_error": str(error)}
    compared, timing = found.comparisons[0], next(t for t in found.timings if t.model == "this")
    return {"ms": 1e3 * timing.p50, "speedup": compared.ratio, "speedup_interval": list(compared.interval)}


def table(rows: list[Row]) -> str:
    lines = [
        "| part | strategy | top-1 (95 %) | seeds | CPU seconds | bytes | MACs × | ms | × as fast as dense |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["part"], row["strategy"]].append(row)
    order = {part: k for k, part in enumerate(dict.fromkeys(part for part, *_ in strategies()))}
    key = lambda item: (order[item[0][0]], item[0][1] == RANDOM, -mean(row["top1"] for row in item[1]))  # noqa: E731
    for (part, name), group in sorted(groups.items(), key=key):
        centre, low, high = interval(group)
        clocked = [r["seconds"] for r in group if "seconds" in r]
        cells = [f"{centre:.2f} ({low:.2f}–{high:.2f})", str(len(group)), f"{mean(clocked):.0f}" if clocked else ""]
        cells += [f"{mean(r['bytes'] for r in group):,.0f}", f"{mean(r['macs_ratio'] for r in group):.3f}"]
        timed = [r for r in group if "ms" in r]
        cells += (
            [f"{timed[0]['ms']:.3f}", "{:.2f} ({:.2f}–{:.2f})".format(timed[0]["speedup"], *timed[0]["speedup_interval"])]
            if timed
            else ["", ""]
        )
        lines.append(f"| {part} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(out: Path, rows: list[Row], settings: Settings) -> None:
    text = json.dumps({"settings": asdict(settings), "versions": versions(), "rows": rows}, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", default=[], help="structured, masks, 2:4, combined or scratch")
    parser.add_argument("--only", action="append", default=[], help="a regular expression for strategies' names")
    parser.add_argument("--seed", action="append", type=int, default=[], help="without it 0, 1 and 2")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after this long")
    parser.add_argument("--no-ms", action="store_true", help="time nothing")
    parser.add_argument("--no-seconds", action="store_true", help="note no seconds: those of other rows are another machine's")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, required=True, help="the .json; the .md goes beside it")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"[{value}]")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * args.minutes
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    rows = read(args.out, settings)
    bench: Bench | None = None
    with threads(1):
        for seed in args.seed or SEEDS:
            for part, name, strategy in strategies():
                row = {"part": part, "strategy": name, "seed": seed}
                wanted = (not args.part or part in args.part) and (not args.only or any(re.search(p, name) for p in args.only))
                if not wanted or (part == "dense" and seed != SEEDS[0]) or any(row.items() <= done.items() for done in rows):
                    continue
                if time.monotonic() > end:
                    print("time is up; the same command goes on")
                    return
                bench = bench or open_bench(args.shared.resolve(), settings, not args.no_ms)
                found = strategy(bench, seed)
                rows.append(row | {name: value for name, value in found.items() if not (args.no_seconds and name == "seconds")})
                print(json.dumps(rows[-1]), flush=True)
                write(args.out, rows, settings)
    print(table(rows))


if __name__ == "__main__":
    main()
