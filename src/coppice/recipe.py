"""How to fine-tune: the settings of `train.fine_tune`, checked when they are made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from coppice.errors import CoppiceError

AUTO = "auto"
OPTIMIZERS = (AUTO, "sgd", "adamw")
SCHEDULES = ("cosine", "onecycle")
PRESETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "light": ("crop", "flip"),
    "standard": ("crop", "flip", "colour", "erasing"),
    "strong": ("crop", "flip", "randaugment", "erasing", "mixup", "cutmix"),
}
AUGMENTATIONS = ("crop", "flip", "colour", "randaugment", "trivialaugment", "erasing", "mixup", "cutmix", "repeat2", "repeat3", "repeat4")
_BY_SIZE = ((10_000, "strong"), (100_000, "standard"))  # training images up to which an "auto" augmentation is that strong; above: light
PRECISIONS = ("fp32", "bf16")
_LR_AT_128 = {"sgd": 0.025, "adamw": 5e-4}  # for a trained network that is to recover, not for training from scratch
_WARMUP = {"cosine": 0.05, "onecycle": 0.3}


@dataclass(frozen=True)
class Recipe:
    """Settings of a fine-tune. Raises CoppiceError for a value out of its range."""

    epochs: int = 3
    optimizer: str = (
        AUTO  # "sgd" (Nesterov), "adamw", or "auto": what a rehearsal finds best (coppice.candidates); SGD where a rate is given
    )
    lr: float | None = None  # the highest learning rate; None: by optimiser, in proportion to the batch size
    momentum: float = 0.9  # of SGD; AdamW's first beta
    weight_decay: float = 5e-4  # not on biases and normalisation parameters
    batch_size: int = 128
    schedule: str = "cosine"  # linear warm-up, then half a cosine to zero; or "onecycle": up from and down to a fraction
    warmup: float | None = None  # share of all steps; None: 0.05 for cosine, 0.3 for onecycle
    label_smoothing: float = 0.0
    distill: float = 0.0  # weight of the dense model's predictions in the loss, 0 to 1
    temperature: float = 3.0  # softens both distributions for distillation
    features: float = 0.0  # weight of the squared distance from the dense model's features (coppice.distillation) in the loss
    ema: float = 0.0  # decay a step of an exponential average of the weights, which is what is evaluated and kept; 0: none
    precision: str = "auto"  # "fp32", "bf16" (autocast), or "auto": whichever is faster on this machine
    augment: str = "light"  # one of PRESETS, "auto" (the more, the fewer the images), or AUGMENTATIONS with + between them ("crop+mixup")
    crop_pad: int | None = None  # pixels of shift; None: an eighth of a small image, a rescaled crop of a large one
    grad_clip: float | None = None  # largest norm of the gradient
    freeze_norm: bool = False  # BatchNorm keeps its statistics and uses them: for small batches, and for what was just repaired

    def __post_init__(self) -> None:
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("precision", self.precision, ("auto", *PRECISIONS))
        augmentations(self.augment)
        _within("epochs", self.epochs, 0, math.inf)
        _within("batch_size", self.batch_size, 2, math.inf)
        _within("momentum", self.momentum, 0, 0.9999)
        _within("weight_decay", self.weight_decay, 0, 1)
        _within("label_smoothing", self.label_smoothing, 0, 0.9999)
        _within("distill", self.distill, 0, 1)
        _within("temperature", self.temperature, 0.01, 1000)
        _within("features", self.features, 0, 1e6)
        _within("ema", self.ema, 0, 0.99999)
        for name, value, high in (("lr", self.lr, 1e3), ("warmup", self.warmup, 0.9999), ("grad_clip", self.grad_clip, math.inf)):
            if value is not None:
                _within(name, value, 0, high)
        if self.crop_pad is not None:
            _within("crop_pad", self.crop_pad, 0, math.inf)

    @property
    def taught(self) -> bool:
        """Whether the loss needs the dense model."""
        return self.distill > 0 or self.features > 0

    @property
    def open(self) -> bool:
        """Whether the optimiser is still to be chosen."""
        return self.optimizer == AUTO and self.lr is None

    def peak_lr(self) -> float:
        """The highest learning rate of the schedule. Raises CoppiceError while the optimiser is still to be chosen."""
        if self.open:
            raise CoppiceError("the learning rate goes with the optimiser, which a rehearsal has yet to choose")
        return _LR_AT_128[self.optimizer] * self.batch_size / 128 if self.lr is None else self.lr

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of `step` (from 0) of `total`: a function of the step alone, so that there is no schedule to restore."""
        warmup = _WARMUP[self.schedule] if self.warmup is None else self.warmup
        rising = round(warmup * total)
        # Both ends of one-cycle as in Smith and Topin, "Super-Convergence" (2019), with PyTorch's factors.
        start, end = (1 / 25, 1 / 25e4) if self.schedule == "onecycle" else (0.0, 0.0)
        if step < rising:
            share = (step + 1) / (rising + 1)
            return self.peak_lr() * (start + (1 - start) * share)
        fallen = (step - rising) / max(1, total - rising)
        return self.peak_lr() * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * fallen)))


def augmentations(text: str, images: int = 0) -> tuple[str, ...]:
    """The steps of an augmentation, by its preset, by the number of training images ("auto"), or by themselves. Raises CoppiceError."""
    if text == "auto":
        text = next((name for most, name in _BY_SIZE if images <= most), "light")
    found = PRESETS.get(text, tuple(text.split("+")))
    if unknown := [step for step in found if step not in AUGMENTATIONS]:
        known = f"{', '.join(PRESETS)}, auto, or some of {', '.join(AUGMENTATIONS)} with + between them"
        raise CoppiceError(f"there is no augment {unknown[0]!r}: choose {known}")
    if sum(step.startswith("repeat") for step in found) > 1:
        raise CoppiceError(f"augment {text} repeats in two ways: choose one")
    return found


def repeats(text: str) -> int:
    """How often an image is in a batch, each time augmented otherwise. Hoffer et al., Augment Your Batch, CVPR 2020."""
    return next((int(step.removeprefix("repeat")) for step in augmentations(text) if step.startswith("repeat")), 1)


def described(recipe: Recipe) -> str:
    """The optimiser in words."""
    name = "AdamW" if recipe.optimizer == "adamw" else "SGD"
    return f"{name} at {recipe.peak_lr():.3g}" + (", BatchNorm's statistics kept" if recipe.freeze_norm else "")


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise CoppiceError(f"there is no {name} {value!r}: choose one of {', '.join(allowed)}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise CoppiceError(f"{name} is {value}: it must be {f'at least {low}' if high == math.inf else f'between {low} and {high}'}")
