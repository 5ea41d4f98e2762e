"""Which part of a data set is for training, validation and test, and how a missing one is cut from train."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coppice.errors import CoppiceError
from coppice.sources import SPLIT_NAMES, WHOLE

TEST_FRACTION = 0.2  # of data that comes without a test part


def assign_roles(names: list[str], given: Mapping[str, str], spec: str) -> dict[str, str]:
    """Which part plays train, val and test."""
    for role, name in given.items():
        if role not in SPLIT_NAMES:
            raise CoppiceError(f"there is no split {role!r}: name train, val or test")
        if name not in names:
            raise CoppiceError(f"{spec} has no part {name!r} for {role}: its parts are {', '.join(names)}")
    roles = dict(given)
    for role, usual in SPLIT_NAMES.items():
        free = [name for name in names if name not in roles.values()]
        match = next((name for name in free if name.lower() in usual), None)
        if role not in roles and match is not None:
            roles[role] = match
    if "train" not in roles and WHOLE in names:
        roles["train"] = WHOLE
    if "train" not in roles:
        raise CoppiceError(f"{spec} has no training part: its parts are {', '.join(names)}")
    if "test" not in roles and "val" in roles and "val" not in given:
        roles["test"] = roles.pop("val")
    return roles


def cut_part(labels: NDArray[Any], fraction: float, random: np.random.Generator, spec: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Where the images lie that are left, and those of `fraction` of every class that are taken away, each in the original order."""
    taken = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken[random.permutation(members)[:count]] = True
    if not taken.any():
        raise CoppiceError(f"{spec} has one image a class: there is nothing to cut a validation or test part from")
    return np.flatnonzero(~taken), np.flatnonzero(taken)
