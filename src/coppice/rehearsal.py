"""Which optimiser: each trains the pruned network for a few steps of its own whole schedule; what is best on validation images is taken,
SGD's usual rate before others in a long run.

A rate that suits one network undoes another in its first steps, and which it is does not show in the structure. Every candidate sees the
same batches, warms up and falls to zero as the long run will: at a constant rate the gentlest would always look best so early.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from coppice.data import Batches, ImageData, Loaders, sample_order
from coppice.errors import CoppiceError
from coppice.recipe import Recipe

PART, LEAST, MOST = 0.04, 16, 40  # steps of a rehearsal: a share of the run's, within bounds
# What looks best so early is gentle, and is overtaken: on ResNet-20 a fifth of SGD's rate is 1.5 points of validation top-1 ahead after 350
# steps and 0.4 behind after 1,050. So where the run is long, SGD's usual rate is taken if it is no further than this behind.
PATIENCE = 0.15
JUDGED = 1024  # validation images, or as many as come in whole batches of a user's loader
Trained = Callable[[nn.Module, ImageData | Loaders, Recipe], float]
"""(model, data, recipe) -> the loss on data.val after training the model on data.train, which is one epoch."""


@dataclass(frozen=True)
class Candidate:
    """An optimiser at its usual rate times ``rate``; ``freeze_norm``: BatchNorm keeps its statistics."""

    optimizer: str
    rate: float = 1.0
    freeze_norm: bool = False

    def of(self, recipe: Recipe) -> Recipe:
        chosen = replace(recipe, optimizer=self.optimizer, freeze_norm=recipe.freeze_norm or self.freeze_norm)
        return replace(chosen, lr=chosen.peak_lr() * self.rate)


CANDIDATES = (Candidate("sgd"), Candidate("sgd", 0.2), Candidate("adamw"), Candidate("adamw", freeze_norm=True))


@dataclass(frozen=True)
class Rehearsed:
    """A recipe with its optimiser and rate, and the loss on validation that its rehearsal ended with; infinite where it failed."""

    recipe: Recipe
    loss: float


@dataclass(frozen=True)
class _Some:
    """The first ``count`` batches of a user's loader, which may be iterated again."""

    loader: Batches
    count: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(iter(self.loader), self.count)

    def __len__(self) -> int:
        return self.count


def rehearse(model: nn.Module, data: ImageData | Loaders, recipe: Recipe, steps: int, seed: int, train: Trained) -> list[Rehearsed]:
    """``recipe`` with every candidate, trained for ``steps`` steps of the optimiser on a copy of ``model``; what to take first.

    Raises CoppiceError if all fail.
    """
    part = _part(data, recipe, steps, seed)
    found: list[Rehearsed] = []
    failure: CoppiceError | None = None
    for candidate in CANDIDATES:
        tried = candidate.of(recipe)
        try:
            loss = train(copy.deepcopy(model), part, replace(tried, epochs=1, ema=0.0))
        except CoppiceError as error:  # a loss that is not finite: this rate is out of the question
            loss, failure = math.inf, error
        found.append(Rehearsed(tried, loss))
    if failure is not None and all(r.loss == math.inf for r in found):
        raise failure
    usual, *_ = found
    return sorted(found, key=lambda r: r.loss / (1 + PATIENCE) if r is usual and steps >= MOST else r.loss)


def rehearsal_steps(total: int) -> int:
    """How many steps are worth it before a run of ``total``."""
    return min(max(LEAST, round(PART * total)), MOST)


def _part(data: ImageData | Loaders, recipe: Recipe, steps: int, seed: int) -> ImageData | Loaders:
    if isinstance(data, Loaders):
        return replace(data, train=_Some(data.train, steps), val=_Some(data.val, 8))
    train = sample_order(len(data.train), steps * recipe.batch_size, seed, "rehearsal")
    judged = sample_order(len(data.val), JUDGED, seed, "rehearsal")
    return replace(data, train=data.train.subset(train), val=data.val.subset(judged))
