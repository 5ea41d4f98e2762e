"""The rehearsal of `coppice.candidates` on a Keras model: a copy is trained with each, on a part of the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from coppice.candidates import Rehearsed, ranked, rehearsal_steps
from coppice.keras.data import Images
from coppice.keras.evaluate import Part, evaluate
from coppice.keras.train import fine_tune, fitting, steps_per_epoch
from coppice.recipe import Recipe
from coppice.seeding import generator

JUDGED = 1024  # validation images, or as many as come in whole batches of a user's own


def choose(copied: Callable[[], Any], train: Part, val: Part, recipe: Recipe, *, mirror: bool, teacher: Any, seed: int) -> list[Rehearsed]:
    """`recipe` with each optimiser that is tried, the best first. ``copied`` gives a fresh copy of the model."""
    recipe = fitting(train, recipe)
    steps = rehearsal_steps(steps_per_epoch(train, recipe) * recipe.epochs)
    some, judged = _some(train, steps, steps * recipe.batch_size, seed), _some(val, 8, JUDGED, seed)

    def loss_with(tried: Recipe) -> float:
        model = copied()

        def judge() -> tuple[float, float]:
            found = evaluate(model, judged)
            return found.top1, found.loss

        return fine_tune(model, some, tried, mirror=mirror, judge=judge, teacher=teacher, seed=seed)[-1].val_loss

    return ranked(recipe, steps, loss_with)


def _some(part: Part, batches: int, images: int, seed: int) -> Part:
    if isinstance(part, Images):
        return part.subset(generator(seed, "rehearsal").permutation(len(part))[:images])
    return list(itertools.islice(part, batches))
