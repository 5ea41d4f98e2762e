"""Shapes of the results of the commonest ops, worked out at once: PyTorch's way there is written in Python and takes milliseconds an op.

Only for contiguous operands, whose results are contiguous too; everything else is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coppice.torch.aten import base_name, is_pointwise

UNTAGGED = {"hardswish"}  # pointwise, though no tag says so
Result = tuple[tuple[int, ...], torch.dtype]


def quick_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Result] | None:
    """Shape and dtype of each result of a functional op; None where that is not known here."""
    rule = RULES.get(base_name(func)) or (_pointwise if is_pointwise(func) or base_name(func) in UNTAGGED else None)
    tensors = [a for a in args if isinstance(a, Tensor)]
    if rule is None or kwargs or not tensors or not all(t.is_contiguous() for t in tensors):
        return None
    return rule(func, args)


def leaves_as_is(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op that writes into its first operand surely leaves shape, strides and dtype: pointwise, of tensors of one shape."""
    return (is_pointwise(func) or base_name(func) in UNTAGGED) and all(a.shape == args[0].shape for a in args[1:] if isinstance(a, Tensor))


def _pointwise(func: Any, args: tuple[Any, ...]) -> list[Result] | None:
    """Of one tensor and numbers; which dtype comes out a single element tells."""
    x, *numbers = args
    if not isinstance(x, Tensor) or not all(isinstance(n, (int, float, str)) or n is None for n in numbers):
        return None
    return [(tuple(x.shape), func(torch.ones(1, dtype=x.dtype), *numbers).dtype)]


def _batch_norm(func: Any, args: tuple[Any, ...]) -> list[Result] | None:
    x, training = args[0], args[5]
    return None if training else [(tuple(x.shape), x.dtype), ((0,), x.dtype), ((0,), x.dtype)]


def _convolution(func: Any, args: tuple[Any, ...]) -> list[Result] | None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    kernel, rank = weight.shape[2:], weight.dim() - 2
    if transposed or x.dim() != rank + 2 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups or x.dtype != weight.dtype:
        return None  # the other way round, without a batch, or an error that PyTorch words better
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        return None
    stride, padding, dilation = (list(v) * (rank if len(v) == 1 else 1) for v in (stride, padding, dilation))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    places = [(n + 2 * p - span) // s + 1 for n, p, span, s in zip(x.shape[2:], padding, spans, stride, strict=True)]
    return [((x.shape[0], weight.shape[0], *places), x.dtype)] if min(places) > 0 else None


RULES: dict[str, Callable[[Any, tuple[Any, ...]], list[Result] | None]] = {
    "convolution": _convolution,
    "native_batch_norm": _batch_norm,
}
