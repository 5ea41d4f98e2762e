"""RandAugment and TrivialAugment in Pillow: torchvision's ops at torchvision's strengths.

Cubuk et al., RandAugment, NeurIPS 2020: two ops an image, at 9 of 30. Müller and Hutter, TrivialAugment, ICCV 2021: one op, at any strength
of wider ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

Array = NDArray[Any]
Do = Callable[[Image.Image, float], Image.Image]
STRONGEST, RAND_STRENGTH, RAND_OPS = 30, 9, 2
_SHIFT, _WIDE_SHIFT = 150 / 331, 32.0  # of a side; pixels


@dataclass(frozen=True)
class Op:
    """What is done to an image, and the amounts for which: from `least` (strength 0) to `most`, or to `wide` for TrivialAugment.

    `signed`: either way; `of`: the amounts of RandAugment are shares of this side (0 width, 1 height).
    """

    do: Do
    least: float = 0.0
    most: float = 0.0
    wide: float = 0.0
    signed: bool = False
    of: int | None = None

    def amount(self, strength: int, wide: bool, size: tuple[int, int]) -> float:
        most = self.wide if wide else self.most * (1 if self.of is None else size[self.of])
        return self.least + (most - self.least) * strength / STRONGEST


def _moved(image: Image.Image, *rows: float) -> Image.Image:
    """Each pixel from where the matrix says, black where that is outside."""
    return image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.NEAREST)


def _enhanced(kind: Callable[[Image.Image], Any], image: Image.Image, by: float) -> Image.Image:
    done: Image.Image = kind(image).enhance(1 + by)
    return done


OPS: dict[str, Op] = {
    "Identity": Op(lambda image, _: image),
    "ShearX": Op(lambda image, by: _moved(image, 1, by, 0, 0, 1, 0), most=0.3, wide=0.99, signed=True),
    "ShearY": Op(lambda image, by: _moved(image, 1, 0, 0, by, 1, 0), most=0.3, wide=0.99, signed=True),
    "TranslateX": Op(lambda image, by: _moved(image, 1, 0, -int(by), 0, 1, 0), most=_SHIFT, wide=_WIDE_SHIFT, signed=True, of=0),
    "TranslateY": Op(lambda image, by: _moved(image, 1, 0, 0, 0, 1, -int(by)), most=_SHIFT, wide=_WIDE_SHIFT, signed=True, of=1),
    "Rotate": Op(lambda image, by: image.rotate(by, Image.Resampling.NEAREST), most=30, wide=135, signed=True),
    "Brightness": Op(partial(_enhanced, ImageEnhance.Brightness), most=0.9, wide=0.99, signed=True),
    "Color": Op(partial(_enhanced, ImageEnhance.Color), most=0.9, wide=0.99, signed=True),
    "Contrast": Op(partial(_enhanced, ImageEnhance.Contrast), most=0.9, wide=0.99, signed=True),
    "Sharpness": Op(partial(_enhanced, ImageEnhance.Sharpness), most=0.9, wide=0.99, signed=True),
    "Posterize": Op(lambda image, bits: ImageOps.posterize(image, round(bits)), least=8, most=4, wide=2),
    "Solarize": Op(lambda image, above: ImageOps.solarize(image, 255 * above), least=1),  # type: ignore[arg-type]  # a fraction will do
    "AutoContrast": Op(lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": Op(lambda image, _: ImageOps.equalize(image)),
}


def rand_augmented(rng: np.random.Generator, image: Array) -> Array:
    found = _opened(image)
    for _ in range(RAND_OPS):
        found = _done(rng, found, RAND_STRENGTH, wide=False)
    return _closed(found, image)


def trivially_augmented(rng: np.random.Generator, image: Array) -> Array:
    return _closed(_done(rng, _opened(image), int(rng.integers(STRONGEST + 1)), wide=True), image)


def _done(rng: np.random.Generator, image: Image.Image, strength: int, wide: bool) -> Image.Image:
    """One op, drawn; the way it goes too."""
    op = list(OPS.values())[int(rng.integers(len(OPS)))]
    amount = op.amount(strength, wide, image.size)
    return op.do(image, -amount if op.signed and rng.random() < 0.5 else amount)


def _opened(image: Array) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))


def _closed(done: Image.Image, image: Array) -> Array:
    return np.asarray(done).reshape(image.shape)
