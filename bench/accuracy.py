"""Accuracy at a given size, beside Torch-Pruning 1.6.1 on the same weights, images and MACs: `python bench/accuracy.py --out FILE.json`.

Without training (the default) every method gets the same 512 calibration images; `--epochs N` then fine-tunes every result with the same
recipe. Rows: ours by its default criterion and by others, with and without repair; Torch-Pruning's L1, Taylor, OBD-C and BatchNorm scale,
each with global and with isomorphic ranking, raw and with BatchNorm re-estimated; random pruning as the control. Their pruning ratio is
found by bisection on MACs, with our `--round-to`; the classifier is ignored, as their users are told. Where theirs can't follow the
network (the padded shortcut of CIFAR ResNets), only the inner channels of the blocks are offered to it, which is its best there.
What is random has three seeds. Rows already in `--out` are kept, so that a table can be made in pieces. `--table FILE` writes Markdown.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import coppice
from coppice.criteria import CRITERIA, measure
from coppice.data import ImageData, load_data, sample_batches
from coppice.evaluate import evaluate, reestimate_batchnorm
from coppice.models import load_model
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.recovery import recover
from coppice.train import fine_tune

IMAGES = 512
CUTS = (1.33, 2.0, 3.0)
SEEDS = (0, 1, 2)
OURS = ("obs", "taylor", "taylor-gate", "fisher", "l1", "l2", "lamp", "fpgm", "bn-scale", "wanda")
THEIRS = ("L1", "Taylor", "OBD-C", "BN scale")
IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SYMMETRIC = Preprocess(mean=(0.5,), std=(0.5,))
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A trained network, its data, how it is fine-tuned, and the layers that the peer must leave alone."""

    factory: str
    weights: str
    data: str
    preprocess: Preprocess
    recipe: Recipe
    inner_only: bool


JOBS = {
    "ResNet-20": Job("resnet20", "resnet20_cifar10", "cifar10", IMAGENET, Recipe(distill=0.9), True),
    "ResNet-56": Job("resnet56", "resnet56_cifar10", "cifar10", IMAGENET, Recipe(distill=0.9), True),
    "MobileNetV1-0.75": Job(
        "mobilenet_v1_075", "mobilenet_v1_075_imagenette", "imagenette224", SYMMETRIC, Recipe(distill=0.9, batch_size=32, lr=1e-3), False
    ),
    "MobileNetV2": Job(
        "mobilenet_v2",
        "mobilenet_v2_imagenette",
        "imagenette224",
        SYMMETRIC,
        Recipe(distill=0.9, batch_size=32, optimizer="adamw", lr=1e-4, freeze_norm=True),
        False,
    ),
}


