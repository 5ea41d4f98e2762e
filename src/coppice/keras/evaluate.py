"""Exact metrics of a Keras classifier on a part of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError, DivergedError
from coppice.keras.data import Batches, Images
from coppice.keras.heads import activation_of
from coppice.metrics import Metrics, wilson_interval
from coppice.seeding import generator

Array = NDArray[Any]
Part = Images | Batches
BATCH = 32


def batches_of(
    part: Part, size: int = BATCH, order: Array | None = None, augment: Callable[[Array], Array] | None = None
) -> Iterator[tuple[Array, Array]]:
    """Model inputs and targets: an image set in batches of ``size``, a user's own batches (`tf.data`, a list) as they come."""
    if isinstance(part, Images):
        yield from part.batches(size, None if order is None else order.tolist(), augment)
        return
    for batch in part:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise CoppiceError("the data gives something else than batches of (inputs, targets): give batched data with labels")
        yield np.asarray(batch[0]), np.asarray(batch[1])


def sample(part: Part, images: int, seed: int, size: int) -> Iterator[tuple[Array, Array]]:
    """Some training images, the same ones each time, in batches of ``size``."""
    if isinstance(part, Images):
        order = generator(seed, "calibration").permutation(len(part))[:images]
        yield from part.batches(size, order.tolist())
        return
    left = images
    for x, y in batches_of(part):
        for start in range(0, min(len(x), left), size):
            stop = min(start + size, left, len(x))
            yield x[start:stop], y[start:stop]
        left -= len(x)
        if left <= 0:
            return


def labels_of(targets: Array) -> Array:
    """Whole-number labels, of one-hot targets too."""
    if targets.ndim == 2 and targets.shape[1] > 1:
        return np.asarray(targets.argmax(1))
    return targets.reshape(-1).astype(np.int64)


def evaluate(model: Any, part: Part, progress: Callable[[int, int | None], None] | None = None) -> Metrics:
    """Top-1, top-5 and cross-entropy. Raises CoppiceError if there are no images, a label is none of the outputs, or nothing is finite."""
    ends = activation_of(model)
    right = top5 = n = 0
    loss = 0.0
    seen: Array | None = None
    hits: Array | None = None
    total = len(part) if isinstance(part, Images) else None
    for x, targets in batches_of(part):
        y = labels_of(targets)
        logs = log_probabilities(answers(model, x), ends)
        classes = logs.shape[1]
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise CoppiceError(f"the data has the label {int(y.max())}, the model {classes} outputs: give the data it was trained on")
        loss -= float(logs[np.arange(len(y)), y].sum())
        if not math.isfinite(loss):
            raise DivergedError("the model's loss is not finite: look for NaN or infinite weights or inputs")
        order = np.argsort(-logs, axis=1, kind="stable")[:, : min(5, classes)]
        first = order[:, 0] == y
        right, top5, n = right + int(first.sum()), top5 + int((order == y[:, None]).any(1).sum()), n + len(y)
        seen = np.bincount(y, minlength=classes) + (0 if seen is None else seen)
        hits = np.bincount(y[first], minlength=classes) + (0 if hits is None else hits)
        if progress is not None:
            progress(n, total)
    if seen is None or hits is None or n == 0:
        raise CoppiceError("there are no images to evaluate on")
    per_class = tuple(100 * float(h) / int(s) if s else None for h, s in zip(hits, seen, strict=True))
    return Metrics(100 * right / n, 100 * top5 / n, loss / n, n, per_class, wilson_interval(right, n))


def answers(model: Any, x: Array) -> Array:
    """The model's outputs. A last batch is filled up, as another size would be compiled anew."""
    missing = max(0, BATCH - len(x))
    whole = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x
    return np.asarray(keras.ops.convert_to_numpy(model.predict_on_batch(whole)))[: len(x)]


def log_probabilities(outputs: Array, ends: str) -> Array:
    """Of a model's outputs, which end with a softmax or with nothing; float64."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise CoppiceError(f"the model answers the shape {outputs.shape}: a classifier answers one number a class")
    x = outputs.astype(np.float64)
    if ends == "softmax":
        return np.log(np.maximum(x, 1e-30))
    x = x - x.max(1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(1, keepdims=True)))
