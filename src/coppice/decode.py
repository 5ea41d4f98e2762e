"""Encoded bytes or an array of pixels -> uint8 CHW, resized and cropped as the preprocessing asks."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coppice.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

GREY_MODES = ("1", "L")  # of PIL


def open_image(content: bytes | np.ndarray) -> Image:
    """A PIL image, of which only the header has been read. Raises OSError or ValueError if it is none."""
    from PIL import Image

    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    try:
        return Image.open(io.BytesIO(content))
    # What some of PIL's formats raise for a broken header; a "bomb"; ultralytics puts an `open` in PIL that asks for one more package.
    except (SyntaxError, Image.DecompressionBombError, ImportError) as error:
        raise OSError(str(error)) from error


def decode(image: Image, preprocess: Preprocess, *, grey: bool = False) -> Tensor:
    """uint8 CHW of three channels, or of one if `grey`. Raises OSError or ValueError if the image is broken."""
    import torch

    return torch.from_numpy(pixels_of(image, preprocess, grey=grey)).permute(2, 0, 1)


def pixels_of(image: Image, preprocess: Preprocess, *, grey: bool = False) -> NDArray[Any]:
    """The same as an array, uint8 HWC."""
    try:
        fitted = np.array(preprocess.fit(image.convert("L" if grey else "RGB")))
    except (SyntaxError, EOFError) as error:
        raise OSError(str(error)) from error
    return fitted[:, :, None] if grey else fitted
