"""Shapes that are worked out at once, beside those of the real kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coppice.torch.quick_shapes import quick_shapes

X, W, BIAS = torch.randn(2, 6, 9, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "compared": lambda x: x > 0.5,
    "of whole numbers": lambda x: torch.sqrt(x.to(torch.int64).abs()),
    "power": lambda x: x**2,
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6)),
    "batch_norm of a batch": lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6), training=True),
    "grouped": lambda x: F.conv2d(x, W, BIAS, stride=2, padding=1, groups=2),
    "dilated": lambda x: F.conv2d(x, W, None, stride=(1, 2), padding=(2, 0), dilation=(2, 3), groups=2),
    "one dim": lambda x: F.conv1d(x.flatten(2), torch.randn(5, 6, 4), padding=3),
    "three dims": lambda x: F.conv3d(x[:, :, None], torch.randn(5, 6, 1, 3, 3)),
    "transposed": lambda x: F.conv_transpose2d(x, torch.randn(6, 2, 3, 3), stride=2),
    "channels last": lambda x: F.relu(x.contiguous(memory_format=torch.channels_last)),
    "broadcast": lambda x: x + torch.randn(6, 1, 1),
}
ANSWERED = {
    "relu",
    "hardswish",
    "gelu",
    "compared",
    "of whole numbers",
    "power",
    "batch_norm",
    "grouped",
    "dilated",
    "one dim",
    "three dims",
}


class Comparing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answered = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        quick = quick_shapes(func, args, kwargs or {}) if args else None
        result = func(*args, **(kwargs or {}))  # type: ignore[operator]
        if quick is not None:
            results = result if isinstance(result, tuple) else (result,)
            assert quick == [(tuple(t.shape), t.dtype) for t in results]
            assert all(t.is_contiguous() for t in results)
            self.answered += 1
        return result


@pytest.mark.parametrize("name", CALLS)
def test_as_the_kernels_have_it(name: str) -> None:
    with torch.no_grad(), Comparing() as mode:
        CALLS[name](X)
    assert (mode.answered > 0) == (name in ANSWERED)


def test_a_convolution_that_does_not_fit_is_left_to_pytorch() -> None:
    conv = torch.ops.aten.convolution.default
    given = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert quick_shapes(conv, (X, torch.randn(4, 5, 3, 3), None, *given), {}) is None
    assert quick_shapes(conv, (X, torch.randn(4, 6, 30, 3), None, *given), {}) is None
