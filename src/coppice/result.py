"""What a run ended with, whichever framework the model is of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from coppice.planning import Plan
from coppice.run import Json

Model = TypeVar("Model")


@dataclass(frozen=True)
class Result(Generic[Model]):
    """What a run ended with. `metrics` as in metrics.json; `path` is None if no folder was asked for."""

    model: Model
    plan: Plan
    metrics: Json
    path: Path | None

    @property
    def met(self) -> bool:
        """Whether the target and the floor hold."""
        return bool(self.metrics["met"])

    @property
    def statement(self) -> str:
        """One sentence: what holds, what does not, and by how much."""
        return str(self.metrics["statement"])
