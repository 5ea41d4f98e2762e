"""Fine-tune a Keras model with `model.fit`: the user's loss, the dense model's predictions, a schedule, and an end when it is enough."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from coppice.errors import CoppiceError, DivergedError
from coppice.keras.augment import make_augmentation, make_mix
from coppice.keras.averaging import averaged, take_average
from coppice.keras.callbacks import Along, Epochwise, Judge, Rates, Steps
from coppice.keras.checkpoint import load_checkpoint, save_checkpoint
from coppice.keras.data import Images
from coppice.keras.evaluate import BATCH, Part, batches_of, sample
from coppice.keras.heads import activation_of, loss_of
from coppice.recipe import Recipe, augmentations, repeats
from coppice.seeding import generator

MOMENTUM = 0.9  # of BatchNormalization while fine-tuning: with Keras's usual 0.99 its statistics would lag behind for hundreds of steps
Judgement = Callable[[], tuple[float, float]]  # top-1 and loss of the model as it is now
_STATISTICS = 512  # images that BatchNormalization is re-estimated on for an average of the weights


def check_recipe(recipe: Recipe) -> None:
    """CoppiceError for what only PyTorch models are trained with."""
    if recipe.features:
        raise CoppiceError("--features works on PyTorch models only: leave it out for a Keras model")
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
        if recipe.label_smoothing and (self._ends not in ("softmax", "linear") or student.output_shape[-1] == 1):
            raise CoppiceError("--label-smoothing is for models that end with a softmax or with logits of classes: leave it out")

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.student(inputs, training=training)

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True) -> Any:
        hard = self._mixed(y_pred, y) if isinstance(y, (tuple, list)) else self._loss(y_pred, y)  # with a compiled loss's regularisation
        if self._recipe.label_smoothing:
            hard = (1 - self._recipe.label_smoothing) * hard + self._recipe.label_smoothing * self._to_uniform(y_pred)
        if not self.student.compiled and self.student.losses:
            hard = hard + sum(self.student.losses)
        if self.teacher is None:
            return hard
        wanted, have = (self._softened(out) for out in (self.teacher(x, training=False), y_pred))
        soft = ops.mean(ops.sum(ops.exp(wanted) * (wanted - have), axis=-1)) * self._recipe.temperature**2
        return (1 - self._recipe.distill) * hard + self._recipe.distill * soft

    def _mixed(self, y_pred: Any, y: Any) -> Any:
        """The loss of labels that are shares of two: it is linear in them, whatever form they have."""
        one, other, share = y
        return share[0] * self._loss(y_pred, one) + (1 - share[0]) * self._loss(y_pred, other)

    def _softened(self, outputs: Any) -> Any:
        return ops.log_softmax(self._logits(outputs) / self._recipe.temperature, axis=-1)

    def _to_uniform(self, outputs: Any) -> Any:
        """Cross-entropy of a target that is spread over all classes alike: what smoothed labels have in it."""
        return -ops.mean(ops.log_softmax(self._logits(outputs), axis=-1))

    def _logits(self, outputs: Any) -> Any:
        return ops.log(ops.maximum(outputs, 1e-7)) if self._ends == "softmax" else outputs


class Epochs(keras.utils.PyDataset):  # type: ignore[misc]
    """Shuffled, augmented batches; what epoch ``epoch`` (from 0) gives depends on the seed and its number alone."""

    def __init__(self, images: Images, recipe: Recipe, seed: int, mirror: bool, epoch: int = 0) -> None:
        super().__init__()
        self.images, self.recipe, self.seed, self.epoch = images, recipe, seed, epoch
        self.augment = make_augmentation(recipe.augment, images.shape, pad=recipe.crop_pad, mirror=mirror)
        self.mix = make_mix(recipe.augment)

    def __len__(self) -> int:
        return steps_per_epoch(self.images, self.recipe)

    def __getitem__(self, step: int) -> Any:
        order = np.repeat(_order(self.seed, self.epoch, len(self.images)), repeats(self.recipe.augment))
        some = order[step * self.recipe.batch_size : (step + 1) * self.recipe.batch_size]
        draw = generator(self.seed, "augment", self.epoch, step)
        x, y = next(batches_of(self.images, len(some), some, None if self.augment is None else partial(self.augment, draw)))
        if self.mix is None:
            return x, y
        mixed, share = self.mix(generator(self.seed, "mix", self.epoch, step), x)
        return mixed, (y, np.roll(y, 1, axis=0), np.full(len(y), share, np.float32))


@lru_cache(maxsize=1)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return generator(seed, "order", epoch).permutation(count)


class Listed(keras.utils.PyDataset):  # type: ignore[misc]
    """Batches that lie in a list."""

    def __init__(self, batches: Sequence[Any]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Any:
        return self.batches[step]


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave."""

    epoch: int  # from 1
    train_loss: float
    val_top1: float  # percent
    val_loss: float
    lr: float  # of its last step
    seconds: float


