"""How fast fine-tuning is on a GPU, in fp32 and bf16: images a second, memory, and how much the one gains on the other.

    python bench/gpu_train.py --json bench/results/gpu_train.json
    torchrun --nproc-per-node 8 bench/gpu_train.py --batch-size 2048

The loop is `coppice.train.fine_tune` with a teacher, as after a cut; the images are made up and lie in memory, so that reading them is not
measured. Without a GPU it says so and measures nothing; `--device cpu` measures the processor instead.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coppice.data import Loaders
from coppice.errors import CoppiceError
from coppice.forward import placed
from coppice.models import load_model
from coppice.parallel import joined, leads
from coppice.recipe import PRECISIONS, Recipe
from coppice.seeding import seeded
from coppice.train import fine_tune

WARM = 5  # steps that are not timed: libraries choose their algorithms in the first ones


@dataclass(frozen=True)
class Row:
    precision: str
    images_per_second: float
    step_ms: float
    peak_memory_gb: float | None  # of the first process's GPU


@dataclass(frozen=True)
class Job:
    model: str
    size: int
    batch_size: int
    steps: int


def timed(model: nn.Module, job: Job, precision: str) -> Row:
    """Training of a copy of `model` for some steps."""
    device = next(model.parameters()).device
    with seeded(0, "images"):
        batch = torch.randn(job.batch_size, 3, job.size, job.size), torch.randint(0, 10, (job.batch_size,))
    moments: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    recipe = Recipe(epochs=1, optimizer="sgd", lr=1e-3, batch_size=job.batch_size, precision=precision, distill=0.9)
    fine_tune(
        copy.deepcopy(model),
        Loaders([batch] * (WARM + job.steps), [(batch[0][:8], batch[1][:8])], []),
        recipe,
        teacher=copy.deepcopy(model).eval(),
        progress=lambda done, total: moments.append(time.perf_counter()),
    )
    seconds = (moments[-1] - moments[WARM - 1]) / job.steps  # a step ends with its loss being read, so that the GPU is done with it
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return Row(precision, job.batch_size / seconds, 1000 * seconds, memory)


def measure(job: Job, device: str) -> dict[str, Any]:
    with joined(device) as world:
        where = placed(device)
        with seeded(0, "model"):
            model = load_model(job.model, None, None).to(where)
        rows = [timed(model, job, precision) for precision in PRECISIONS]
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    return {"device": name, "processes": world.size, "torch": torch.__version__, **asdict(job), "rows": [asdict(row) for row in rows]}


def report(found: dict[str, Any], path: Path | None) -> None:
    """One table, and one file, of all processes."""
    print(f"{found['model']}, {found['size']} pixels, batches of {found['batch_size']}: {found['processes']} x {found['device']}")
    rows = [Row(**row) for row in found["rows"]]
    for row in rows:
        memory = "" if row.peak_memory_gb is None else f", {row.peak_memory_gb:.1f} GB"
        gain = f", {row.images_per_second / rows[0].images_per_second:.2f} x {rows[0].precision}" if row is not rows[0] else ""
        print(f"{row.precision}: {row.images_per_second:8.1f} images/s, {row.step_ms:7.1f} ms a step{memory}{gain}")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256, help="of all processes together")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here, so nothing was measured: --device cpu measures the processor")
        return 0
    try:
        found = measure(Job(given.model, given.size, given.batch_size, given.steps), given.device)
    except CoppiceError as error:
        print(f"gpu_train: {error}", file=sys.stderr)
        return 2
    if leads():
        report(found, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
