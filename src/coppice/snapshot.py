"""A model on the way through a run, as the journal has it; of either framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coppice.errors import CoppiceError
from coppice.run import Json


@dataclass(frozen=True)
class Snapshot:
    """A model on the way: a plan against the dense model (None: the dense model itself), its stored weights, what it costs and reaches.

    `checks` and `max_error` are those of every cut that led here, `recovery` the last one's `coppice.mending.Recovery`. Of the fine-tuning
    that ended here, `training` is what each epoch gave (`coppice.train.EpochResult`) and `optimizer` what did it; `taken` is False where it
    made the model worse on validation, so that the weights before it are kept.
    """

    stage: str
    plan: str | None
    state: Mapping[str, str] | None
    cost: Mapping[str, float]
    val: Mapping[str, Any]
    epochs: int = 0
    checks: Sequence[str] = ()
    max_error: float = 0.0
    recovery: Mapping[str, Any] | None = None
    latency: Mapping[str, Any] | None = None
    training: Sequence[Mapping[str, Any]] = ()
    optimizer: str = ""
    taken: bool = True
    regularised: Mapping[str, Any] | None = None  # the kind, its strength, and how far it came
    masks: Mapping[str, Any] | None = None  # `coppice.masks.Sparsity`, and how the zeros were chosen

    @property
    def top1(self) -> float:
        """Percent, on the validation split."""
        return float(self.val["top1"])


def as_snapshot(found: Json) -> Snapshot:
    """A stage's result as the journal has it."""
    try:
        return Snapshot(**found)
    except TypeError as error:
        raise CoppiceError("the run's journal was written by another version of coppice, start the run again in another folder") from error
