"""A fine-tune's state between epochs in one file of plain arrays: weights, the optimiser's numbers, and what they belong to. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from coppice.errors import CoppiceError
from coppice.keras.apply import weights_in
from coppice.keras.walk import assign, numbers, variables_of
from coppice.run import replacing

_WEIGHT, _OPTIMIZER, _FACTS = "weight/", "optimizer/", "facts"


def save_checkpoint(path: Path, model: Any, optimizer: Any, facts: Mapping[str, Any]) -> None:
    """A crash at any moment leaves the old file or the new."""
    arrays = {_WEIGHT + name: array for name, array in weights_in(model).items()}
    arrays |= {f"{_OPTIMIZER}{k}": numbers(variable) for k, variable in enumerate(optimizer.variables)}
    arrays[_FACTS] = np.frombuffer(json.dumps(dict(facts)).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle


def load_checkpoint(path: Path, model: Any, optimizer: Any) -> dict[str, Any]:
    """Put the saved state into `model` and `optimizer`; answers the facts. CoppiceError if it is no checkpoint, or another model's."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        facts: dict[str, Any] = json.loads(arrays[_FACTS].tobytes())
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise CoppiceError(f"{path} is not a checkpoint of a fine-tune, or is truncated: delete it to start again") from error
    weights = {name.removeprefix(_WEIGHT): array for name, array in arrays.items() if name.startswith(_WEIGHT)}
    slots = [arrays.get(f"{_OPTIMIZER}{k}") for k in range(len(optimizer.variables))]
    wanted = {name: tuple(variable.shape) for name, variable in variables_of(model).items()}
    fits = {name: array.shape for name, array in weights.items()} == wanted and all(
        slot is not None and slot.shape == tuple(variable.shape) for slot, variable in zip(slots, optimizer.variables, strict=True)
    )
    if not fits:
        raise CoppiceError(f"{path} holds the state of another model: delete it to start again")
    assign(model, weights)
    for variable, slot in zip(optimizer.variables, slots, strict=True):
        variable.assign(slot)
    return facts
