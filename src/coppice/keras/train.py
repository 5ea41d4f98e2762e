"""Fine-tune a Keras model with `model.fit`: the user's loss, the dense model's predictions, a schedule, and an end when it is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from coppice.errors import CoppiceError
from coppice.keras.data import Augment, Images
from coppice.keras.evaluate import Part, batches_of
from coppice.keras.heads import activation_of, loss_of
from coppice.recipe import Recipe, augmentations
from coppice.seeding import derive_seed, generator

MOMENTUM = 0.9  # of BatchNormalization while fine-tuning: with Keras's usual 0.99 its statistics would lag behind for hundreds of steps
Told = Callable[[int, float], bool]  # (epoch from 1, its loss) -> whether to stop
UNSUPPORTED = {"features": 0.0, "ema": 0.0, "label_smoothing": 0.0}


def check_recipe(recipe: Recipe) -> None:
    """CoppiceError for what only PyTorch models are trained with."""
    for name, without in UNSUPPORTED.items():
        if getattr(recipe, name) != without:
            raise CoppiceError(f"--{name.replace('_', '-')} works on PyTorch models only: leave it out for a Keras model")
    if not set(augmentations(recipe.augment)) <= {"crop", "flip"}:
        raise CoppiceError(f"--augment {recipe.augment} works on PyTorch models only: give light, crop, flip or none")
    if recipe.precision == "bf16":
        raise CoppiceError("--precision bf16 works on PyTorch models only: give the Keras model a dtype policy of mixed_bfloat16")


class Pupil(keras.Model):  # type: ignore[misc]
    """A model in training: its own loss, weighed with how far it is from a teacher's softened predictions."""

    def __init__(self, student: Any, teacher: Any, recipe: Recipe) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self._recipe = recipe
        self._loss = loss_of(student)
        self._ends = activation_of(student)
        if teacher is not None:
            teacher.trainable = False

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.student(inputs, training=training)

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True) -> Any:
        hard = self._loss(y_pred, y)  # with the regularisation that the user's compiled loss brings along
        if not self.student.compiled and self.student.losses:
            hard = hard + sum(self.student.losses)
        if self.teacher is None:
            return hard
        wanted, have = (self._softened(out) for out in (self.teacher(x, training=False), y_pred))
        soft = ops.mean(ops.sum(ops.exp(wanted) * (wanted - have), axis=-1)) * self._recipe.temperature**2
        return (1 - self._recipe.distill) * hard + self._recipe.distill * soft

    def _softened(self, outputs: Any) -> Any:
        logits = ops.log(ops.maximum(outputs, 1e-7)) if self._ends == "softmax" else outputs
        return ops.log_softmax(logits / self._recipe.temperature, axis=-1)


class Epochs(keras.utils.PyDataset):  # type: ignore[misc]
    """Shuffled, augmented batches; what epoch ``epoch`` gives depends on the seed and its number alone."""

    def __init__(self, images: Images, recipe: Recipe, seed: int, mirror: bool) -> None:
        super().__init__()
        self.images, self.recipe, self.seed, self.mirror = images, recipe, seed, mirror
        self.epoch = 0

    def __len__(self) -> int:
        return max(1, len(self.images) // self.recipe.batch_size)  # whole batches: compiled once

    def __getitem__(self, step: int) -> Any:
        order = generator(self.seed, "order", self.epoch).permutation(len(self.images))
        some = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
        asked = augmentations(self.recipe.augment)
        augment = None
        if asked:
            augment = Augment(generator(self.seed, "augment", self.epoch, step), "crop" in asked, self.mirror and "flip" in asked)
        return next(batches_of(self.images, len(some), some, augment))

    def on_epoch_end(self) -> None:
        self.epoch += 1


class Listed(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches that lie in a list."""

    def __init__(self, batches: Sequence[Any]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Any:
        return self.batches[step]


class Schedule(keras.callbacks.Callback):  # type: ignore[misc]
    """The recipe's learning rate, step by step."""

    def __init__(self, recipe: Recipe, steps: int, progress: Callable[[int, int | None], None]) -> None:
        super().__init__()
        self.recipe, self.total, self.at, self.progress = recipe, steps * recipe.epochs, 0, progress

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = self.recipe.lr_at(self.at, max(self.total, self.at + 1))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.at += 1
        self.progress(self.at, self.total)


class Judge(keras.callbacks.Callback):  # type: ignore[misc]
    """Reports every epoch, and ends the training when that is enough."""

    def __init__(self, told: Told) -> None:
        super().__init__()
        self.told = told

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.told(epoch + 1, float((logs or {}).get("loss", float("nan")))):
            self.model.stop_training = True


def fine_tune(
    model: Any,
    part: Part,
    recipe: Recipe,
    *,
    mirror: bool,
    teacher: Any = None,
    seed: int = 0,
    told: Told = lambda epoch, loss: False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Train ``model`` in place for ``recipe.epochs``. ``told`` hears of every epoch, and may end it."""
    keras.utils.set_random_seed(derive_seed(seed, "fine-tuning") % 2**31)
    was = teacher.trainable if teacher is not None else True
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    momenta = [layer.momentum for layer in norms]
    pupil = Pupil(model, teacher, recipe)
    try:
        for layer in norms:
            layer.trainable, layer.momentum = not recipe.freeze_norm, min(layer.momentum, MOMENTUM)
        pupil.compile(optimizer=_optimizer(recipe), loss=None)
        if isinstance(part, Images):
            data: Any = Epochs(part, recipe, seed, mirror)
            steps = len(data)
        else:
            data = Listed(part) if isinstance(part, (list, tuple)) else part  # `fit` takes a list for several inputs
            steps = sum(1 for _ in part)
        callbacks = [Schedule(recipe, steps, progress), Judge(told), keras.callbacks.TerminateOnNaN()]
        pupil.fit(data, epochs=recipe.epochs, verbose=0, shuffle=False, callbacks=callbacks)
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.trainable, layer.momentum = True, momentum
        if teacher is not None:
            teacher.trainable = was
    if not all(np.isfinite(keras.ops.convert_to_numpy(w.value)).all() for w in model.weights if "float" in str(w.dtype)):
        raise CoppiceError("fine-tuning diverged: the weights are not finite; lower --lr")


def reestimate(model: Any, batches: Iterable[Any]) -> None:
    """Replace the statistics of every BatchNormalization by averages over these batches, each of the same weight, in place.

    Nothing else does what it does in training: dropout is off.
    """
    layers = model._flatten_layers()
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    rates = [(layer, layer.rate) for layer in layers if isinstance(getattr(layer, "rate", None), float)]
    momenta = [layer.momentum for layer in norms]
    try:
        for layer, _ in rates:
            layer.rate = 0.0
        for k, x in enumerate(batches if norms else ()):
            for layer in norms:
                layer.momentum = k / (k + 1)
            model(ops.convert_to_tensor(x), training=True)
    finally:
        for layer, rate in rates:
            layer.rate = rate
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum


def _optimizer(recipe: Recipe) -> Any:
    options: dict[str, Any] = {
        "learning_rate": recipe.peak_lr(),
        "weight_decay": recipe.weight_decay or None,
        "global_clipnorm": recipe.grad_clip,
    }
    if recipe.optimizer == "adamw":
        found = keras.optimizers.AdamW(**{**options, "weight_decay": recipe.weight_decay}, beta_1=recipe.momentum)
    else:
        found = keras.optimizers.SGD(**options, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    if recipe.weight_decay:
        found.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return found
