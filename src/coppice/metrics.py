"""What is said of a classifier's accuracy, and how sure it is."""

import math
from dataclasses import dataclass

_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


@dataclass(frozen=True)
class Metrics:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and how sure the first is."""

    top1: float
    top5: float  # top-k with k = min(5, classes)
    loss: float
    n: int  # images
    per_class: tuple[float | None, ...]  # top-1 of each class's images, percent; None for a class without images
    top1_ci95: tuple[float, float]  # Wilson's 95 % interval, percent


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for `right` of `n`, in percent (Wilson 1927); unlike the normal one it holds near 0 and 100 %."""
    share, z2 = right / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)
