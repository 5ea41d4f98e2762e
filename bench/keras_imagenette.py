"""MobileNetV2 of keras.applications, with the weights of ../shared, to 0.6 of its MACs on Imagenette: 2 points may be lost.

    KERAS_BACKEND=tensorflow python bench/keras_imagenette.py [--shared ../shared] [--out runs/keras-imagenette]

A run in --out that was stopped goes on where it was. Writes bench/results/keras_imagenette.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "keras3"))

import keras
from convert import mobilenet_v2

import coppice
from coppice.keras.data import load_images
from coppice.machine import machine
from coppice.preprocess import Preprocess
from coppice.progress import Silent
from coppice.recipe import Recipe, described
from coppice.targets import humanise

RESULTS = Path(__file__).parent / "results"
TARGET, MAX_DROP = "macs=0.6", 2.0
CALIBRATION = 1536  # images, as in bench/main_job.py: the more, the better the refits of a network of 2 M parameters
TUNING = Recipe(epochs=3, batch_size=32, optimizer="adamw", freeze_norm=True, distill=0.9)  # as a rehearsal chose for it


class Said(Silent):
    """One line for each thing that is said."""

    def say(self, text: str) -> None:
        print(text, flush=True)


def table(metrics: dict[str, Any], backend: str) -> str:
    dense, pruned = metrics["dense"], metrics["pruned"]
    lines = [
        "# Keras: MobileNetV2 on Imagenette",
        "",
        f"`bench/keras_imagenette.py`, Keras on {backend}: `{TARGET}` with at most {MAX_DROP:g} points of top-1 lost,",
        f"cut by measured losses (obs) on {CALIBRATION:,} training images, layers refitted;",
        f"{TUNING.epochs} epochs of 2,700 images, {described(TUNING)}.",
        "",
        "| step | MACs | parameters | top-1, validation | epochs |",
        "|---|---|---|---|---|",
    ]
    for step in metrics["history"]:
        share = [step["macs"] / dense["macs"], step["params"] / dense["params"]]
        lines.append(f"| {step['stage']} | × {share[0]:.3f} | × {share[1]:.3f} | {step['val_top1']:.2f} | {len(step['training']) or ''} |")
    lines += [
        "",
        f"On the {dense['n']:,} test images: top-1 {dense['top1']:.2f} % ({humanise(dense['macs'], 'macs')} MACs) → {pruned['top1']:.2f} % "
        f"({humanise(pruned['macs'], 'macs')} MACs).",
        metrics["statement"],
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/keras-imagenette"))
    parser.add_argument("--size", type=int, default=224, help="pixels a side; the results are kept at 224 alone")
    args = parser.parse_args()
    model = mobilenet_v2(args.shared / "data/weights/mobilenet_v2_imagenette.safetensors", args.size)
    size = {} if args.size == 224 else {"size": args.size}
    data = load_images(str(args.shared / "data/imagenette224"), Preprocess(mean=(0.5,), std=(0.5,), **size))
    settings = {"rounds": 1, "calibration": CALIBRATION, "recipe": TUNING}
    result = coppice.prune(model, data, TARGET, max_drop=MAX_DROP, out=args.out, progress=Said(), **settings)
    backend = keras.backend.backend()
    text = table(result.metrics, backend)
    print(text)
    if args.size == 224:
        facts = {"backend": backend, "machine": machine(len(os.sched_getaffinity(0))), "metrics": result.metrics}
        (RESULTS / "keras_imagenette.json").write_text(json.dumps(facts, indent=1) + "\n")
        (RESULTS / "keras_imagenette.md").write_text(text)


if __name__ == "__main__":
    main()
