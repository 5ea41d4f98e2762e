"""The floor on accuracy: where a drop is decided on, where it is judged, and what can be wrong with the first.

The loop decides on validation images, cut from train, and compares both models there. If the dense model was itself trained on these
images, its accuracy there is partly memory (ResNet-20 on CIFAR-10: 95 %, against 88 % on images it has not seen), which a cut destroys
whatever the quality of what is left. The drop on validation then overstates the real one: the loop errs on the safe side, spends more
rounds than needed, and says so. The verdict of a finished run is about the test split, which no decision has looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def has_seen_validation(dense_val: Mapping[str, Any], dense_test: Mapping[str, Any]) -> bool:
    """Whether the dense model is better on validation than on test by more than both 95 % intervals allow."""
    return bool(dense_val["top1_ci95"][0] > dense_test["top1_ci95"][1])
