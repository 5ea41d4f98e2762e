"""What goes along with `model.fit`: the recipe's learning rate, random numbers with an address, progress, and the judge of every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from coppice.recipe import Recipe
from coppice.seeding import derive_seed


class Along(keras.callbacks.Callback):  # type: ignore[misc]
    """What is done to a model's weights beside the optimiser's own steps; ``done`` counts those."""

    done = 0

    def joins(self, optimizer: Any) -> None:
        """Before any step, and before a checkpoint is read: what is to be remembered goes among the optimiser's variables."""

    def said(self) -> str:
        """How far it is, for the line that an epoch ends with."""
        return ""

    def in_sync(self) -> None:
        """JAX keeps the weights of a training under way elsewhere than in the variables, until it is told to."""
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()


class Rates(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """The recipe's learning rate of every step; a schedule, since what a callback sets is not seen by a step that JAX compiled."""

    def __init__(self, recipe: Recipe, steps: int) -> None:
        total = max(1, steps * recipe.epochs)
        self.rates = np.array([recipe.lr_at(step, total) for step in range(total)], np.float32)

    def __call__(self, step: Any) -> Any:
        return ops.take(ops.convert_to_tensor(self.rates), ops.minimum(ops.cast(step, "int32"), len(self.rates) - 1))

    def at(self, step: int) -> float:
        return float(self.rates[min(step, len(self.rates) - 1)])


class Epochwise(keras.callbacks.Callback):  # type: ignore[misc]
    """What an epoch draws depends on the seed and its number alone: the order of a data set that counts epochs, and dropout."""

    def __init__(self, model: Any, data: Any, seed: int) -> None:
        super().__init__()
        self.student, self.data, self.seed = model, data, seed

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if hasattr(self.data, "epoch"):
            self.data.epoch = epoch
        if keras.backend.backend() == "torch":  # whose dropout draws from PyTorch's own generator where its seed was left open
            import torch

            torch.manual_seed(derive_seed(self.seed, "dropout", epoch))
        for k, generator in enumerate(_generators(self.student)):
            words = np.array([derive_seed(self.seed, "dropout", epoch, k) % 2**31, 0], generator.state.dtype)
            generator.state.assign(words)


def _generators(model: Any) -> Iterator[Any]:
    for layer in model._flatten_layers():
        yield from layer._seed_generators


class Steps(keras.callbacks.Callback):  # type: ignore[misc]
    """Tells how many steps are done."""

    def __init__(self, done: int, total: int, progress: Callable[[int, int | None], None]) -> None:
        super().__init__()
        self.done, self.total, self.progress = done, total, progress

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.done += 1
        self.progress(self.done, self.total)


class Judge(keras.callbacks.Callback):  # type: ignore[misc]
    """Told of every epoch; ends the training when that is enough."""

    def __init__(self, told: Callable[[int, float], bool]) -> None:
        super().__init__()
        self.told = told

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.told(epoch + 1, float((logs or {}).get("loss", float("nan")))):
            self.model.stop_training = True
