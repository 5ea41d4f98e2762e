"""Whether the dense model's accuracy on validation is partly memory."""

import pytest

from coppice.evaluate import wilson_interval
from coppice.floor import has_seen_validation


def measured(right: int, n: int) -> dict[str, object]:
    return {"top1": 100 * right / n, "top1_ci95": wilson_interval(right, n)}


@pytest.mark.parametrize(
    ("val", "test", "seen"),
    [
        ((4769, 5000), (8838, 10000), True),  # ResNet-20 on CIFAR-10
        ((296, 300), (1480, 1500), False),  # as good on both
        ((97, 100), (940, 1000), False),  # too few images to tell
        ((800, 1000), (8838, 10000), False),  # worse on validation
    ],
)
def test_memory_is_told_from_chance(val: tuple[int, int], test: tuple[int, int], seen: bool) -> None:
    assert has_seen_validation(measured(*val), measured(*test)) is seen
