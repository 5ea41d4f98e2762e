"""The rehearsal of `coppice.candidates` on a PyTorch model: a copy is trained with each, on a part of the data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from coppice.candidates import Rehearsed, ranked
from coppice.data import Batches, ImageData, Loaders, sample_order
from coppice.loaders import sampler_of
from coppice.recipe import Recipe

JUDGED = 1024  # validation images, or as many as come in whole batches of a user's loader
Trained = Callable[[nn.Module, ImageData | Loaders, Recipe], float]
"""(model, data, recipe) -> the loss on data.val after training the model on data.train, which is one epoch."""


@dataclass(frozen=True)
class _Some:
    """The first ``count`` batches of a user's loader, which may be iterated again."""

    loader: Batches
    count: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(iter(self.loader), self.count)

    def __len__(self) -> int:
        return self.count

    @property
    def sampler(self) -> object:
        return sampler_of(self.loader)


def rehearse(model: nn.Module, data: ImageData | Loaders, recipe: Recipe, steps: int, seed: int, train: Trained) -> list[Rehearsed]:
    """``recipe`` with every candidate, trained for ``steps`` steps of the optimiser on a copy of ``model``; what to take first.

    Raises DivergedError if all do.
    """
    part = _part(data, recipe, steps, seed)
    return ranked(recipe, steps, lambda tried: train(copy.deepcopy(model), part, tried))


def _part(data: ImageData | Loaders, recipe: Recipe, steps: int, seed: int) -> ImageData | Loaders:
    if isinstance(data, Loaders):
        return replace(data, train=_Some(data.train, steps), val=_Some(data.val, 8))
    train = sample_order(len(data.train), steps * recipe.batch_size, seed, "rehearsal")
    judged = sample_order(len(data.val), JUDGED, seed, "rehearsal")
    return replace(data, train=data.train.subset(train), val=data.val.subset(judged))