def steps_per_epoch(part: Part, recipe: Recipe) -> int:
    """Of an image set whole batches, which are compiled once."""
    return max(1, len(part) // recipe.batch_size) if isinstance(part, Images) else sum(1 for _ in part)


def fitting(part: Part, recipe: Recipe) -> Recipe:
    """The recipe with a batch no larger than the data and the augmentation that suits its size; a user's own batches are as they are."""
    if not isinstance(part, Images):
        return recipe
    steps = "+".join(augmentations(recipe.augment, len(part))) or "none"
    return replace(recipe, batch_size=max(2, min(recipe.batch_size, len(part))), augment=steps)


def fine_tune(
    model: Any,
    part: Part,
    recipe: Recipe,
    *,
    mirror: bool,
    judge: Judgement,
    teacher: Any = None,
    seed: int = 0,
    along: Along | None = None,
    span: tuple[int, int] | None = None,
    begun: Callable[[Any], None] = lambda optimizer: None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    enough: Callable[[Epoch], bool] = lambda epoch: False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> list[Epoch]:
    """Train ``model`` in place for ``recipe.epochs``, judging each (top-1 and loss on validation images); an ``enough`` one is the last.

    ``span``: only the epochs after the first number and up to the second; ``begun`` is called with the optimiser before any step, to give
    it the state that it had in those before. ``checkpoint``: written after every epoch (before ``on_epoch``); if it exists, the epochs
    that it holds are not repeated. ``along`` was made for ``model`` as it is now. CoppiceError if the training diverges, or the checkpoint
    is of another run.
    """
    recipe = fitting(part, recipe)
    steps = steps_per_epoch(part, recipe)
    with _in_training(model, teacher, recipe):
        pupil = Pupil(model, teacher, recipe)
        rates = Rates(recipe, steps)
        pupil.compile(optimizer=_optimizer(recipe, rates), loss=None)
        pupil.optimizer.build(pupil.trainable_variables)
        begun(pupil.optimizer)
        if along is not None:
            along.joins(pupil.optimizer)
        first, last = span or (0, recipe.epochs)
        belongs = {"recipe": asdict(recipe), "seed": seed, "steps": steps, "span": [first, last]}
        history = [] if checkpoint is None else _resumed(checkpoint, model, pupil.optimizer, belongs)
        over = first + len(history)
        done = over * steps
        if along is not None:
            along.done = done
        began = time.perf_counter()

        def statistics() -> None:
            if not recipe.freeze_norm:
                reestimate(model, (x for x, _ in sample(part, _STATISTICS, seed, BATCH)))

        def told(epoch: int, loss: float) -> bool:
            nonlocal began
            with averaged(model, pupil, statistics) if recipe.ema else nullcontext():
                top1, val_loss = judge()
            now = time.perf_counter()
            history.append(Epoch(epoch, loss, top1, val_loss, rates.at(epoch * steps - 1), now - began))
            began = now
            if checkpoint is not None:
                save_checkpoint(checkpoint, model, pupil.optimizer, belongs | {"history": [asdict(entry) for entry in history]})
            on_epoch(history[-1])
            return enough(history[-1])

        data = _data(part, recipe, seed, mirror, over)
        callbacks: list[Any] = [
            Epochwise(model, data, seed),
            Steps(done, steps * recipe.epochs, progress),
            keras.callbacks.TerminateOnNaN(),
        ]
        if along is not None:
            callbacks.append(along)
        if over < last and not (history and enough(history[-1])):
            epochs = {"initial_epoch": over, "epochs": last}
            pupil.fit(data, verbose=0, shuffle=False, callbacks=[*callbacks, Judge(told)], **epochs)
        if recipe.ema:
            take_average(pupil, statistics)
    if not all(np.isfinite(ops.convert_to_numpy(w.value)).all() for w in model.weights if "float" in str(w.dtype)):
        raise DivergedError("fine-tuning diverged: the weights are not finite; lower --lr")
    return history


def _data(part: Part, recipe: Recipe, seed: int, mirror: bool, epoch: int) -> Any:
    if isinstance(part, Images):
        return Epochs(part, recipe, seed, mirror, epoch)
    return Listed(part) if isinstance(part, (list, tuple)) else part  # `fit` takes a list for several inputs


@contextmanager
def _in_training(model: Any, teacher: Any, recipe: Recipe) -> Iterator[None]:
    """The teacher keeps its weights, BatchNormalization its statistics if it is to, or follows them faster."""
    taught = teacher.trainable if teacher is not None else True
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
    momenta = [layer.momentum for layer in norms]
    try:
        if teacher is not None:
            teacher.trainable = False
        for layer in norms:
            layer.trainable, layer.momentum = not recipe.freeze_norm, min(layer.momentum, MOMENTUM)
        yield
    finally:
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.trainable, layer.momentum = True, momentum
        if teacher is not None:
            teacher.trainable = taught


def _resumed(checkpoint: Path, model: Any, optimizer: Any, belongs: Mapping[str, Any]) -> list[Epoch]:
    if not checkpoint.exists():
        return []
    facts = load_checkpoint(checkpoint, model, optimizer)
    if {name: facts.get(name) for name in belongs} != json.loads(json.dumps(belongs)):
        raise CoppiceError(f"{checkpoint} was written with another recipe, seed or data: delete it to start again")
    return [Epoch(**entry) for entry in facts["history"]]


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


def _optimizer(recipe: Recipe, rates: Any) -> Any:
    options: dict[str, Any] = {
        "learning_rate": rates,
        "weight_decay": recipe.weight_decay or None,
        "global_clipnorm": recipe.grad_clip,
        "use_ema": recipe.ema > 0,
        "ema_momentum": recipe.ema,
    }
    if recipe.optimizer == "adamw":
        found = keras.optimizers.AdamW(**{**options, "weight_decay": recipe.weight_decay}, beta_1=recipe.momentum)
    else:
        found = keras.optimizers.SGD(**options, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
    if recipe.weight_decay:
        found.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return found
