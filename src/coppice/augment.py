"""Augmentation by torchvision.transforms.v2: of single images, and of batches (MixUp, CutMix).

A pruned network recovers in a few epochs; the strong crops of training from scratch (8 % to 100 % of the area) would cost more
than they give, so crops are mild in every preset.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coppice.recipe import augmentations
from coppice.seeding import seeded

_SMALL = 96  # up to this many pixels a shift is the field's habit (CIFAR: 4 of 32); above, a rescaled crop
_ERASED = 0.25  # of the images lose a rectangle
_JITTER = 0.2  # of brightness, contrast and saturation
_ALPHA = {"mixup": 0.2, "cutmix": 1.0}  # as in the papers: Zhang et al., ICLR 2018; Yun et al., ICCV 2019

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_augmentation(name: str, shape: tuple[int, int, int], *, pad: int | None = None, mirror: bool = True) -> Callable[[Tensor], Tensor]:
    """A per-image transform of uint8 CHW images of `shape`, drawing from PyTorch's global generator.

    `name`: what `coppice.recipe.augmentations` reads; its steps of whole batches are left out. Small images are shifted by up to `pad`
    pixels (default: an eighth of the height); large ones are cropped to 70-100 % of their area, or shifted if `pad` is given.
    `mirror=False` is for data where a mirrored image is not of the same class (digits). Raises CoppiceError for an unknown name.
    """
    from torchvision.transforms import v2

    height, width = shape[1:]
    if pad is not None or max(height, width) <= _SMALL:
        crop: torch.nn.Module = v2.RandomCrop((height, width), padding=height // 8 if pad is None else pad)
    else:
        crop = v2.RandomResizedCrop((height, width), scale=(0.7, 1.0), ratio=(0.8, 1.25), antialias=True)
    known: dict[str, Callable[[], torch.nn.Module]] = {
        "crop": lambda: crop,
        "flip": v2.RandomHorizontalFlip,
        "colour": lambda: v2.ColorJitter(_JITTER, _JITTER, _JITTER),
        "randaugment": v2.RandAugment,
        "trivialaugment": v2.TrivialAugmentWide,
        "erasing": lambda: v2.RandomErasing(_ERASED),
    }
    steps = [known[step]() for step in augmentations(name) if step in known and (mirror or step != "flip")]
    composed: Callable[[Tensor], Tensor] = v2.Compose(steps) if steps else v2.Identity()
    return composed


def make_mix(name: str, classes: int) -> Mix | None:
    """A transform of batches (inputs, labels) that mixes images and their labels, which become shares of classes; None: there is none.

    With MixUp and CutMix every batch takes one of them by chance.
    """
    from torchvision.transforms import v2

    makers = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
    chosen = [makers[step](alpha=_ALPHA[step], num_classes=classes) for step in augmentations(name) if step in makers]
    if not chosen:
        return None
    mix: Mix = chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
    return mix


def augment_batch(
    images: Tensor, transform: Callable[[Tensor], Tensor], seed: int, epoch: int, step: int, rows: Sequence[int] | None = None, of: int = 0
) -> Tensor:
    """Apply `transform` to each of the uint8 NCHW `images`, each with its own draw, decided by (seed, epoch, step) alone.

    `rows`: the images are these of a batch `of` so many, and the draws of the others are passed over.
    """
    with seeded(seed, "augment", epoch, step):
        if rows is None:
            return torch.stack([transform(image) for image in images])
        at, found = {row: k for k, row in enumerate(rows)}, torch.empty_like(images)
        for row in range(of):
            if row in at:
                found[at[row]] = transform(images[at[row]])
            else:
                _pass_over(transform, images[0])
        return found


def _pass_over(transform: Callable[[Tensor], Tensor], image: Tensor) -> None:
    """Draw what `transform` would draw for an image of this shape, without the work where that is possible."""
    from torchvision.transforms import v2

    for step in transform.transforms if isinstance(transform, v2.Compose) else ():
        if isinstance(step, v2.RandomCrop | v2.RandomResizedCrop | v2.ColorJitter):
            step.make_params([image])
        elif isinstance(step, v2.RandomHorizontalFlip | v2.RandomErasing):
            if torch.rand(1) < step.p:
                step.make_params([image])
        else:  # it draws while it works
            step(image)