@dataclass(frozen=True)
class Bench:
    """One network, opened."""

    job: Job
    dense: nn.Module
    data: ImageData
    macs: int
    round_to: int

    def batches(self, size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        return sample_batches(self.data.train, self.data.preprocess, images=IMAGES, seed=seed, batch_size=size)

    def example(self) -> Tensor:
        return next(self.batches(1))[0]


def open_job(job: Job, shared: Path, round_to: int) -> Bench:
    dense = load_model(f"{shared}/models.py:{job.factory}", shared / "data" / "weights" / f"{job.weights}.safetensors").eval()
    data = load_data(str(shared / "data" / job.data), preprocess=job.preprocess)
    example = next(sample_batches(data.train, data.preprocess, images=1, seed=0, batch_size=1))[0]
    return Bench(job, dense, data, macs_of(dense, example), round_to)


def macs_of(model: nn.Module, example: Tensor) -> int:
    return coppice.couple(coppice.capture(model, example)).cost().macs


# --- ours -----------------------------------------------------------------------------------------------------------


def ours(bench: Bench, cut: float, criterion: str, seed: int, repaired: bool) -> nn.Module:
    coupling = coppice.couple(coppice.capture(bench.dense, bench.example()))
    batches = bench.batches(CRITERIA[criterion].batch or 1)
    scores = coppice.score(bench.dense, coupling, criterion, batches, F.cross_entropy, seed)
    if criterion != "obs":
        scores = measure(bench.dense, coupling, scores, bench.batches(32))
    plan = coppice.plan(coupling, scores, {"macs": bench.macs / cut}, round_to=bench.round_to, min_width=bench.round_to)
    pruned = coppice.apply(bench.dense, plan).eval()
    images = [x for x, _ in bench.batches(32)]

    def reestimate(model: nn.Module) -> None:
        reestimate_on(bench, model)

    return recover(bench.dense, pruned, coupling, plan, images, reestimate)[0] if repaired else pruned


def reestimate_on(bench: Bench, model: nn.Module) -> None:
    """On the same calibration images for every method."""
    reestimate_batchnorm(model, bench.data.train, bench.data.preprocess, images=IMAGES, batch_size=64)


# --- theirs ---------------------------------------------------------------------------------------------------------


def theirs(bench: Bench, cut: float, criterion: str, isomorphic: bool) -> nn.Module:
    """The largest model that their pruner gives within the MACs: bisection on its ratio."""
    low, high = 0.0, 0.95
    best: nn.Module | None = None
    for _ in range(7):
        ratio = (low + high) / 2
        pruned = their_cut(bench, criterion, isomorphic, ratio)
        if macs_of(pruned, bench.example()) <= bench.macs / cut:
            best, high = pruned, ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError("no ratio reaches the MACs")
    return best


def their_cut(bench: Bench, criterion: str, isomorphic: bool, ratio: float) -> nn.Module:
    import torch_pruning as tp

    importances: dict[str, Callable[[], Any]] = {
        "L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "Taylor": lambda: tp.importance.GroupTaylorImportance(),
        "OBD-C": lambda: tp.importance.OBDCImportance(num_classes=10),
        "BN scale": lambda: tp.importance.BNScaleImportance(),
    }
    model, importance = copy.deepcopy(bench.dense).eval(), importances[criterion]()
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ignored = [m for name, m in layers if not bench.job.inner_only or not (name.startswith("layer") and name.endswith("conv1"))]
    pruner = tp.pruner.BasePruner(
        model,
        bench.example(),
        importance=importance,
        global_pruning=True,
        isomorphic=isomorphic,
        pruning_ratio=ratio,
        ignored_layers=ignored if bench.job.inner_only else [layers[-1][1]],
        round_to=bench.round_to,
        max_pruning_ratio=0.95,
    )
    if criterion == "Taylor":
        feed_taylor(bench, model)
    elif criterion == "OBD-C":
        feed_obdc(bench, model, importance, pruner)
    pruner.step()
    return model.eval()


def feed_taylor(bench: Bench, model: nn.Module) -> None:
    """As in their examples: the gradient of the loss, accumulated over the batches."""
    model.zero_grad()
    for x, y in bench.batches(64):
        torch.autograd.backward(F.cross_entropy(model(x), y) / (IMAGES // 64))


def feed_obdc(bench: Bench, model: nn.Module, importance: Any, pruner: Any) -> None:
    """As in their examples: the Fisher of labels that are drawn from the model's own predictions.

    In 1.6.1 the look-up of attention answers None for a network without it, and OBD-C trips over that: mended here, to its advantage.
    """
    look_up = pruner._downstream_node_as_root_if_attention
    pruner._downstream_node_as_root_if_attention = lambda group: look_up(group) or group
    importance._prepare_model(model, pruner)
    generator = torch.Generator().manual_seed(0)
    for x, _ in bench.batches(64):
        z = model(x)
        labels = torch.multinomial(z.detach().softmax(1), 1, generator=generator)[:, 0]
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(z, labels))
        importance.step()
    importance._rm_hooks(model)


# --- the table ------------------------------------------------------------------------------------------------------


def methods() -> Iterator[tuple[str, Callable[[Bench, float], nn.Module]]]:
    for criterion in OURS:
        yield f"ours, {criterion}", lambda b, c, k=criterion: ours(b, c, k, 0, True)  # type: ignore[misc]
    yield "ours, obs, no repair", lambda b, c: ours(b, c, "obs", 0, False)
    for seed in SEEDS:
        yield f"random, repaired, seed {seed}", lambda b, c, s=seed: ours(b, c, "random", s, True)  # type: ignore[misc]
    for criterion in THEIRS:
        for isomorphic in (False, True):
            name = f"Torch-Pruning, {criterion}, {'isomorphic' if isomorphic else 'global'}"
            yield name, lambda b, c, k=criterion, i=isomorphic: theirs(b, c, k, i)  # type: ignore[misc]
            yield f"{name}, BatchNorm re-estimated", lambda b, c, k=criterion, i=isomorphic: with_norms(b, theirs(b, c, k, i))  # type: ignore[misc]


def with_norms(bench: Bench, model: nn.Module) -> nn.Module:
    reestimate_on(bench, model)
    return model


def result(bench: Bench, name: str, make: Callable[[Bench, float], nn.Module], cut: float, epochs: int) -> Row:
    start = time.perf_counter()
    try:
        model = make(bench, cut)
    except Exception as error:  # a peer that fails is a row that says so
        return {"method": name, "cut": cut, "epochs": epochs, "error": f"{type(error).__name__}: {error}"[:200]}
    seconds = time.perf_counter() - start
    if epochs:
        recipe = replace(bench.job.recipe, epochs=epochs, precision="fp32")
        fine_tune(model, bench.data, recipe, teacher=bench.dense)
    found = evaluate(model, bench.data.test, bench.data.preprocess)
    macs = macs_of(model, bench.example())
    return {
        "method": name,
        "cut": cut,
        "epochs": epochs,
        "top1": found.top1,
        "top1_ci95": list(found.top1_ci95),
        "macs": macs,
        "macs_ratio": macs / bench.macs,
        "seconds": seconds,
    }


def table(rows: list[Row]) -> str:
    lines = ["| model | cut | epochs | method | MACs × | top-1 (95 %) | seconds to prune |", "|---|---:|---:|---|---:|---:|---:|"]
    for row in sorted(rows, key=lambda r: (r["model"], r["cut"], r["epochs"], -r.get("top1", -1))):
        left = f"| {row['model']} | {row['cut']:g} | {row['epochs']} | {row['method']} | "
        if "error" in row:
            lines.append(f"{left} | fails: {row['error'].splitlines()[0][:60]} | |")
        else:
            low, high = row["top1_ci95"]
            lines.append(f"{left}{row['macs_ratio']:.3f} | {row['top1']:.2f} ({low:.2f}–{high:.2f}) | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=JOBS)
    parser.add_argument("--cut", action="append", type=float)
    parser.add_argument("--method", action="append", help="a part of the name")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--round-to", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows: list[Row] = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out and args.out.exists() else []
    for model in args.model or JOBS:
        bench = open_job(JOBS[model], args.shared.resolve(), args.round_to)
        chosen = [(n, m) for n, m in methods() if not args.method or any(part in n for part in args.method)]
        dense: tuple[str, Callable[[Bench, float], nn.Module]] = ("dense", lambda b, c: copy.deepcopy(b.dense))
        for cut, name, make in [(1.0, *dense), *((c, n, m) for c in args.cut or CUTS for n, m in chosen)]:
            key = (model, cut, args.epochs if cut > 1 else 0, name)
            if key in {(r["model"], r["cut"], r["epochs"], r["method"]) for r in rows}:
                continue
            rows.append({"model": model, "round_to": args.round_to, **result(bench, name, make, cut, key[2])})
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    if args.table:
        args.table.write_text(table(rows) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "coppice": coppice.__version__}
    if importlib.util.find_spec("torch_pruning"):
        from importlib.metadata import version

        found["torch_pruning"] = version("torch-pruning")
    return found


if __name__ == "__main__":
    main()
