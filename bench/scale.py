"""The same run by one, two and three processes under torchrun: plans, accuracy and weights compared; and a run whose process is killed.

    python bench/scale.py --kills 3 --json bench/results/scale.json

The job is the demo's network with two cuts, in fp32. As a control one process runs it on two threads, which too is only another order of
sums. A kill is SIGKILL of the first process while it fine-tunes; what is then resumed is compared, bit by bit, with an undisturbed run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from coppice.config import dump_config, load_config
from coppice.run import read_json, read_tensors
from kill_resume import prepare, timeless

TUNED = "cut 2"  # the last stage before the fine-tuning


@dataclass(frozen=True)
class Row:
    """A run beside that of one process on one thread."""

    name: str
    same_plan: bool
    top1: float  # test, percent
    worst_weight: float  # largest difference of a weight, as a part of its tensor's largest


@dataclass(frozen=True)
class Resumed:
    """A run of two processes that was killed: whether it ended as the one that was not."""

    killed_after: float  # seconds of fine-tuning
    same_plan: bool
    same_metrics: bool
    same_weights: bool


def command(processes: int, *arguments: str) -> list[str]:
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, "-m", "coppice", "prune", *arguments]


def run(processes: int, *arguments: str) -> None:
    done = subprocess.run(command(processes, *arguments), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the run ended with status {done.returncode}:\n{done.stderr}")


def killed(job: Path, out: Path, after: float) -> None:
    """Start two processes, and kill the first so many seconds into the fine-tuning."""
    process = subprocess.Popen(command(2, "--config", str(job), "--out", str(out)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((out / "journal.json").exists() and TUNED in read_json(out / "journal.json")):
        time.sleep(0.02)
    time.sleep(after)
    if process.poll() is None:
        os.kill(int((out / "lock").read_text()), signal.SIGKILL)
    if process.wait() == 0:
        raise RuntimeError("the run ended before it could be killed: give it more epochs")


def row(name: str, out: Path, reference: Path) -> Row:
    ours, theirs = read_tensors(reference / "model.safetensors"), read_tensors(out / "model.safetensors")
    same, worst = same_plan(out, reference), 1.0
    if same:
        worst = max(float((theirs[name] - value).abs().max() / value.abs().max().clamp_min(1e-12)) for name, value in ours.items())
    return Row(name, same, read_json(out / "metrics.json")["pruned"]["top1"], worst)


def same_plan(left: Path, right: Path) -> bool:
    return (left / "plan.json").read_bytes() == (right / "plan.json").read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job, threaded = prepare(folder, given.epochs), folder / "threaded.toml"
        threaded.write_text(dump_config(replace(load_config(job)[0], threads=2)), encoding="utf-8")
        runs = {"1 process": (1, job), "1 process, 2 threads": (1, threaded), "2 processes": (2, job), "3 processes": (3, job)}
        rows = []
        for title, (processes, config) in runs.items():
            run(processes, "--config", str(config), "--out", str(folder / title))
            rows.append(row(title, folder / title, folder / "1 process"))
            said = (
                f"{'same' if rows[-1].same_plan else 'OTHER'} plan, top-1 {rows[-1].top1:.2f} %, weights within {rows[-1].worst_weight:.1e}"
            )
            print(f"{title:<22} {said}", flush=True)
        resumed = []
        for number in range(given.kills):
            out, undisturbed, after = folder / f"killed {number}", folder / "2 processes", dice.uniform(0.2, 0.6 * given.epochs)
            killed(job, out, after)
            run(2, "--resume", str(out))
            found = Resumed(
                round(after, 2),
                same_plan(out, undisturbed),
                timeless(out / "metrics.json") == timeless(undisturbed / "metrics.json"),
                (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes(),
            )
            resumed.append(found)
            print(f"killed after {after:.2f} s of fine-tuning, resumed: {found}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"rows": [asdict(r) for r in rows], "resumed": [asdict(r) for r in resumed]}, indent=1) + "\n")
    return 0 if all(r.same_plan for r in rows) and all(r.same_plan and r.same_metrics and r.same_weights for r in resumed) else 1


if __name__ == "__main__":
    sys.exit(main())
