"""What is done to a model's weights beside the optimiser's own steps: masks that are held or grow, a regulariser that shrinks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Along(Protocol):
    """`tensors` is what it must remember to go on where it was stopped; they are written to in place."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def after_step(self, done: int, total: int) -> None:
        """After `done` of `total` steps of the optimiser; the gradients are still there."""

    def said(self) -> str:
        """How far it is, for the line that an epoch ends with; empty for nothing."""
