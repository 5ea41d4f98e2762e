"""Augmentation for a short fine-tune: a shifted or mildly rescaled crop and a mirror image, per image.

A pruned network recovers in a few epochs; the strong crops of training from scratch (8 % to 100 % of the area) would cost more
than they give.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from coppice.errors import CoppiceError
from coppice.recipe import AUGMENTATIONS
from coppice.seeding import seeded

_SMALL = 96  # up to this many pixels a shift is the field's habit (CIFAR: 4 of 32); above, a rescaled crop


def make_augmentation(name: str, shape: tuple[int, int, int], *, pad: int | None = None, mirror: bool = True) -> Callable[[Tensor], Tensor]:
    """A per-image transform of uint8 CHW images of `shape`, drawing from PyTorch's global generator.

    `light` crops and mirrors, `crop` only crops, `none` returns the image. Small images are shifted by up to `pad` pixels
    (default: an eighth of the height); large ones are cropped to 70-100 % of their area, or shifted if `pad` is given.
    `mirror=False` is for data where a mirrored image is not of the same class (digits). Raises CoppiceError for an unknown name.
    """
    from torchvision.transforms import v2

    if name not in AUGMENTATIONS:
        raise CoppiceError(f"there is no augmentation {name!r}: choose one of {', '.join(AUGMENTATIONS)}")
    if name == "none":
        identity: Callable[[Tensor], Tensor] = v2.Identity()
        return identity
    height, width = shape[1:]
    steps: list[torch.nn.Module] = []
    if pad is not None or max(height, width) <= _SMALL:
        steps.append(v2.RandomCrop((height, width), padding=height // 8 if pad is None else pad))
    else:
        steps.append(v2.RandomResizedCrop((height, width), scale=(0.7, 1.0), ratio=(0.8, 1.25), antialias=True))
    if name == "light" and mirror:
        steps.append(v2.RandomHorizontalFlip())
    composed: Callable[[Tensor], Tensor] = v2.Compose(steps)
    return composed


def augment_batch(images: Tensor, transform: Callable[[Tensor], Tensor], seed: int, epoch: int, step: int) -> Tensor:
    """Apply `transform` to each of the uint8 NCHW `images`, each with its own draw, decided by (seed, epoch, step) alone."""
    with seeded(seed, "augment", epoch, step):
        return torch.stack([transform(image) for image in images])
