"""Kill -9 a pruning run at random moments, resume it, and compare what it ends with to an undisturbed run.

    python bench/kill_resume.py --runs 10 --kills 1 --seed 0 --json kill_resume.json

The job is the demo's network with two cuts, in fp32 on one thread. Moments are drawn uniformly over the undisturbed run, from when its
folder was there (before that, while Python imports its packages, there is nothing to lose) to its end. A kill that comes too late, after
the run has ended, is drawn again.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coppice.config import RunConfig, dump_config
from coppice.demo import demo_config, train_dense
from coppice.progress import Silent
from coppice.targets import parse_target


@dataclass(frozen=True)
class Outcome:
    """One run: when it was killed (seconds after each start) and in which stage, and whether it ended as the undisturbed one did."""

    killed_after: list[float]
    finished_stages: list[int]
    same_plan: bool
    same_metrics: bool
    same_weights: bool

    @property
    def same(self) -> bool:
        return self.same_plan and self.same_metrics and self.same_weights


def prepare(folder: Path, epochs: int) -> Path:
    """A dense network in `folder` and the configuration of a run with two cuts that prunes it."""
    config = demo_config(folder)
    train_dense(replace(config, recipe=replace(config.recipe, epochs=2)), Silent())
    path = folder / "job.toml"
    path.write_text(dump_config(job(config, epochs)), encoding="utf-8")
    return path


def job(config: RunConfig, epochs: int) -> RunConfig:
    recipe = replace(config.recipe, epochs=epochs, precision="fp32")
    return replace(config, target=parse_target("macs=0.4"), max_drop=50.0, steps=2, rounds=1, threads=1, recipe=recipe)


def start(job: Path, out: Path) -> subprocess.Popen[str]:
    """Begin the run, or go on with it if it got as far as writing its configuration."""
    arguments = ["--resume", str(out)] if (out / "config.toml").exists() else ["--config", str(job), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "coppice", "prune", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def undisturbed(job: Path, out: Path) -> tuple[float, float]:
    """Run to the end; answers the seconds until the folder was made and until the end."""
    began = time.perf_counter()
    process = start(job, out)
    while process.poll() is None and not (out / "config.toml").exists():
        time.sleep(0.02)
    made = time.perf_counter() - began
    finish(process)
    return made, time.perf_counter() - began


def finish(process: subprocess.Popen[str]) -> None:
    said = process.communicate()[0]
    if process.returncode != 0:
        raise RuntimeError(f"the run ended with status {process.returncode}:\n{said}")


def disturbed(job: Path, out: Path, kills: int, span: tuple[float, float], dice: random.Random, expected: Path) -> Outcome:
    """Start the run, kill it `kills` times, let it finish, compare. A run that ended before it could be killed is started over."""
    moments, stages = [], []
    while len(moments) < kills:
        process = start(job, out)
        moment = dice.uniform(span[0], span[0] + (span[1] - span[0]) / kills)  # few then end too early
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL: nothing of ours gets to clean up
            moments.append(round(moment, 2))
            journal = out / "journal.json"
            stages.append(len(json.loads(journal.read_text())) if journal.exists() else 0)
        said = process.communicate()[0]
        if process.returncode > 0:
            raise RuntimeError(f"the run ended with status {process.returncode}:\n{said}")
        if (out / "manifest.json").exists():
            shutil.rmtree(out)
            moments, stages = [], []
    finish(start(job, out))
    return Outcome(
        moments,
        stages,
        (out / "plan.json").read_bytes() == (expected / "plan.json").read_bytes(),
        timeless(out / "metrics.json") == timeless(expected / "metrics.json"),
        (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes(),
    )


def timeless(path: Path) -> Any:
    """metrics.json without what a clock decides."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "seconds"}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(json.loads(path.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=1, help="in each run")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = prepare(folder, options.epochs)
        span = undisturbed(settings, folder / "undisturbed")
        print(f"undisturbed: {span[1]:.1f} s, the first {span[0]:.1f} s importing")
        print(f"{'run':>4} {'killed after (s)':<24} {'stages done':<12} plan    metrics weights")
        for number in range(options.runs):
            outcome = disturbed(settings, folder / f"run-{number}", options.kills, span, dice, folder / "undisturbed")
            outcomes.append(outcome)
            marks = " ".join(f"{'same' if ok else 'DIFFERS':<7}" for ok in (outcome.same_plan, outcome.same_metrics, outcome.same_weights))
            print(f"{number:>4} {outcome.killed_after!s:<24} {outcome.finished_stages!s:<12} {marks}", flush=True)
    killed = sum(len(outcome.killed_after) for outcome in outcomes)
    print(f"{killed} kills in {len(outcomes)} runs, {sum(outcome.same for outcome in outcomes)} ended as the undisturbed run")
    if options.json:
        options.json.write_text(json.dumps({"undisturbed_seconds": span[1], "runs": [asdict(o) for o in outcomes]}, indent=1) + "\n")
    return 0 if all(outcome.same for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
