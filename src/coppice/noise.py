"""What can be said of timings that vary: intervals by the bootstrap over rounds, and no more digits than the noise allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLED = 2000
Interval = tuple[float, float]


def bootstrap(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The interval of the median of ``values`` (one a round), by resampling rounds."""
    rounds = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(rounds), (RESAMPLED, len(rounds)))
    medians: NDArray[np.float64] = np.median(rounds[picks], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, (tail, 100 - tail))
    return float(low), float(high)


def speedup(before: Sequence[float], after: Sequence[float]) -> tuple[float, Interval]:
    """How many times faster ``after`` is, from times of the same rounds, with the interval: what hit a whole round hit both of them."""
    ratios = np.log(np.asarray(before, dtype=np.float64) / np.asarray(after, dtype=np.float64))
    low, high = bootstrap(ratios.tolist())
    return float(np.exp(np.median(ratios))), (float(np.exp(low)), float(np.exp(high)))
