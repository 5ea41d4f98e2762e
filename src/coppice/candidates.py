"""Which optimiser: each trains the pruned network for a few steps of its own whole schedule; what is best on validation images is taken,
SGD's usual rate before others in a long run.

A rate that suits one network undoes another in its first steps, and which it is does not show in the structure. Every candidate sees the
same batches, warms up and falls to zero as the long run will: at a constant rate the gentlest would always look best so early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from coppice.errors import DivergedError
from coppice.recipe import Recipe

PART, LEAST, MOST = 0.04, 16, 40  # steps of a rehearsal: a share of the run's, within bounds
# What looks best so early is gentle, and is overtaken. So where the run is long, SGD's usual rate is taken if it is no further than this
# behind: a judgement, made on ResNet-20.
PATIENCE = 0.15


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
    """A recipe with its optimiser and rate, and the loss on validation that its rehearsal ended with; infinite where it diverged."""

    recipe: Recipe
    loss: float


def ranked(recipe: Recipe, steps: int, train: Callable[[Recipe], float]) -> list[Rehearsed]:
    """``recipe`` with every candidate; what to take first. ``train`` gives the loss on validation after ``steps`` steps by a recipe.

    Raises DivergedError if all do.
    """
    found: list[Rehearsed] = []
    failure: DivergedError | None = None
    for candidate in CANDIDATES:
        tried = candidate.of(recipe)
        try:
            loss = train(replace(tried, epochs=1, ema=0.0))
        except DivergedError as error:  # this rate is out of the question
            loss, failure = math.inf, error
        found.append(Rehearsed(tried, loss))
    if failure is not None and all(r.loss == math.inf for r in found):
        raise failure
    usual, *_ = found
    return sorted(found, key=lambda r: r.loss / (1 + PATIENCE) if r is usual and steps >= MOST else r.loss)


def rehearsal_steps(total: int) -> int:
    """How many steps are worth it before a run of ``total``."""
    return min(max(LEAST, round(PART * total)), MOST)
