"""How a model is run: its device, its precision, its memory layout, and the logits in what it returns."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coppice.errors import CoppiceError
from coppice.recipe import PRECISIONS
from coppice.seeding import seeded

_TIMED_STEPS = 3
_WORTHWHILE = 0.9  # bf16 has to take less than this share of fp32's time: below that it is noise, and fp32 is exact


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def placed(asked: str) -> torch.device:
    """Where this process trains and evaluates, for a device of `coppice.config.DEVICES`. Raises CoppiceError if that is not there."""
    gpu = int(os.environ.get("LOCAL_RANK", "0"))
    if asked == "cuda" and gpu >= torch.cuda.device_count():
        raise CoppiceError("--device cuda: PyTorch finds no GPU for this process, give --device cpu")
    return torch.device("cuda", gpu) if asked != "cpu" and gpu < torch.cuda.device_count() else torch.device("cpu")


def logits(output: object) -> Tensor:
    """The (N, classes) logits in what a model returned: itself, or a field called `logits`. Raises CoppiceError if there are none."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() != 2:
        what = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise CoppiceError(f"the model returned {what}: a classifier must return one row of class scores for each image")
    return found


def forward(model: nn.Module, x: Tensor, precision: str = "fp32", layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """float32 logits of the batch `x`, computed in `precision` ("fp32", or "bf16" by autocast) with the input in `layout`."""
    if precision not in PRECISIONS:
        raise CoppiceError(f"there is no precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return logits(model(x)).float()


def norms_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm of the model that keeps running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


@contextmanager
def training_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the model, and every module in it, to training or evaluation, then give each its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def weights_in(model: nn.Module, layout: torch.memory_format) -> Iterator[None]:
    """Lay the convolution weights out for `layout` once instead of in every call, and put the very same tensors back afterwards."""
    originals = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dim() == 4]
    try:
        for parameter, data in originals:
            parameter.data = data.contiguous(memory_format=layout)
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data


def inference_layout(model: nn.Module, x: Tensor) -> torch.memory_format:
    """channels_last, with which convolutions are faster on CPUs and GPUs alike, unless the model fails on it (as `view` of a map does)."""
    try:
        with torch.no_grad(), training_mode(model, False), weights_in(model, torch.channels_last):
            forward(model, x[:2], layout=torch.channels_last)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def training_layout(model: nn.Module, x: Tensor, y: Tensor) -> torch.memory_format:
    """As `inference_layout`, for a training step: tried on a copy of the model with two images."""
    if x.dim() != 4:
        return torch.contiguous_format
    try:
        _make_step(model, x[:2], y[:2], "fp32", torch.channels_last)()
    except (RuntimeError, ValueError):
        return torch.contiguous_format
    return torch.channels_last


def pick_precision(model: nn.Module, batch: tuple[Tensor, Tensor]) -> str:
    """ "fp32" or "bf16", whichever takes less time for training steps on `batch` (model input, labels), measured on copies of `model`.

    What it finds depends on the machine and its load: keep the choice, so that a resumed run makes the same.
    """
    x, y = (part.to(device_of(model)) for part in batch)
    layout = training_layout(model, x, y)
    steps = {precision: _make_step(model, x, y, precision, layout) for precision in PRECISIONS}
    best = dict.fromkeys(PRECISIONS, math.inf)
    for round_ in range(1 + _TIMED_STEPS):  # alternating, so that another program's burst of work meets both; the first round warms up
        for precision, step in steps.items():
            started = time.perf_counter()
            step()
            if round_ > 0:
                best[precision] = min(best[precision], time.perf_counter() - started)
    return "bf16" if best["bf16"] < _WORTHWHILE * best["fp32"] else "fp32"


def _make_step(model: nn.Module, x: Tensor, y: Tensor, precision: str, layout: torch.memory_format) -> Callable[[], None]:
    """Forward and backward of a copy of `model`, leaving no trace in it or in the random state."""
    trial = copy.deepcopy(model).train().to(memory_format=layout)

    def step() -> None:
        with seeded(0, "trial step", device=x.device):
            trial.zero_grad()
            torch.autograd.backward(F.cross_entropy(forward(trial, x, precision, layout), y))
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    return step
