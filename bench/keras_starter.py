"""The classic starter network on Imagenette: trained, then pruned by weights, by gradients, with L1 and L2 regularisation (docs/keras.md).

    KERAS_BACKEND=tensorflow python bench/keras_starter.py [--shared ../shared] [--out runs/keras-starter] [--size 96]

Half of the MACs, fine-tuned until at most 3 points of top-1 are lost on validation images or three rounds are over. What is in --out
already is not done again. The table goes to bench/results/keras_starter.md, from a run at 224 pixels alone.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
from keras import layers

import coppice
from coppice.keras.data import KerasData, load_images
from coppice.keras.train import Epochs
from coppice.machine import machine
from coppice.preprocess import Preprocess
from coppice.recipe import Recipe
from coppice.targets import humanise

RESULTS = Path(__file__).parent / "results"
TARGET, MAX_DROP = "macs=0.5", 3.0
EPOCHS = 4  # of the dense network's training
TUNING = Recipe(epochs=2, batch_size=32, optimizer="adamw", lr=5e-4, augment="none", distill=0.5)
WAYS: dict[str, dict[str, Any]] = {
    "weight magnitude": {"criterion": "l1"},
    "gradient magnitude": {"criterion": "gradient"},
    "L1 regularisation": {"criterion": "l1", "regularise": "l1"},
    "L2 regularisation": {"criterion": "l1", "regularise": "l2"},
}


def starter(size: int) -> Any:
    """What every tutorial begins with."""
    return keras.Sequential(
        [
            keras.Input((size, size, 3)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def trained(size: int, data: KerasData, path: Path) -> Any:
    """The dense network, from `path` or trained as anybody would."""
    if not path.exists():
        keras.utils.set_random_seed(0)
        model = starter(size)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        batches = Epochs(data.train, Recipe(batch_size=32, augment="none"), seed=0, mirror=True)
        began = time.perf_counter()
        model.fit(batches, epochs=EPOCHS, verbose=2)
        print(f"trained in {time.perf_counter() - began:.0f} s", flush=True)
        model.save(path)
    return keras.saving.load_model(path)


def row(way: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """What a run says, for the table."""
    tuned = [step for step in metrics["history"] if step["stage"].startswith("tuned")]
    keep = ("macs", "params", "top1", "top1_ci95")
    return {
        "way": way,
        **{part: {key: metrics[part][key] for key in keep} | {"val": metrics[part]["val"]["top1"]} for part in ("dense", "pruned")},
        "epochs": sum(len(step["training"]) for step in metrics["history"]),
        "rounds": len(tuned),
        "met": metrics["met"],
        "statement": metrics["statement"],
    }


def table(rows: list[dict[str, Any]], size: int) -> str:
    dense = rows[0]["dense"]
    lines = [
        "# Keras: the classic starter network, pruned in four ways",
        "",
        f"`bench/keras_starter.py` on Imagenette at {size} pixels (2,700 images to train on, 300 to decide on, 1,500 to test on):",
        f"trained for {EPOCHS} epochs with Adam, then `{TARGET}` with at most {MAX_DROP:g} points of top-1 lost on validation images.",
        "With so few images the network is far from what its size could learn, and training on helps any of these.",
        "",
        "| pruned by | MACs | parameters | top-1, validation | top-1, test | epochs | rounds | floor on test |",
        "|---|---|---|---|---|---|---|---|",
        f"| (dense) | {humanise(dense['macs'], 'macs')} | {humanise(dense['params'], 'params')} | {dense['val']:.2f} | {dense['top1']:.2f} "
        f"| {EPOCHS} | | |",
    ]
    for r in rows:
        p = r["pruned"]
        lines.append(
            f"| {r['way']} | × {p['macs'] / dense['macs']:.3f} | × {p['params'] / dense['params']:.3f} | {p['val']:.2f} | {p['top1']:.2f} "
            f"| {r['epochs']} | {r['rounds']} | {'holds' if r['met'] else 'missed'} |"
        )
    if missing := [way for way in WAYS if way not in {r["way"] for r in rows}]:
        lines += ["", f"Not run here: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--out", type=Path, default=Path("runs/keras-starter"))
    parser.add_argument("--size", type=int, default=224, help="pixels a side; smaller is quicker, and another network")
    parser.add_argument("--dense-only", action="store_true", help="train the dense network, and stop")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = {} if args.size == 224 else {"size": args.size}
    data = load_images(str(args.shared / "data/imagenette224"), Preprocess(**size))
    dense = trained(args.size, data, args.out / "dense.keras")
    rows = []
    for way, settings in () if args.dense_only else WAYS.items():
        result = coppice.prune(
            dense, data, TARGET, max_drop=MAX_DROP, stop_early=True, rounds=3, recipe=TUNING, calibration=256, allocation="global",
            out=args.out / way.replace(" ", "-"), **settings,
        )  # fmt: skip
        rows.append(row(way, result.metrics))
        print(f"{way}: {rows[-1]['statement']}", flush=True)
        write(rows, args.size, RESULTS if args.size == 224 else args.out)


def write(rows: list[dict[str, Any]], size: int, folder: Path) -> None:
    """After every way: a run that is stopped leaves what it has."""
    facts = {"machine": machine(len(os.sched_getaffinity(0))), "rows": rows}
    (folder / "keras_starter.json").write_text(json.dumps(facts, indent=1) + "\n")
    (folder / "keras_starter.md").write_text(table(rows, size))


if __name__ == "__main__":
    main()
