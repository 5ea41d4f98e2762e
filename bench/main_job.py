"""The main job on real images, as a user runs it: `coppice prune` on three networks, with random pruning at equal budgets as the control.

    python bench/main_job.py [--only resnet20] [--control] [--shared ../shared] [--json bench/results/main_job.json]

Prints a Markdown table; accuracies are top-1 on the whole test split with Wilson's 95 % interval. One seed a row: it shows what the
commands of the README do, it is no comparison of methods.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGENET = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
SYMMETRIC = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
SGD = ("--optimizer", "sgd")


@dataclass(frozen=True)
class Job:
    """One command. Paths are below the shared folder."""

    factory: str
    weights: str
    data: str
    target: str
    criterion: str
    flags: tuple[str, ...]


JOBS = {
    "resnet20": Job("resnet20", "resnet20_cifar10", "cifar10", "macs=0.5", "taylor", (*IMAGENET, "--epochs", "3", *SGD)),
    "resnet56": Job("resnet56", "resnet56_cifar10", "cifar10", "macs=0.5", "obs", (*IMAGENET, "--epochs", "4", "--rounds", "1", *SGD)),
    "mobilenet_v2": Job(
        "mobilenet_v2",
        "mobilenet_v2_imagenette",
        "imagenette224",
        "macs=0.6",
        "obs",
        (
            *SYMMETRIC,
            "--epochs",
            "8",
            "--rounds",
            "1",
            "--batch-size",
            "32",
            "--optimizer",
            "adamw",
            "--lr",
            "5e-5",
            "--freeze-norm",
            "--calibration",
            "1536",
        ),
    ),
}


def command(job: Job, shared: Path, criterion: str, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "coppice", "prune", "--model", f"{shared}/models.py:{job.factory}"),
        *("--weights", f"{shared}/data/weights/{job.weights}.safetensors", "--data", f"{shared}/data/{job.data}"),
        *("--target", job.target, "--max-drop", "2.0", "--criterion", criterion, "--out", str(out), *job.flags),
    ]


def run(name: str, criterion: str, shared: Path, folder: Path) -> dict[str, Any]:
    out = folder / f"{name}-{criterion}"
    argv = command(JOBS[name], shared, criterion, out)
    print("$ coppice", " ".join(argv[3:]), flush=True)
    status = subprocess.run(argv, check=False).returncode
    if not (out / "metrics.json").exists():
        raise SystemExit(f"{name} with {criterion} ended with status {status} and no metrics")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    keys = ("top1", "top1_ci95", "top5", "macs", "params", "bytes")
    return {
        "job": name,
        "criterion": criterion,
        "target": JOBS[name].target,
        "flags": list(JOBS[name].flags),
        **{part: {key: metrics[part][key] for key in keys} for part in ("dense", "pruned")},
        **{key: metrics[key] for key in ("drop", "met", "verified", "seconds", "statement")},
    }


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("job", "criterion", "MACs", "parameters", "dense top-1", "pruned top-1 (95 %)", "drop", "met", "verified", "seconds")
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for row in rows:
        dense, pruned = row["dense"], row["pruned"]
        low, high = pruned["top1_ci95"]
        shares = " | ".join(f"× {pruned[key] / dense[key]:.3f}" for key in ("macs", "params"))
        lines.append(
            f"| {row['job']} {row['target']} | {row['criterion']} | {shares} "
            f"| {dense['top1']:.2f} | {pruned['top1']:.2f} ({low:.2f}–{high:.2f}) | {dense['top1'] - pruned['top1']:+.2f} "
            f"| {'yes' if row['met'] else 'no'} | {'yes' if row['verified'] else 'no'} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=JOBS, action="append")
    parser.add_argument("--control", action="store_true", help="random pruning beside each")
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--json", type=Path, help="rows are added to what the file holds")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json and args.json.exists() else []
    with tempfile.TemporaryDirectory(prefix="coppice-bench-") as folder:
        for name in args.only or JOBS:
            for criterion in (JOBS[name].criterion, "random") if args.control else (JOBS[name].criterion,):
                row = run(name, criterion, args.shared.resolve(), Path(folder))
                rows = [r for r in rows if (r["job"], r["criterion"]) != (name, criterion)] + [row]
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
