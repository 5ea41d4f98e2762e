"""What a verification says, whichever front-end made it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verification:
    """``max_error`` is relative to the largest output; ``checked`` says what was compared, in words; ``detour`` is the first op at which
    the code took another way than at the dense widths.
    """

    max_error: float
    checked: tuple[str, ...]
    seconds: float
    detour: str | None = None
