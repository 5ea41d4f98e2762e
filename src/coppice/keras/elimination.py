"""`coppice.elimination` on Keras."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coppice import elimination
from coppice.coupling import Coupling
from coppice.keras.apply import build, weights_in
from coppice.keras.linear import Recorded
from coppice.keras.program import coupled_on
from coppice.linear import Array
from coppice.stepwise import of_one_shape


def removal_losses(
    model: Any, coupling: Coupling, batches: Iterable[Any], seed: int = 0, orders: Mapping[int, Sequence[int]] | None = None
) -> dict[int, Array]:
    """Axis id -> for each index the loss that its removal adds, along the axis's path. ``batches`` are model inputs.

    CoppiceError where there are no batches.
    """
    same, copied = of_one_shape(np.asarray(x) for x in batches), build(model, None, weights_in(model))
    here = coupled_on(model, coupling, same[0])
    draw = np.random.default_rng(seed).permutation
    return elimination.removal_losses(lambda some: Recorded(copied, some), here, coupling, same, draw, orders)
