"""An average of the weights while a Keras model trains: Keras's optimiser keeps it, it is what is judged, and taken in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from coppice.keras.apply import weights_in
from coppice.keras.walk import assign


def take_average(trainer: Any, reestimate: Callable[[], None]) -> None:
    """Put the averages in the place of the weights, as their constraints want them: Keras averages what is there before those are applied.

    ``trainer``: the model that is compiled and fitted. ``reestimate``: gives BatchNormalization the statistics of the averaged weights.
    """
    trainer.optimizer.finalize_variable_values(trainer.trainable_variables)
    for variable in trainer.trainable_variables:
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))
    reestimate()


@contextmanager
def averaged(model: Any, trainer: Any, reestimate: Callable[[], None]) -> Iterator[None]:
    """The averages are ``model``'s weights for a while."""
    live = weights_in(model)
    try:
        take_average(trainer, reestimate)
        yield
    finally:
        assign(model, live)
