"""After a cut of a Keras model, before any training: what brings accuracy back in seconds, without labels. As `coppice.recovery` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.keras.apply import weights_in
from coppice.keras.evaluate import answers, log_probabilities
from coppice.keras.heads import activation_of
from coppice.keras.repair import repair
from coppice.keras.walk import assign, layers_of, weights_of
from coppice.linear import Array
from coppice.mending import AS_CUT, BOTH, HALFWAY, REESTIMATED, REFITTED, Recovery, divergence, nearest
from coppice.planning import Plan
from coppice.stepwise import is_held_out

Weights = Mapping[str, Array]


def recover(
    dense: Any,
    pruned: Any,
    coupling: Coupling,
    plan: Plan,
    batches: Sequence[Array],
    reestimate: Callable[[Any], None],
    *,
    refit: bool = True,
    seed: int = 0,
) -> Recovery:
    """Give ``pruned`` the best of its own weights and what can be made of them.

    ``plan`` made ``pruned`` from ``dense``, whose coupling is given; ``batches`` are model inputs; ``reestimate`` re-estimates
    BatchNormalization in place.
    """
    statistics = _statistics(pruned)
    candidates: dict[str, Weights] = {AS_CUT: weights_in(pruned)}

    def reestimated() -> Weights:
        reestimate(pruned)
        return weights_in(pruned)

    if statistics:
        candidates[REESTIMATED] = reestimated()
    refitted, refused = 0, None
    if refit:
        assign(pruned, candidates[AS_CUT])
        try:
            refitted = sum(r.after < r.before for r in repair(dense, pruned, coupling, plan, batches, seed))
        except CoppiceError as error:
            refused = str(error)
        else:
            mended = candidates[REFITTED] = weights_in(pruned)
            if statistics:
                both = reestimated()
                candidates[HALFWAY] = {name: (x + both[name]) / 2 if name in statistics else x for name, x in mended.items()}
                candidates[BOTH] = both
    judge = [batch for k, batch in enumerate(batches) if is_held_out(k)] or batches
    goal = scores_of(dense, judge)

    def distance(weights: Weights) -> float:
        assign(pruned, weights)
        return divergence(scores_of(pruned, judge), goal)

    best, found = nearest(candidates, distance, refitted, refused)
    assign(pruned, best)
    return found


def scores_of(model: Any, batches: Sequence[Array]) -> Array:
    """The logarithms of the class probabilities that the model gives."""
    ends = activation_of(model)
    return np.concatenate([log_probabilities(answers(model, x), ends) for x in batches])


def _statistics(model: Any) -> set[str]:
    """The names of the moving averages of every BatchNormalization."""
    found = set()
    for path, layer in layers_of(model):
        if isinstance(layer, keras.layers.BatchNormalization):
            own = {id(layer.moving_mean), id(layer.moving_variance)}
            found |= {name for name, variable in weights_of(path, layer).items() if id(variable) in own}
    return found
