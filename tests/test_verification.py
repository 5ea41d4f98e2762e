"""What is said of errors, whatever their order."""

import math

from coppice.verification import largest_error


def test_nan_is_the_largest_error_wherever_it_stands() -> None:
    for errors in ([math.nan, 0.0, 1.0], [0.0, math.nan, 1.0], [0.0, 1.0, math.nan]):
        assert math.isnan(largest_error(iter(errors)))
    assert largest_error([1e-9, 3e-8, 2e-8]) == 3e-8
    assert largest_error([]) == 0.0
