"""From a decoded image to a model's input: resize, centre crop, scale to [0, 1], normalise."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coppice.errors import CoppiceError

_LARGEST = 16384  # pixels a side: more is a slip of the hand, and would not fit in memory

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """Standard preprocessing, as torchvision's evaluation presets do it.

    size: the image is centre-cropped to size x size pixels; None keeps each image's own size.
    resize: its shorter side is first resized to this many pixels (bilinear, antialiased); default: `size`, unless it is of that size.
    mean, std: per channel, for pixels scaled to [0, 1]: x = (RGB / 255 - mean) / std; one number stands for all channels,
    none for 0 and 1.
    Raises CoppiceError if the numbers make no sense together.
    """

    size: int | None = None
    resize: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) and min(len(self.mean), len(self.std)) > 1:
            raise CoppiceError(f"mean has {len(self.mean)} numbers and std {len(self.std)}: give one for each channel")
        if not all(math.isfinite(value) for value in self.mean):
            raise CoppiceError(f"mean is {', '.join(map(str, self.mean))}: every number must be finite")
        if not all(0 < value < math.inf for value in self.std):
            raise CoppiceError(f"std is {', '.join(map(str, self.std))}: every number must be above zero and finite")
        for name, value in (("size", self.size), ("resize", self.resize)):
            if value is not None and not 1 <= value <= _LARGEST:
                raise CoppiceError(f"{name} is {value}: it must be 1 to {_LARGEST} pixels")
        if self.size is not None and self.resize is not None and self.resize < self.size:
            raise CoppiceError(f"resize {self.resize} is smaller than the crop of size {self.size}: make it at least that")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or TOML; what is None is left out."""
        values = {"size": self.size, "resize": self.resize, "mean": list(self.mean), "std": list(self.std)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `to_dict`. Raises CoppiceError for unknown names or values of the wrong type."""
        unknown = sorted(set(values) - {"size", "resize", "mean", "std"})
        if unknown:
            raise CoppiceError(f"preprocessing has no setting {unknown[0]!r}: use size, resize, mean, std")
        try:
            return cls(
                size=None if values.get("size") is None else int(values["size"]),
                resize=None if values.get("resize") is None else int(values["resize"]),
                mean=tuple(float(value) for value in values.get("mean", ())),
                std=tuple(float(value) for value in values.get("std", ())),
            )
        except (TypeError, ValueError) as error:
            raise CoppiceError(f"the preprocessing settings are malformed: {error}") from error

    def fit(self, image: "Image") -> "Image":
        """Resize and centre-crop a PIL image."""
        from PIL.Image import Resampling

        size = self.size if self.size is not None else self.resize
        if size is None or (self.resize is None and image.size == (size, size)):
            return image
        short, width, height = self.resize or size, *image.size
        whole = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        resized = image if whole == image.size else image.resize(whole, Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in whole)
        return resized.crop((left, top, left + size, top + size))

    def normalise(self, images: "Tensor") -> "Tensor":
        """uint8 NCHW in [0, 255] -> float32 NCHW. Raises CoppiceError if the number of channels is not that of `mean` and `std`."""
        import torch

        channels = images.shape[1]
        x = images.to(torch.float32).div_(255)
        for name, values, act in (("mean", self.mean, x.sub_), ("std", self.std, x.div_)):
            if len(values) not in (0, 1, channels):
                raise CoppiceError(f"{name} has {len(values)} numbers, the images have {channels} channel{'s' if channels > 1 else ''}")
            if values:
                act(torch.tensor(values, device=x.device).view(1, -1, 1, 1))
        return x
