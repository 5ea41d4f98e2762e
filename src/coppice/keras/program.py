"""A Keras model's recording, run op by op (`coppice.stepwise`) on whatever backend Keras runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from coppice.coupling import Coupling, couple
from coppice.errors import CoppiceError
from coppice.graph import Op
from coppice.keras.capture import capture
from coppice.keras.scope import without_gradients
from coppice.keras.walk import variables_of
from coppice.stepwise import Stepwise

MEMORY = 2**30  # bytes of intermediate values that are held at a time, of each of two models


class Program(Stepwise):
    """``model`` recorded for inputs of the batches' shape, and run on them."""

    def __init__(self, model: Any, batches: Sequence[NDArray[Any]], memory: int = MEMORY) -> None:
        graph = capture(model, batches[0])
        if len(graph.inputs) != 1:
            raise CoppiceError(f"the model takes {len(graph.inputs)} inputs, repair and what looks at activations work with one")
        self.model = model
        variables = variables_of(model)
        self._variables = {value.id: variables[value.names[0]] for value in graph.weights()}
        self._constants = {k: keras.ops.convert_to_tensor(array) for k, array in graph.origin.constants.items()}
        super().__init__(graph.ops, graph.values, list(graph.outputs), graph.inputs[0], batches, memory)

    def _reads(self, op: Op) -> Iterable[int]:
        return (v for v in (*op.inputs, *op.others) if v is not None)

    def _results(self, op: Op, read: Callable[[int], Any]) -> Sequence[Any]:
        given = [None if v is None else keras.ops.convert_to_tensor(read(v)) for v in (*op.inputs, *op.others)]
        found = op.call(given, {})
        return found if isinstance(found, (tuple, list)) else (found,)

    def _fixed(self, value: int) -> Any:
        return self._variables[value].value if value in self._variables else self._constants.get(value)

    def _running(self) -> AbstractContextManager[Any]:
        return without_gradients()

    def array(self, value: int, batch: int) -> NDArray[Any]:
        """What ``value`` is now for one of the active batches."""
        return np.asarray(keras.ops.convert_to_numpy(self.value(value, batch)))


def coupled_on(model: Any, coupling: Coupling, batch: NDArray[Any]) -> Coupling:
    """``coupling`` as it is when ``model`` runs on ``batch``: its values are those of a :class:`Program`, its axes' names the same."""
    here = couple(capture(model, batch))
    if {a.name: a.width for a in here.prunable} != {a.name: a.width for a in coupling.prunable}:
        raise CoppiceError(f"on batches of {len(batch)} images the model has other axes than on the example; capture it with such a batch")
    return here
