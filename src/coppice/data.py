"""Labelled images in train, validation and test parts, and batches of them.

Every decision is taken on the validation part, which is cut from train; the test part is only reported.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from coppice.decode import GREY_MODES, decode, open_image
from coppice.errors import CoppiceError
from coppice.preprocess import Preprocess
from coppice.seeding import generator
from coppice.sources import Examples, open_source
from coppice.splits import TEST_FRACTION, assign_roles, cut_part

KEPT_BYTES = 2**30  # decoded images stay in memory if all of them together fit into this
EAGER_BYTES = 2**28  # and are decoded at once, so that a broken one is found before any work is done, if they fit into this
_THREADS = min(8, os.cpu_count() or 1)  # image libraries decode outside Python's lock

Batches = Iterable[tuple[Tensor, Tensor]]


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images as uint8 CHW with their labels: decoded, resized and cropped on first use, and kept if `keep`."""

    def __init__(self, examples: Examples, preprocess: Preprocess, shape: tuple[int, int, int], *, keep: bool) -> None:
        self.shape = shape
        self.labels = torch.tensor(examples.labels, dtype=torch.int64)
        self._examples = examples
        self._preprocess = preprocess
        self._rows = torch.arange(len(examples.labels))
        self._pixels = torch.empty((len(examples.labels), *shape), dtype=torch.uint8) if keep else None
        self._decoded = np.zeros(len(examples.labels), dtype=bool)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raises CoppiceError, naming the file or the row, if the image can't be decoded or is not of the others' size."""
        row = int(self._rows[index])
        if self._pixels is None:
            return self._decode(row), int(self.labels[index])
        if not self._decoded[row]:
            self._pixels[row] = self._decode(row)
            self._decoded[row] = True
        return self._pixels[row], int(self.labels[index])

    @property
    def in_memory(self) -> bool:
        """Whether every image is decoded already."""
        return self._pixels is not None and bool(self._decoded[self._rows.numpy()].all())

    def subset(self, indices: Sequence[int]) -> "ImageSet":
        """The images at `indices`, sharing what is decoded."""
        part = object.__new__(ImageSet)
        part.__dict__.update(self.__dict__)
        part._rows = self._rows[list(indices)]
        part.labels = self.labels[list(indices)]
        return part

    def _decode(self, row: int) -> Tensor:
        return _read(self._examples, row, self._preprocess, self.shape)


@dataclass(frozen=True)
class ImageData:
    """A data set in three parts. Each part yields (uint8 CHW tensor of `input_shape`, label)."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]  # channels, height, width
    preprocess: Preprocess
    kind: str  # "folder", "parquet", "arrow", "cifar10" or "digits"
    mirror: bool  # whether a mirrored image is still of its class


@dataclass(frozen=True)
class Loaders:
    """A user's own loaders: each yields (float batch ready for the model, int64 labels), can be iterated again, and has a length."""

    train: Batches
    val: Batches
    test: Batches


def load_data(
    spec: str,
    *,
    preprocess: Preprocess | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    split_names: Mapping[str, str] | None = None,
) -> ImageData:
    """Open a data set and make its splits.

    `spec`: "digits" (scikit-learn's), a folder DIR/<split>/<class>/* or DIR/<class>/*, a folder with CIFAR-10's batches as
    torchvision reads it, or a folder or file of Hugging Face parquet or arrow (columns image, label).
    Parts named train, val and test are used as they are named; of train and val alone, val is the test part. What is missing is
    cut from train, class by class, decided by `seed`: `val_fraction` of it, and before that a fifth for the test part.
    `split_names` says which part is which, for example {"train": "training", "test": "holdout"}.
    Raises CoppiceError if there is no data, an image is unreadable, a label out of range, or the sizes differ and no size is given.
    """
    preprocess = preprocess or Preprocess()
    if not 0 < val_fraction < 1:
        raise CoppiceError(f"the validation fraction is {val_fraction}: it must be between 0 and 1")
    source = open_source(spec)
    roles = assign_roles(list(source.parts), split_names or {}, spec)
    used = {role: source.parts[name] for role, name in roles.items()}
    for role, examples in used.items():
        if not len(examples.labels):
            raise CoppiceError(f"{spec} is empty: the part {roles[role]!r} has no images")
    shape = _input_shape(used["train"], preprocess)
    sets = _image_sets(used, preprocess, shape)
    train = sets["train"]
    if "test" not in sets:
        train, sets["test"] = _cut(train, TEST_FRACTION, generator(seed, "test split"), spec)
    if "val" not in sets:
        train, sets["val"] = _cut(train, val_fraction, generator(seed, "validation split"), spec)
    return ImageData(train, sets["val"], sets["test"], source.classes, shape, preprocess, source.kind, source.mirror)


def check_classes(data: ImageData, num_outputs: int) -> None:
    """Raise CoppiceError unless a model with `num_outputs` outputs fits the classes of `data`."""
    if num_outputs != len(data.classes):
        raise CoppiceError(
            f"the data has {len(data.classes)} classes and the model {num_outputs} outputs: "
            f"give the data it was trained on, or a model with {len(data.classes)} outputs"
        )


# --- splits ---------------------------------------------------------------------------------------------------------


def _cut(images: ImageSet, fraction: float, random: np.random.Generator, spec: str) -> tuple[ImageSet, ImageSet]:
    """Take `fraction` of every class away; both parts keep the original order."""
    left, taken = cut_part(images.labels.numpy(), fraction, random, spec)
    return images.subset(left.tolist()), images.subset(taken.tolist())


# --- decoding -------------------------------------------------------------------------------------------------------


