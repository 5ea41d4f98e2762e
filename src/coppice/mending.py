"""Which of several repairs of a cut model is kept: the one whose outputs are nearest to the dense model's on held-out images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from coppice.linear import Array

TEMPERATURE = 3.0  # of the divergence: at 1 a model that is sure of its training images hides what it lost
AS_CUT, REESTIMATED, REFITTED = "as cut", "BatchNorm re-estimated", "layers refitted"
HALFWAY, BOTH = "layers refitted, BatchNorm halfway re-estimated", "layers refitted, BatchNorm re-estimated"
T = TypeVar("T")


@dataclass(frozen=True)
class Recovery:
    """What was tried (name, divergence from the dense outputs on held-out images; the first is the bare cut), and what was kept.

    `refused` says why layers could not be refitted.
    """

    tried: Sequence[tuple[str, float]]
    kept: str
    refitted: int = 0
    refused: str | None = None


def nearest(candidates: Mapping[str, T], distance: Callable[[T], float], refitted: int, refused: str | None) -> tuple[T, Recovery]:
    """The candidate of the least distance; one that is not finite is never the least."""
    tried = {name: distance(candidate) for name, candidate in candidates.items()}
    kept = least(tried)
    return candidates[kept], Recovery(tuple(tried.items()), kept, refitted, refused)


def least(distances: Mapping[str, float]) -> str:
    """Which distance is the least, not counting those that are not finite."""
    return min(distances, key=lambda name: distances[name] if math.isfinite(distances[name]) else math.inf)


def divergence(answers: Array, dense: Array, temperature: float = TEMPERATURE) -> float:
    """How far ``answers`` are from the dense ones: KL of softened class probabilities for rows of scores, else relative squared error.

    ``temperature``: 1 tells more on images that the dense model was not trained on.
    """
    if dense.ndim != 2 or dense.shape[1] < 2:
        return float(np.square(answers - dense).mean() / max(float(dense.var(ddof=1)), 1e-12))
    p, q = (_log_softmax(z.astype(np.float64) / temperature) for z in (dense, answers))
    return float((np.exp(p) * (p - q)).sum() / len(p) * temperature**2)


def _log_softmax(x: Array) -> Array:
    x = x - x.max(1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(1, keepdims=True)))
