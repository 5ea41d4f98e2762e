"""What stages of the loop work with, and the short ones: measure the dense model, measure on the test split.

Each stage begins from what the stages before it left on disk and ends by writing what the next one needs; see `coppice.run`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from coppice.cost import Cost
from coppice.coupling import Coupling
from coppice.data import ImageData, Loaders, batches, sample_batches
from coppice.deadline import Clock, start_clock
from coppice.errors import CoppiceError
from coppice.evaluate import evaluate
from coppice.forward import device_of
from coppice.metrics import Metrics
from coppice.parallel import current
from coppice.planning import Plan
from coppice.progress import Progress
from coppice.run import Json, Run
from coppice.snapshot import Snapshot, as_snapshot
from coppice.timing import Setting
from coppice.torch.apply import build

REPAIRED_AT_ONCE = 32  # images in step: few enough for large maps to fit in memory, many enough for small ones to keep a core busy
Data = ImageData | Loaders
_CPU = torch.device("cpu")
TrainFunction = Callable[[nn.Module, int], None]
"""A user's own training: (model, epochs) -> None, in place."""


@dataclass(frozen=True)
class Workbench:
    """What every stage works with. `dense` stays as it is; `coupling` is the dense model's."""

    dense: nn.Module
    data: Data
    coupling: Coupling
    cost: Cost
    run: Run
    progress: Progress
    train: TrainFunction | None
    clock: Clock | None = None  # where the target asks for a latency; the first process's alone
    device: torch.device = _CPU  # of training and evaluation


def preprocessing(data: Data) -> Any:
    """None for a user's own loaders: their batches are model inputs already."""
    return data.preprocess if isinstance(data, ImageData) else None


def example_input(data: Data, images: int = 1) -> Tensor:
    """The first validation images as a model input (float32, NCHW). Raises CoppiceError if there is none."""
    order = range(min(images, len(data.val))) if isinstance(data, ImageData) else None
    first = next(iter(batches(data.val, preprocessing(data), batch_size=images, order=order)), None)
    if first is None:
        raise CoppiceError("the validation data is empty: there is nothing to decide on")
    return first[0][:images]


def dense_snapshot(bench: Workbench) -> Snapshot:
    """The model as it came, on the validation split."""

    def measure() -> Json:
        return asdict(Snapshot("dense", None, None, bench.cost.to_dict(), validate(bench, bench.dense, "dense")))

    return as_snapshot(bench.run.stage("dense", measure, shared=True))


def on_the_clock(bench: Workbench, setting: Setting) -> Workbench:
    """The same with a clock for the target's latency; the dense model is timed once a run."""
    shape = tuple(example_input(bench.data).shape[1:])
    folder = bench.run.state_path("dense").parent

    def work() -> Json:
        with bench.progress.bar(f"timing the dense model ({setting})"):
            return {"seconds": start_clock(setting, shape, bench.dense, folder).seconds}

    seconds = bench.run.stage("dense latency", work)["seconds"]
    clock = start_clock(setting, shape, bench.dense, folder, seconds) if current().rank == 0 else None
    return replace(bench, clock=clock, cost=replace(bench.cost, latency=seconds))


def test_metrics(bench: Workbench, snapshot: Snapshot) -> Json:
    """Accuracy on the test split: reported, never decided on."""
    name = f"test {snapshot.stage}"

    def work() -> Json:
        with bench.progress.bar(f"{snapshot.stage}: measuring on the test split") as advance:
            model = materialise(bench, snapshot).to(bench.device)
            found = evaluate(model, bench.data.test, preprocessing(bench.data), progress=advance)
        return asdict(found)

    return bench.run.stage(name, work, shared=True)


def materialise(bench: Workbench, snapshot: Snapshot) -> nn.Module:
    """The model of a snapshot, built from what is on disk (even if it was in memory just now: a resumed run must see the same bits)."""
    if snapshot.plan is None or snapshot.state is None:
        return copy.deepcopy(bench.dense).eval()
    return build(copy.deepcopy(bench.dense), Plan.from_json(snapshot.plan), bench.run.load_state(snapshot.state)).eval()


def at(device: torch.device, model: nn.Module) -> nn.Module:
    """`model`, which stays where it is, or a copy of it on another device."""
    return model if device_of(model) == device else copy.deepcopy(model).to(device)


def as_the_first(model: nn.Module) -> None:
    """Give the model of every process the weights that the first process's has."""
    if current().size > 1:
        model.load_state_dict(current().first(lambda: {name: value.cpu() for name, value in model.state_dict().items()}))


def calibration_images(bench: Workbench, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    config = bench.run.config
    return sample_batches(bench.data.train, preprocessing(bench.data), images=config.calibration, seed=config.seed, batch_size=batch_size)


def validate(bench: Workbench, model: nn.Module, name: str) -> Json:
    """Accuracy on the validation split."""
    with bench.progress.bar(f"{name}: measuring on the validation split") as advance:
        found: Metrics = evaluate(at(bench.device, model), bench.data.val, preprocessing(bench.data), progress=advance)
    return {"top1": found.top1, "top5": found.top5, "loss": found.loss, "n": found.n, "top1_ci95": list(found.top1_ci95)}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with a fixed number of PyTorch threads: sums come out in the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts hold the same names with the same bits (NaN equal to itself)."""
    return left.keys() == right.keys() and all(_bits(left[name]).equal(_bits(right[name])) for name in left)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