def _read(examples: Examples, index: int, preprocess: Preprocess, shape: tuple[int, int, int]) -> Tensor:
    """One image as uint8 CHW. Raises CoppiceError if it can't be read, or is not of `shape`."""
    try:
        image = open_image(examples.read(index))
        if shape[0] == 1 and image.mode not in GREY_MODES:
            raise CoppiceError(
                f"{examples.name(index)} is in colour, other images in grey: give mean and std three numbers to read all in colour"
            )
        pixels = decode(image, preprocess, grey=shape[0] == 1)
    except (OSError, ValueError) as error:
        raise _unreadable(examples.name(index)) from error
    if pixels.shape != shape:
        raise _differs(examples.name(index), tuple(pixels.shape[1:]), shape)
    return pixels


def _unreadable(name: str) -> CoppiceError:
    return CoppiceError(f"{name} is not a readable image: replace or remove it")


def _differs(name: str, size: tuple[int, ...], shape: tuple[int, int, int]) -> CoppiceError:
    return CoppiceError(
        f"{name} is {size[1]}x{size[0]} pixels, other images are {shape[2]}x{shape[1]}: give a size to bring all to (--size)"
    )


def _input_shape(examples: Examples, preprocess: Preprocess) -> tuple[int, int, int]:
    """The shape of the first image: of one channel if it is grey and `mean` does not have three numbers."""
    try:
        image = open_image(examples.read(0))
        grey = max(len(preprocess.mean), len(preprocess.std)) <= 1 and image.mode in GREY_MODES
        channels, height, width = decode(image, preprocess, grey=grey).shape
    except (OSError, ValueError) as error:
        raise _unreadable(examples.name(0)) from error
    return channels, height, width


def _image_sets(parts: Mapping[str, Examples], preprocess: Preprocess, shape: tuple[int, int, int]) -> dict[str, ImageSet]:
    total = sum(len(examples.labels) for examples in parts.values()) * int(np.prod(shape))
    sets = {role: ImageSet(examples, preprocess, shape, keep=total <= KEPT_BYTES) for role, examples in parts.items()}
    for role, images in sets.items():
        if total <= EAGER_BYTES:
            for index in range(len(images)):
                _ = images[index]
        elif preprocess.size is None and preprocess.resize is None:
            _check_sizes(parts[role], shape)
    return sets


def _check_sizes(examples: Examples, shape: tuple[int, int, int]) -> None:
    """Compare the sizes in the images' headers, without decoding them."""
    for index in range(len(examples.labels)):
        try:
            width, height = open_image(examples.read(index)).size
        except (OSError, ValueError) as error:
            raise _unreadable(examples.name(index)) from error
        if (height, width) != shape[1:]:
            raise _differs(examples.name(index), (height, width), shape)


# --- batches --------------------------------------------------------------------------------------------------------


def raw_batches(dataset: Dataset[tuple[Tensor, int]], order: Sequence[int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The images at `order` in uint8 NCHW batches with int64 labels; those not decoded yet are, in threads, one batch ahead."""
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if not isinstance(dataset, ImageSet) or dataset.in_memory:
        for chunk in chunks:
            yield _stack([dataset[index] for index in chunk])
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = deque(pool.map(dataset.__getitem__, chunk) for chunk in chunks[:2])
        for following in [*chunks[2:], None, None]:
            if waiting:
                yield _stack(list(waiting.popleft()))
            if following is not None:
                waiting.append(pool.map(dataset.__getitem__, following))


def _stack(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])


def batches(
    dataset: Dataset[tuple[Tensor, int]] | Batches,
    preprocess: Preprocess | None,
    *,
    batch_size: int = 256,
    order: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Model inputs (float32 NCHW) and int64 labels, on `device`.

    With a `preprocess`, `dataset` is indexed (uint8 CHW, label), in `order` (default: its own). With None, it is an iterable of
    batches that are model inputs already, and `order` and `batch_size` are not used. Raises CoppiceError if it yields anything else.
    """
    if preprocess is None:
        for batch in dataset:  # type: ignore[union-attr]  # not a map-style dataset here
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
                raise CoppiceError(f"a loader yielded {type(batch).__name__}: it must yield pairs (input tensor, label tensor)")
            yield batch[0].to(device), batch[1].to(device)
        return
    if order is None:
        order = range(len(dataset))  # type: ignore[arg-type]  # map-style datasets have a length; their base class does not declare it
    for images, labels in raw_batches(dataset, order, batch_size):  # type: ignore[arg-type]  # not an iterable of batches here
        yield preprocess.normalise(images.to(device)), labels.to(device)


def sample_order(length: int, images: int, seed: int, purpose: str) -> list[int]:
    """`images` distinct indices below `length` (all of them if there are no more), shuffled by (seed, purpose)."""
    return [int(index) for index in generator(seed, purpose).permutation(length)[:images]]


def sample_batches(
    dataset: Dataset[tuple[Tensor, int]] | Batches,
    preprocess: Preprocess | None,
    *,
    images: int,
    seed: int,
    purpose: str = "calibration",
    batch_size: int = 128,
    device: torch.device | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of about `images` images, for calibration and scoring.

    Drawn by (seed, purpose) from a dataset; with `preprocess` None, the first ones of an iterable of batches.
    """
    if preprocess is not None:
        order = sample_order(len(dataset), images, seed, purpose)  # type: ignore[arg-type]
        yield from batches(dataset, preprocess, batch_size=batch_size, order=order, device=device)
        return
    seen = 0
    for x, y in batches(dataset, None, device=device):
        yield x, y
        seen += len(y)
        if seen >= images:
            return
