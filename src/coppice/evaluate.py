"""Exact metrics of a classifier on a part of the data, and BatchNorm statistics re-estimated for a changed one."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from coppice.data import Batches, batches, sample_batches
from coppice.errors import CoppiceError
from coppice.forward import device_of, forward, inference_layout, norms_with_statistics, training_mode, weights_in
from coppice.metrics import Metrics, wilson_interval
from coppice.preprocess import Preprocess
from coppice.seeding import generator

Progress = Callable[[int, int | None], None]  # (done, total if it is known)


def evaluate(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, int]] | Batches,
    preprocess: Preprocess | None,
    *,
    batch_size: int | None = None,
    precision: str = "fp32",
    progress: Progress | None = None,
    limit: int | None = None,
) -> Metrics:
    """Evaluate `model`, in evaluation mode, on its own device; its training flags are given back.

    `dataset` is indexed (uint8 CHW, label) if there is a `preprocess`, otherwise an iterable of (model input, labels) batches.
    `batch_size` (of a dataset) changes nothing but the speed; by default as many images as a processor's caches like.
    `limit` takes that many images, always the same, drawn from all of a dataset (a fixed stride would favour classes where labels repeat
    in a cycle), or the first of an iterable.
    `progress` is told the images done and in all (None if that is unknown).
    Raises CoppiceError if there are no images, a label is none of the model's outputs, or the loss is not finite.
    """
    device = device_of(model)
    order: Sequence[int] | None = None
    total = limit
    if preprocess is not None:
        length = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length; their base class does not declare it
        total = length if limit is None else min(limit, length)
        order = range(length) if total == length else sorted(generator(0, "limit").permutation(length)[:total].tolist())
        if batch_size is None and total:
            batch_size = comfortable_batch(dataset[0][0].shape)  # type: ignore[index]
    tally = _Tally()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(training_mode(model, False))
        layout = None
        for x, y in batches(dataset, preprocess, batch_size=batch_size or 1, order=order, device=device):
            if limit is not None:
                x, y = x[: limit - tally.n], y[: limit - tally.n]
            if layout is None:
                layout = inference_layout(model, x)
                stack.enter_context(weights_in(model, layout))
            tally.add(forward(model, x, precision, layout), y)
            if progress is not None:
                progress(tally.n, total)
            if tally.n == limit:
                break
    return tally.metrics()


def comfortable_batch(shape: Sequence[int]) -> int:
    """Images a batch: measured on CPUs, MobileNetV2 at 224 x 224 takes half as long for an image in batches of 16 as in batches of 128."""
    return max(8, min(128, 2**20 // math.prod(shape[1:])))


class _Tally:
    """Counts over batches: exact, whatever the batch size."""

    def __init__(self) -> None:
        self.n = 0
        self._loss = 0.0
        self._top5 = 0
        self._seen: Tensor | None = None  # images of each class
        self._right: Tensor | None = None  # and how many of them were recognised

    def add(self, z: Tensor, y: Tensor) -> None:
        classes = z.shape[1]
        if y.dim() != 1 or y.is_floating_point():
            raise CoppiceError(
                f"the labels are {str(y.dtype)[6:]} of shape {tuple(y.shape)}: there must be one whole number an image (int64)"
            )
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
            raise CoppiceError(f"the data has the label {wrong}, the model {classes} outputs: give the data it was trained on")
        loss = float(F.cross_entropy(z.double(), y, reduction="sum"))
        if not math.isfinite(loss):
            raise CoppiceError(
                f"the model's loss is {loss} on images {self.n} to {self.n + len(y) - 1}: its weights or inputs are not finite"
            )
        ranked = z.topk(min(5, classes), dim=1).indices == y[:, None]
        self.n += len(y)
        self._loss += loss
        self._top5 += int(ranked.sum())
        seen, right = (torch.bincount(part, minlength=classes).cpu() for part in (y, y[ranked[:, 0]]))
        self._seen = seen if self._seen is None else self._seen + seen
        self._right = right if self._right is None else self._right + right

    def metrics(self) -> Metrics:
        if self._seen is None or self._right is None or self.n == 0:
            raise CoppiceError("there are no images to evaluate on")
        right = int(self._right.sum())
        counts = zip(self._right.tolist(), self._seen.tolist(), strict=True)
        return Metrics(
            top1=100 * right / self.n,
            top5=100 * self._top5 / self.n,
            loss=self._loss / self.n,
            n=self.n,
            per_class=tuple(100 * hits / seen if seen else None for hits, seen in counts),
            top1_ci95=wilson_interval(right, self.n),
        )


def reestimate_batchnorm(
    model: nn.Module,
    dataset: Dataset[tuple[Tensor, int]] | Batches,
    preprocess: Preprocess | None,
    *,
    images: int = 2048,
    seed: int = 0,
    batch_size: int = 256,
) -> None:
    """Replace the running statistics of every BatchNorm by averages over `images` training images, in place.

    Cutting channels changes what later layers see; the statistics of the dense model no longer fit. Every batch has the same weight
    (a cumulative average), only BatchNorm runs in training mode, and the images are drawn by `seed`.
    Raises CoppiceError if there are fewer than two images.
    """
    norms = norms_with_statistics(model)
    if not norms:
        return
    if preprocess is not None:
        available = min(images, len(dataset))  # type: ignore[arg-type]
        batch_size = min(batch_size, available)
        images = available - available % max(batch_size, 1)  # whole batches, as each has the same weight
    momenta = [norm.momentum for norm in norms]
    seen = 0
    with torch.no_grad(), training_mode(model, False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative
            norm.training = True
        try:
            for x, _ in sample_batches(
                dataset, preprocess, images=images, seed=seed, purpose="batchnorm", batch_size=batch_size, device=device_of(model)
            ):
                if len(x) > 1:
                    forward(model, x)
                    seen += len(x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    if seen < 2:
        raise CoppiceError("BatchNorm statistics need at least two training images")
