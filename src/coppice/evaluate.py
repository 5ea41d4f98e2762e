"""Exact metrics of a classifier on a part of the data, and BatchNorm statistics re-estimated for a changed one."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from coppice.data import Batches, batches, sample_batches
from coppice.errors import CoppiceError, DivergedError
from coppice.forward import device_of, forward, inference_layout, norms_with_statistics, training_mode, weights_in
from coppice.loaders import checksum, sampler_of
from coppice.metrics import Metrics, wilson_interval
from coppice.parallel import World, current
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
    world, device, total = current(), device_of(model), limit
    read: list[float] = []
    if preprocess is None:
        if world.size > 1 and sampler_of(dataset) is not None:
            raise CoppiceError(
                "a DistributedSampler repeats images to make parts even: give the loaders of validation and test without one"
            )
        own = _own(batches(dataset, None, device=device), limit, world, read)
    else:
        length = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length; their base class does not declare it
        total = length if limit is None else min(limit, length)
        chosen = range(length) if total == length else sorted(generator(0, "limit").permutation(length)[:total].tolist())
        if batch_size is None and total:
            batch_size = comfortable_batch(dataset[0][0].shape)  # type: ignore[index]
        size = batch_size or 1
        order = [index for start in range(0, total, size)[world.rank :: world.size] for index in chosen[start : start + size]]
        own = batches(dataset, preprocess, batch_size=size, order=order, device=device)

    def told(images: int) -> None:
        if progress is not None:
            progress(images * world.size if total is None else min(images * world.size, total), total)

    return metrics_of(world.together(lambda: _tally(model, own, precision, told, read)))


def _own(loader: Batches, limit: int | None, world: World, read: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches of a loader, which is read as a whole; `read` gets what tells its batches from others."""
    images = 0
    for k, (x, y) in enumerate(loader):
        if limit is not None:
            x, y = x[: limit - images], y[: limit - images]
        images += len(y)
        read.append(checksum(y))
        if k % world.size == world.rank:
            yield x, y
        if images == limit:
            return


def _tally(model: nn.Module, own: Batches, precision: str, told: Callable[[int], None], read: list[float]) -> "Tally":
    tally = Tally(read)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(training_mode(model, False))
        layout = None
        for x, y in own:
            if layout is None:
                layout = inference_layout(model, x)
                stack.enter_context(weights_in(model, layout))
            tally.add(forward(model, x, precision, layout), y)
            told(tally.n)
    return tally


def comfortable_batch(shape: Sequence[int]) -> int:
    """Images a batch: measured on CPUs, MobileNetV2 at 224 x 224 takes half as long for an image in batches of 16 as in batches of 128."""
    return max(8, min(128, 2**20 // math.prod(shape[1:])))


class Tally:
    """Counts over batches: exact, whatever the batch size and however many processes share the batches."""

    def __init__(self, read: list[float]) -> None:
        self.n = 0
        self.losses: list[float] = []  # of each batch
        self.top5 = 0
        self.seen: Tensor | None = None  # images of each class
        self.right: Tensor | None = None  # and how many of them were recognised
        self.read = read  # checksums of the labels of all batches of a loader, also those of other processes

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
            raise DivergedError(
                f"the model's loss is {loss} on images {self.n} to {self.n + len(y) - 1}: its weights or inputs are not finite"
            )
        ranked = z.topk(min(5, classes), dim=1).indices == y[:, None]
        self.n += len(y)
        self.losses.append(loss)
        self.top5 += int(ranked.sum())
        seen, right = (torch.bincount(part, minlength=classes).cpu() for part in (y, y[ranked[:, 0]]))
        self.seen = seen if self.seen is None else self.seen + seen
        self.right = right if self.right is None else self.right + right


def metrics_of(tallies: Sequence[Tally]) -> Metrics:
    """What the processes' tallies come to. Raises CoppiceError if there are no images, or they read other ones."""
    if any(tally.read != tallies[0].read for tally in tallies):
        raise CoppiceError("a loader for validation or test gives each process other batches: it must not shuffle")
    total = sum(tally.n for tally in tallies)
    if total == 0:
        raise CoppiceError("there are no images to evaluate on")
    loss = 0.0  # added up in the order of the batches, whoever had them: the sum is one process's, bit for bit
    for part in itertools.chain.from_iterable(itertools.zip_longest(*(tally.losses for tally in tallies), fillvalue=0.0)):
        loss += part
    seen = torch.stack([tally.seen for tally in tallies if tally.seen is not None]).sum(0)
    hits = torch.stack([tally.right for tally in tallies if tally.right is not None]).sum(0)
    right = int(hits.sum())
    return Metrics(
        top1=100 * right / total,
        top5=100 * sum(tally.top5 for tally in tallies) / total,
        loss=loss / total,
        n=total,
        per_class=tuple(100 * hit / of if of else None for hit, of in zip(hits.tolist(), seen.tolist(), strict=True)),
        top1_ci95=wilson_interval(right, total),
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
