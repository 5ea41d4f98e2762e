"""Augmentation in NumPy and Pillow, of uint8 images and of whole batches: what torchvision does for `coppice.augment`, in its ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.recipe import augmentations

SMALL = 96  # up to this many pixels a shift is the field's habit; above, a rescaled crop
_AREA, _RATIO = (0.7, 1.0), (0.8, 1.25)  # of a rescaled crop
_ERASED, _ERASED_AREA, _ERASED_RATIO = 0.25, (0.02, 0.33), (0.3, 3.3)
_JITTER = 0.2  # of brightness, contrast and saturation
_ALPHA = {"mixup": 0.2, "cutmix": 1.0}  # as in the papers: Zhang et al., ICLR 2018; Yun et al., ICCV 2019
_TRIES = 10
_GREY = np.array([0.2989, 0.587, 0.114], np.float32)

Array = NDArray[Any]
One = Callable[[np.random.Generator, Array], Array]
Mix = Callable[[np.random.Generator, Array], tuple[Array, float]]


def make_augmentation(name: str, shape: tuple[int, int, int], *, pad: int | None = None, mirror: bool = True) -> One | None:
    """A transform of batches, called with what it draws from; None where there is nothing to do.

    Small images are shifted by up to `pad` pixels (default: an eighth of the height), large ones cropped to 70-100 % of their area, or
    shifted if `pad` is given. `mirror=False` is for data where a mirrored image is not of the same class.
    """
    height, width, _ = shape
    small = pad is not None or max(height, width) <= SMALL
    known: dict[str, One] = {
        "crop": partial(shifted, height // 8 if pad is None else pad) if small else rescaled_crop,
        "flip": flipped,
        "colour": jittered,
        "randaugment": partial(_by_pillow, "rand_augmented"),
        "trivialaugment": partial(_by_pillow, "trivially_augmented"),
        "erasing": erased,
    }
    steps = [known[step] for step in augmentations(name) if step in known and (mirror or step != "flip")]
    return partial(_batch, steps) if steps else None


def _batch(steps: list[One], rng: np.random.Generator, images: Array) -> Array:
    out = np.empty_like(images)
    for k, one in enumerate(images):
        for step in steps:
            one = step(rng, one)
        out[k] = one
    return out


def _by_pillow(name: str, rng: np.random.Generator, image: Array) -> Array:
    from coppice.keras import randaugment

    found: Array = getattr(randaugment, name)(rng, image)
    return found


def shifted(pad: int, rng: np.random.Generator, image: Array) -> Array:
    padded = np.pad(image, [(pad, pad), (pad, pad), (0, 0)])
    top, left = (int(rng.integers(0, 2 * pad + 1)) for _ in range(2))
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def flipped(rng: np.random.Generator, image: Array) -> Array:
    return image[:, ::-1] if rng.random() < 0.5 else image


def rescaled_crop(rng: np.random.Generator, image: Array) -> Array:
    """A part of the image, brought to its size."""
    height, width = image.shape[:2]
    rows, columns = _rectangle(rng, height, width, _AREA, _RATIO) or (height, width)
    top, left = int(rng.integers(0, height - rows + 1)), int(rng.integers(0, width - columns + 1))
    return resized(image, (left, top, left + columns, top + rows))


def resized(image: Array, box: tuple[int, int, int, int]) -> Array:
    """The part of the image in `box` (left, top, right, bottom) at the whole one's size, bilinear and antialiased."""
    from PIL import Image

    grey = image.shape[2] == 1
    whole = Image.fromarray(np.ascontiguousarray(image[..., 0] if grey else image))
    found = np.asarray(whole.crop(box).resize((image.shape[1], image.shape[0]), Image.Resampling.BILINEAR))
    return found[..., None] if grey else found


def _rectangle(
    rng: np.random.Generator, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int] | None:
    """Height and width of a rectangle that fits, of a share of the area, and of a ratio that is as likely as its inverse."""
    for _ in range(_TRIES):
        wanted = height * width * rng.uniform(*area)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        columns, rows = round(math.sqrt(wanted * shape)), round(math.sqrt(wanted / shape))
        if 0 < columns <= width and 0 < rows <= height:
            return rows, columns
    return None


def jittered(rng: np.random.Generator, image: Array) -> Array:
    """Brightness, contrast and saturation, in any order."""
    factors = rng.uniform(1 - _JITTER, 1 + _JITTER, 3)
    for k in rng.permutation(3):
        image = (brightness, contrast, saturation)[k](image, factors[k])
    return image


def brightness(image: Array, factor: float) -> Array:
    return _blended(image, np.float32(0), factor)


def contrast(image: Array, factor: float) -> Array:
    return _blended(image, np.floor(_grey(image)).mean(), factor)


def saturation(image: Array, factor: float) -> Array:
    return image if image.shape[2] == 1 else _blended(image, np.floor(_grey(image)), factor)


def _grey(image: Array) -> Array:
    return image.astype(np.float32) if image.shape[2] == 1 else (image.astype(np.float32) @ _GREY)[..., None]


def _blended(image: Array, other: Any, factor: float) -> Array:
    mixed = factor * image.astype(np.float32) + (1 - factor) * other
    return np.asarray(np.clip(mixed, 0, 255).astype(np.uint8))


def erased(rng: np.random.Generator, image: Array) -> Array:
    """A quarter of the images lose a rectangle."""
    if rng.random() >= _ERASED:
        return image
    height, width = image.shape[:2]
    found = _rectangle(rng, height, width, _ERASED_AREA, _ERASED_RATIO)
    if found is None:
        return image
    top, left = int(rng.integers(0, height - found[0] + 1)), int(rng.integers(0, width - found[1] + 1))
    image = image.copy()
    image[top : top + found[0], left : left + found[1]] = 0
    return image


def make_mix(name: str) -> Mix | None:
    """What mixes every image of a batch of inputs with the one before, and answers the share that it has left; None: there is none.

    With MixUp and CutMix every batch takes one of them by chance.
    """
    known: dict[str, Mix] = {"mixup": mixed_up, "cutmix": cut_mixed}
    chosen = [known[step] for step in augmentations(name) if step in known]
    return partial(_one_of, chosen) if chosen else None


def _one_of(mixes: list[Mix], rng: np.random.Generator, batch: Array) -> tuple[Array, float]:
    return mixes[int(rng.integers(len(mixes)))](rng, batch)


def mixed_up(rng: np.random.Generator, batch: Array) -> tuple[Array, float]:
    share = float(rng.beta(_ALPHA["mixup"], _ALPHA["mixup"]))
    return np.asarray(share * batch + (1 - share) * np.roll(batch, 1, axis=0), batch.dtype), share


def cut_mixed(rng: np.random.Generator, batch: Array) -> tuple[Array, float]:
    """A rectangle is the other image's; what of it would lie outside is left out."""
    height, width = batch.shape[1:3]
    half = 0.5 * math.sqrt(1 - rng.beta(_ALPHA["cutmix"], _ALPHA["cutmix"]))
    x, y = int(rng.integers(width)), int(rng.integers(height))
    left, right = max(0, x - int(half * width)), min(width, x + int(half * width))
    top, bottom = max(0, y - int(half * height)), min(height, y + int(half * height))
    mixed = batch.copy()
    mixed[:, top:bottom, left:right] = np.roll(batch, 1, axis=0)[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
