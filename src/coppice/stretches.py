"""A training in stretches with a cut between each two: when the cuts come, to which budgets, and what is found in the end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coppice.cost import Cost
from coppice.errors import CoppiceError
from coppice.planning import Plan
from coppice.targets import Target, parse_target


@dataclass(frozen=True)
class Trained:
    """The smaller model, the plan against the model that the training began with, every epoch with its seconds, and what was verified."""

    model: Any
    plan: Plan
    history: tuple[Any, ...]
    checks: tuple[str, ...]
    max_error: float


@dataclass(frozen=True)
class Stretch:
    """Epochs after ``start`` and up to ``end``, and what the model is cut to then (None: the training is over)."""

    start: int
    end: int
    budgets: Mapping[str, float] | None


def stretches(target: str | Mapping[str, str | float] | Target, at: Sequence[float], epochs: int, dense: Cost) -> list[Stretch]:
    """Cuts after the shares ``at`` of the epochs, in equal steps to the target. CoppiceError for a target or shares that can't be."""
    wanted = parse_target(target)
    if not wanted or wanted.setting is not None:
        raise CoppiceError("a cut in the midst of a training needs a target of MACs, parameters or bytes, such as macs=0.5")
    ends, budgets = cut_epochs(at, epochs), wanted.resolve(dense)
    found = []
    for k, (start, end) in enumerate(itertools.pairwise([0, *ends, epochs]), 1):
        steps = {key: getattr(dense, key) * (budget / getattr(dense, key)) ** (k / len(ends)) for key, budget in budgets.items()}
        found.append(Stretch(start, end, steps if end < epochs else None))
    return found


def cut_epochs(at: Sequence[float], epochs: int) -> list[int]:
    """After which epochs the cuts come. Raises CoppiceError unless there is an epoch before and after each."""
    ends = [round(share * epochs) for share in at]
    if not ends or sorted(set(ends)) != ends or ends[0] < 1 or ends[-1] >= epochs:
        raise CoppiceError(
            f"cuts after {', '.join(map(str, ends)) or 'none'} of {epochs} epochs: there must be an epoch before and after each"
        )
    return ends
