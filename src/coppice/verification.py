"""What a verification says, whichever front-end made it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Verification:
    """``max_error`` is relative to the largest output; ``checked`` says what was compared, in words; ``detour`` is the first op at which
    the code took another way than at the dense widths.
    """

    max_error: float
    checked: tuple[str, ...]
    seconds: float
    detour: str | None = None


def largest_error(errors: Iterable[float]) -> float:
    """The largest of some errors, 0 of none, and NaN where there is one: Python's own max would pass over it."""
    return float(np.max([0.0, *errors]))
