"""Milliseconds: what half the MACs buys, beside Torch-Pruning 1.6.1, and how latency targets are met: `python bench/latency.py`.

Conversion: each model is pruned to half of its MACs by L1 and timed in turns with the dense one and the others, in one run for each
runtime; conversion is the speed-up divided by the MACs cut. Rows: coppice with `macs=0.5` (its default multiples of 8), the same on the
grid that was measured for the runtime (`--round-to`), the same on that grid or halfway between, whichever the clock says, coppice with
`macs=0.5` and `latency=0.5` on that runtime (as predicted, not corrected; it cuts deeper, where less of the time is in MACs), and the peer
(uniform, its usual setting) with `round_to` none and 8, its ratio bisected on our count of MACs.

Targets: `latency=0.6` in ONNX Runtime, planned, timed and corrected as `coppice prune` does before it trains: the error of the first
prediction, and the measured latency over the target.

Accuracy (`--accuracy`): MobileNetV2 on Imagenette at `latency=0.6@onnxruntime`, beside the plan for MACs that takes as long: the same
scores (obs), calibration images and repair; the share of MACs is bisected on measured milliseconds. Top-1 on the test split, before and
after `--epochs` by one recipe, distilled from the dense model.

Elsewhere weights are random: what they are does not change how long they take. One thread, batch 1. Rows that are in `--out` already are
kept, so it can run in pieces. A table is written beside the JSON. `pip install coppice[bench,openvino]` first; nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import coppice
from coppice.coupling import Coupling
from coppice.data import load_data, sample_batches
from coppice.deadline import Clock, plan_on_time, start_clock
from coppice.errors import CoppiceError
from coppice.evaluate import evaluate, reestimate_batchnorm
from coppice.exporting import write_onnx
from coppice.latency import latency_model
from coppice.models import load_model
from coppice.planning import kept_widths
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.recovery import recover
from coppice.timing import Setting, measure
from coppice.train import fine_tune
from peer import CannotPruneError, Peer

HERE = Path(__file__).parent
MODELS = ("mobilenet_v2", "resnet50", "efficientnet_b0", "convnext_tiny", "vit_b_16")
TARGETS = ("mobilenet_v2", "resnet50")
RUNTIMES = ("onnxruntime", "openvino")
SHAPE = (3, 224, 224)
SHARE, ASKED = 0.5, 0.6
TRIES = 4
SHARED = HERE.parents[1] / "shared"  # where ../shared lies beside the project
CALIBRATION = 256  # images
RECIPE = Recipe(optimizer="adamw", lr=1e-4, freeze_norm=True, batch_size=32, distill=0.9, precision="fp32")
BISECTED, ALIKE = 6, 0.015  # times; two latencies that differ by less are the same
Row = dict[str, Any]


def opened(name: str) -> tuple[nn.Module, Coupling]:
    torch.manual_seed(0)
    model = load_model(f"torchvision:{name}").eval()
    return model, coppice.couple(coppice.capture(model, torch.zeros(1, *SHAPE)))


def macs_of(model: nn.Module) -> int:
    return coppice.couple(coppice.capture(model, torch.zeros(1, *SHAPE))).cost().macs


def conversion(name: str, runtime: str, rounds: int) -> list[Row]:
    """One row for each way of pruning the model, all timed in the same rounds."""
    dense, coupling = opened(name)
    whole = coupling.cost().macs
    scores = coppice.score(dense, coupling, "l1")
    setting = Setting(runtime, 1, 1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        clock = start_clock(setting, SHAPE, dense, Path(folder))

        predictor = latency_model(coupling, setting, clock.seconds)
        grid = math.lcm(8, predictor.grid)

        def ours(round_to: int = 8, offset: int = 0) -> nn.Module:
            return coppice.apply(dense, coppice.plan(coupling, scores, {"macs": SHARE * whole}, round_to=round_to, offset=offset))

        def ours_as_timed() -> nn.Module:
            return min((ours(grid), ours(grid, grid // 2)), key=lambda model: clock.time(model).seconds)

        def ours_in_time() -> nn.Module:
            budgets = {"macs": SHARE * whole, "latency": SHARE * clock.seconds}
            return coppice.apply(dense, coppice.plan(coupling, scores, budgets, round_to=grid, prices=predictor.prices))

        def theirs(round_to: int | None) -> Callable[[], nn.Module]:
            peer = Peer(dense, torch.zeros(1, *SHAPE), lambda size, seed: (), macs_of, round_to or 1, False)
            return lambda: peer.pruned(SHARE * whole, "L1", "uniform")

        ways: dict[str, Callable[[], nn.Module]] = {
            "coppice, macs=0.5": ours, "coppice, macs=0.5, the runtime's grid": lambda: ours(grid),
            "coppice, macs=0.5, on the grid or between, as timed": ours_as_timed,
            "coppice, macs=0.5 and latency=0.5": ours_in_time,
            "Torch-Pruning, round_to none": theirs(None), "Torch-Pruning, round_to 8": theirs(8),
        }  # fmt: skip
        files: dict[str, nn.Module | Path] = {"dense": clock.dense}
        for way, prune in ways.items():
            row: Row = {"model": name, "runtime": runtime, "way": way}
            rows.append(row)
            try:
                pruned = prune()
                row["macs_cut"] = whole / macs_of(pruned)
                files[way] = Path(folder) / f"{len(files)}.onnx"
                write_onnx(pruned.eval(), torch.zeros(2, *SHAPE), files[way])
            except (CoppiceError, CannotPruneError, RuntimeError, AttributeError, ValueError, TypeError, KeyError, IndexError) as error:
                files.pop(way, None)
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]  # the peer raises whatever its code meets
        found = measure(files, SHAPE, (runtime,), rounds=rounds)
    timings = {t.model: t for t in found.timings}
    for comparison in found.comparisons:
        row = next(r for r in rows if r["way"] == comparison.model)
        row |= {
            "speedup": comparison.ratio, "interval": list(comparison.interval), "p50_ms": 1e3 * timings[comparison.model].p50,
            "dense_p50_ms": 1e3 * timings["dense"].p50, "conversion": comparison.ratio / row["macs_cut"],
        }  # fmt: skip
    return rows


def target(name: str) -> Row:
    """A latency target of ``ASKED`` of the dense model, as the loop meets it before it trains."""
    dense, coupling = opened(name)
    setting = Setting("onnxruntime", 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        clock: Clock = start_clock(setting, SHAPE, dense, Path(folder))
        began = time.perf_counter()
        predictor = latency_model(coupling, setting, clock.seconds)
        spent = time.perf_counter() - began
        asked = ASKED * clock.seconds
        found = plan_on_time(copy.deepcopy(dense), coupling, coppice.score(dense, coupling, "l1"), {"latency": asked}, clock, predictor)
    first = found.tried[0]
    return {
        "model": name, "target": ASKED, "dense_ms": 1e3 * clock.seconds, "asked_ms": 1e3 * asked, "grid": predictor.grid,
        "tried_ms": [[1e3 * said, 1e3 * took] for said, took in found.tried], "first_error": first[0] / first[1] - 1,
        "measured_over_asked": found.timed.seconds / asked, "unexplained": predictor.unexplained, "table_seconds": spent,
        "speedup": found.timed.comparison.ratio, "interval": list(found.timed.comparison.interval),
        "macs_cut": coupling.cost().macs / macs_of(found.model),
    }  # fmt: skip


def accuracy(epochs: int) -> list[Row]:
    """Two plans that take equally long, one made for milliseconds, one for MACs, from the same scores, and repaired alike."""
    data = load_data(str(SHARED / "data" / "imagenette224"), preprocess=Preprocess(mean=(0.5,), std=(0.5,)), val_fraction=0.1, seed=0)
    weights = SHARED / "data" / "weights" / "mobilenet_v2_imagenette.safetensors"
    dense = load_model(f"{SHARED / 'models.py'}:mobilenet_v2", weights).eval()
    coupling = coppice.couple(coppice.capture(dense, torch.zeros(1, *SHAPE)))

    def calibration() -> list[torch.Tensor]:
        return [x for x, _ in sample_batches(data.train, data.preprocess, images=CALIBRATION, seed=0, batch_size=32)]

    def row(way: str, plan: coppice.Plan, seconds: float) -> Row:
        def reestimate(edited: nn.Module) -> None:
            reestimate_batchnorm(edited, [(x, x) for x in calibration()], None, images=CALIBRATION)

        pruned = coppice.apply(dense, plan)
        coppice.verify(dense, pruned, coupling, plan)
        repaired, said = recover(dense, pruned, coupling, plan, calibration(), reestimate)
        found = evaluate(repaired, data.test, data.preprocess)
        trained = None
        if epochs:
            fine_tune(repaired, data, replace(RECIPE, epochs=epochs), teacher=dense)
            trained = evaluate(repaired, data.test, data.preprocess)
        share = coupling.cost(kept_widths(coupling, plan)).macs / coupling.cost().macs
        return {
            "way": way, "ms": 1e3 * seconds, "macs": share, "top1": found.top1, "top1_ci95": list(found.top1_ci95), "kept": said.kept,
            "distance": dict(said.tried)[said.kept], "epochs": epochs,
            "trained": trained and trained.top1, "trained_ci95": trained and list(trained.top1_ci95),
        }  # fmt: skip

    scores = coppice.score(dense, coupling, "obs", sample_batches(data.train, data.preprocess, images=CALIBRATION, seed=0, batch_size=32))
    with tempfile.TemporaryDirectory() as folder:
        clock = start_clock(Setting("onnxruntime", 1, 1), SHAPE, dense, Path(folder))
        predictor = latency_model(coupling, clock.setting, clock.seconds)
        in_time = plan_on_time(dense, coupling, scores, {"latency": ASKED * clock.seconds}, clock, predictor)
        low, high = 0.3, 0.9
        for _ in range(BISECTED):
            share = (low + high) / 2
            plan = coppice.plan(coupling, scores, {"macs": share * coupling.cost().macs})
            seconds = clock.time(coppice.apply(dense, plan)).seconds
            if abs(seconds / in_time.timed.seconds - 1) < ALIKE:
                break
            low, high = (low, share) if seconds > in_time.timed.seconds else (share, high)
    return [row("latency=0.6@onnxruntime", in_time.plan, in_time.timed.seconds), row(f"macs={share:.3f}", plan, seconds)]


def patiently(work: Callable[[], Any]) -> Any:
    """Again, where other programs made it too noisy."""
    for _ in range(TRIES - 1):
        try:
            return work()
        except CoppiceError as error:
            print(f"again: {error}", file=sys.stderr)
    return work()


def table(found: Row) -> str:
    lines = [
        "# Milliseconds",
        "",
        f"From `python bench/latency.py`, on {found['machine']['cpu']}, one thread, batch 1.",
        "",
        "## Half the MACs",
        "",
    ]
    lines += ["| model | runtime | way | MACs cut | speed-up (95 %) | conversion |", "|---|---|---|---:|---:|---:|"]
    for r in found["conversion"]:
        said = (
            f"{r['macs_cut']:.2f} × | {r['speedup']:.2f} × ({r['interval'][0]:.2f} to {r['interval'][1]:.2f}) | {r['conversion']:.2f}"
            if "speedup" in r else f"– | {r.get('error', '')} | –"
        )  # fmt: skip
        lines.append(f"| {r['model']} | {r['runtime']} | {r['way']} | {said} |")
    lines += ["", "## latency=0.6@onnxruntime", ""]
    lines += [
        "| model | dense, ms | asked | predicted → measured | first prediction off by | measured over asked | seconds for the table |"
    ]
    lines += ["|---|---:|---:|---|---:|---:|---:|"]
    for r in found["targets"]:
        tried = ", ".join(f"{said:.2f} → {took:.2f}" for said, took in r["tried_ms"])
        lines.append(
            f"| {r['model']} | {r['dense_ms']:.2f} | {r['asked_ms']:.2f} | {tried} | {100 * r['first_error']:+.1f} % "
            f"| {r['measured_over_asked']:.3f} | {r['table_seconds']:.0f} |"
        )
    if found.get("accuracy"):
        lines += ["", "## Accuracy at equal milliseconds, MobileNetV2, Imagenette: cut and repaired, then trained", ""]
        lines += ["| target | ms | MACs | distance from the dense outputs | top-1, test (95 %) | epochs | top-1 after them |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|"]
        for r in found["accuracy"]:
            lines.append(
                f"| {r['way']} | {r['ms']:.2f} | × {r['macs']:.3f} | {r['distance']:.3f} | {_top1(r['top1'], r['top1_ci95'])} "
                f"| {r['epochs']} | {_top1(r['trained'], r['trained_ci95']) if r['epochs'] else '–'} |"
            )
    return "\n".join(lines) + "\n"


def _top1(value: float, interval: list[float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "latency.json")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--epochs", type=int, default=0, help="of the training after --accuracy's cuts")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from coppice.machine import machine, versions

    found: Row = json.loads(given.out.read_text()) if given.out.exists() else {"conversion": [], "targets": []}
    found |= {"machine": machine(1), "versions": versions()}

    def keep() -> None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(table(found))

    for name in given.models:
        if name in TARGETS and "onnxruntime" in given.runtimes and not any(r["model"] == name for r in found["targets"]):
            found["targets"].append(patiently(lambda name=name: target(name)))
            keep()
        for runtime in given.runtimes:
            if not any((r["model"], r["runtime"]) == (name, runtime) for r in found["conversion"]):
                found["conversion"] += patiently(lambda name=name, runtime=runtime: conversion(name, runtime, given.rounds))
                keep()
    if given.accuracy and "accuracy" not in found:
        found["accuracy"] = patiently(lambda: accuracy(given.epochs))
        keep()
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
