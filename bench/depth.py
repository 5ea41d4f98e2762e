"""Depth beside width on real images: `python bench/depth.py PART --out bench/results/depth.json [--folder runs/depth] [--only REGEX]`.

`scores`: ResNet-56 without a quarter of its blocks, the cheapest by each score, refitted, not trained: test top-1 beside dense.
`macs`: half of the MACs, not trained, by widths alone and by widths and modules.
`latency`: 0.6 of ONNX Runtime's milliseconds and up to 3 epochs, the same two ways, with `--seeds`; and 0.75 and 0.8 for ResNet-56, whose
widths alone don't reach 0.6 (the row says so).

Rows that the file has are not done again, and a run that was stopped in `--folder` goes on where it was. Intervals are Wilson's, of 95 %; a
table (`.md`) is written beside the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import coppice
from accuracy import JOBS, Job
from coppice.config import RunConfig
from coppice.data import load_data, sample_batches
from coppice.errors import UnreachableError
from coppice.evaluate import evaluate, reestimate_batchnorm
from coppice.loop import prune_run
from coppice.models import load_model
from coppice.planning import plan_without
from coppice.progress import Terminal
from coppice.recipe import Recipe
from coppice.recovery import recover
from coppice.targets import parse_target
from coppice.torch.module_scores import MEASURES, module_scores
from coppice.torch.program import is_held_out

IMAGES, SCORED = 512, 256  # for the refit and for the scores; those that are not measured by removing use them all
PART = 0.25  # of the blocks
NETWORKS = ("ResNet-56", "MobileNetV2")
TRAINED = {"ResNet-56": Recipe(distill=0.9, epochs=3), "MobileNetV2": replace(JOBS["MobileNetV2"].recipe, epochs=3)}
TARGETS = {
    "macs": dict.fromkeys(NETWORKS, ("macs=0.5",)),
    "latency": {
        "ResNet-56": tuple(f"latency={share}@onnxruntime" for share in (0.6, 0.75, 0.8)),
        "MobileNetV2": ("latency=0.6@onnxruntime",),
    },
}
Row = dict[str, Any]


def weights_of(job: Job, shared: Path) -> Path:
    return shared / "data" / "weights" / f"{job.weights}.safetensors"


def scores(shared: Path, known: set[str], only: str) -> Iterator[Row]:
    """The blocks that go first by each score."""
    job = JOBS["ResNet-56"]
    model = load_model(f"{shared}/models.py:{job.factory}", weights_of(job, shared)).eval()
    data = load_data(str(shared / "data" / job.data), preprocess=job.preprocess)

    def batches(images: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(sample_batches(data.train, data.preprocess, images=images, seed=0, batch_size=32))

    coupling = coppice.couple(coppice.capture(model, batches(1)[0][0]))
    blocks = [c for c in coppice.removable(coupling) if c.kind == "residual"]
    count = round(PART * len(blocks))
    for by in ("dense", *MEASURES):
        name = f"ResNet-56, {count} of {len(blocks)} blocks by {by}" if by != "dense" else "ResNet-56, dense"
        if name in known or not re.search(only, name):
            continue
        began = time.perf_counter()
        if by == "dense":
            found = evaluate(model, data.test, data.preprocess)
            yield row(name, "scores", found.top1, found.top1_ci95, 1.0, began, {})
            continue
        said = module_scores(model, coupling, by, batches(SCORED if by == "loss" else IMAGES), blocks, F.cross_entropy)
        gone = sorted(blocks, key=lambda c: said[c.name])[:count]
        plan = plan_without(coupling, gone)
        pruned = coppice.apply(model, plan)
        coppice.verify(model, pruned, coupling, plan)
        images = [x for x, _ in batches(IMAGES)]
        fitted = [(x, x) for k, x in enumerate(images) if not is_held_out(k)]
        best, _ = recover(model, pruned, coupling, plan, images, lambda m: reestimate_batchnorm(m, fitted, None, images=IMAGES))  # noqa: B023
        found = evaluate(best, data.test, data.preprocess)
        part = 1 - sum(c.macs for c in gone) / coupling.cost().macs
        yield row(name, "scores", found.top1, found.top1_ci95, part, began, plan.modules)


def runs(part: str, shared: Path, folder: Path, seeds: int, known: set[str], only: str) -> Iterator[Row]:
    """Whole runs of the loop, by widths alone and with modules."""
    wanted = ((network, target) for network in NETWORKS for target in TARGETS[part][network])
    for (network, target), seed, depth in itertools.product(wanted, range(seeds), (False, True)):
        name = f"{network}, {target}, {'width and depth' if depth else 'width'}, seed {seed}"
        if name in known or not re.search(only, name):
            continue
        began, job = time.perf_counter(), JOBS[network]
        recipe = TRAINED[network] if part == "latency" else Recipe(epochs=0)
        config = RunConfig(
            model=f"{shared}/models.py:{job.factory}", weights=str(weights_of(job, shared)), data=str(shared / "data" / job.data),
            preprocess=job.preprocess, target=parse_target(target), depth=depth, recipe=recipe, rounds=1, seed=seed, threads=1,
        )  # fmt: skip
        try:
            result = prune_run(config, folder / re.sub(r"\W+", "-", name), progress=Terminal())
        except UnreachableError as error:
            yield {"name": name, "part": part, "error": str(error)}
            continue
        after, before = (result.metrics[key] for key in ("pruned", "dense"))
        extra = {"latency": after["latency"] / before["latency"]} if part == "latency" else {}
        share = after["macs"] / before["macs"]
        yield row(name, part, after["top1"], after["top1_ci95"], share, began, result.plan.modules) | extra


def row(name: str, part: str, top1: float, interval: Any, macs: float, began: float, modules: dict[str, str]) -> Row:
    seconds = round(time.perf_counter() - began)
    return {"name": name, "part": part, "top1": top1, "ci95": list(interval), "macs": macs, "modules": modules, "seconds": seconds}


def table(rows: list[Row]) -> str:
    lines = ["| | test top-1, % | 95 % | MACs | latency | modules that went |", "|---|---|---|---|---|---|"]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['name']} | – |  |  |  | {r['error']} |")
            continue
        interval = f"{r['ci95'][0]:.2f} to {r['ci95'][1]:.2f}"
        latency = f"× {r['latency']:.3f}" if "latency" in r else ""
        lines.append(f"| {r['name']} | {r['top1']:.2f} | {interval} | × {r['macs']:.3f} | {latency} | {', '.join(r['modules'])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("scores", "macs", "latency"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/depth"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    rows: list[Row] = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else []
    shared, known = arguments.shared.resolve(), {r["name"] for r in rows}
    found = (
        scores(shared, known, arguments.only)
        if arguments.part == "scores"
        else runs(arguments.part, shared, arguments.folder, arguments.seeds, known, arguments.only)
    )
    for new in found:
        rows.append(new)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
        print(table([new]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
