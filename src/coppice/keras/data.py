"""Labelled images for Keras: the kinds of data that the PyTorch front-end reads, as channels-last arrays, and `tf.data` or any batches.

Needs no PyTorch. The splits are those that `coppice.data` makes of the same data with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.decode import GREY_MODES, open_image, pixels_of
from coppice.errors import CoppiceError
from coppice.preprocess import Preprocess
from coppice.seeding import generator
from coppice.sources import Examples, open_source
from coppice.splits import TEST_FRACTION, assign_roles, cut_part

Array = NDArray[Any]
Batches = Iterable[tuple[Any, Any]]
KEPT_BYTES = 2**30  # decoded images stay in memory if a part fits into this


@dataclass
class Images:
    """A part of a data set: `rows` of `examples`, decoded when they are first read."""

    examples: Examples
    preprocess: Preprocess
    shape: tuple[int, int, int]  # height, width, channels
    rows: Array
    labels: Array
    _decoded: dict[int, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, indices: Array) -> Images:
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def pixels(self, index: int) -> Array:
        """uint8 HWC. Raises CoppiceError, naming the file or the row, if it can't be decoded or is not of the others' size."""
        row = int(self.rows[index])
        if row not in self._decoded:
            found = self._read(row)
            if len(self.rows) * found.nbytes > KEPT_BYTES:
                return found
            self._decoded[row] = found
        return self._decoded[row]

    def _read(self, row: int) -> Array:
        name = self.examples.name(row)
        try:
            found = pixels_of(open_image(self.examples.read(row)), self.preprocess, grey=self.shape[2] == 1)
        except (OSError, ValueError) as error:
            raise CoppiceError(f"{name} is not a readable image: replace or remove it") from error
        if found.shape != self.shape:
            raise CoppiceError(
                f"{name} is {found.shape[1]} x {found.shape[0]} pixels, others {self.shape[1]} x {self.shape[0]}: give --size"
            )
        return found

    def batches(
        self, size: int, order: Sequence[int] | None = None, augment: Callable[[Array], Array] | None = None
    ) -> Iterator[tuple[Array, Array]]:
        """(float32 NHWC model inputs, labels)."""
        order = range(len(self)) if order is None else order
        for start in range(0, len(order), size):
            some = list(order[start : start + size])
            x = np.stack([self.pixels(k) for k in some])
            yield normalised(x if augment is None else augment(x), self.preprocess), self.labels[some]


def normalised(images: Array, preprocess: Preprocess) -> Array:
    """uint8 NHWC in [0, 255] -> float32, scaled to [0, 1] and normalised."""
    x = images.astype(np.float32) / np.float32(255)
    for name, values, sign in (("mean", preprocess.mean, -1), ("std", preprocess.std, 1)):
        if len(values) not in (0, 1, x.shape[-1]):
            raise CoppiceError(f"{name} has {len(values)} numbers, the images have {x.shape[-1]} channels")
        if values:
            own = np.asarray(values, np.float32)
            x = x - own if sign < 0 else x / own
    return np.asarray(x)


@dataclass(frozen=True)
class KerasData:
    """A data set in three parts."""

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    mirror: bool


def load_images(
    spec: str, preprocess: Preprocess, val_fraction: float = 0.1, seed: int = 0, split_names: Mapping[str, str] | None = None
) -> KerasData:
    """Open a data set as `coppice.data.load_data` does, for Keras. Raises CoppiceError if there is none, or it can't be used."""
    source = open_source(spec)
    used = {role: source.parts[name] for role, name in assign_roles(list(source.parts), split_names or {}, spec).items()}
    if not all(len(examples.labels) for examples in used.values()):
        raise CoppiceError(f"{spec} has a part without images")
    shape = _shape(used["train"], preprocess)
    parts = {
        role: Images(examples, preprocess, shape, np.arange(len(examples.labels)), np.asarray(examples.labels, np.int64))
        for role, examples in used.items()
    }
    for role, fraction, purpose in (("test", TEST_FRACTION, "test split"), ("val", val_fraction, "validation split")):
        if role not in parts:
            train = parts["train"]
            left, taken = cut_part(train.labels, fraction, generator(seed, purpose), spec)
            parts["train"], parts[role] = train.subset(left), train.subset(taken)
    return KerasData(parts["train"], parts["val"], parts["test"], source.classes, source.mirror)


def _shape(examples: Examples, preprocess: Preprocess) -> tuple[int, int, int]:
    """That of the first image; grey only if it is, and no colours are asked for."""
    try:
        image = open_image(examples.read(0))
        grey = image.mode in GREY_MODES and max(len(preprocess.mean), len(preprocess.std)) <= 1
        found = pixels_of(image, preprocess, grey=grey)
    except (OSError, ValueError) as error:
        raise CoppiceError(f"{examples.name(0)} is not a readable image: replace or remove it") from error
    height, width, channels = found.shape
    return height, width, channels
