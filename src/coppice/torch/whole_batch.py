"""What a layer makes of a whole batch that lies in several processes: BatchNorm's statistics, and dropout's draws.

A mode, not other modules: it meets every call of `batch_norm`, also in a user's own code and in subclasses, and the model stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm
from torch.overrides import TorchFunctionMode

from coppice.errors import CoppiceError
from coppice.parallel import World

_ALIKE = 1e-3  # of a tensor's norm: far above rounding, far below what different images make of statistics

_FUNCTIONAL_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)  # whose inner calls a mode does not see
_DROPOUTS = (torch.dropout, torch.feature_dropout)


class WholeBatch(TorchFunctionMode):
    """Inside it `part` (of `count` images) is what this process has, and every layer acts as on all of them.

    Dropout takes its part of the draws that one process would make, where the images come first in its input (and are its only major dim);
    elsewhere each process draws for itself.
    """

    def __init__(self, part: slice, count: int) -> None:
        super().__init__()
        self._part, self._count = part, count

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _functional_batch_norm(*args, **kwargs)
        if func is torch.batch_norm:
            return _torch_batch_norm(*args, **kwargs)
        if func in _FUNCTIONAL_DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func in _DROPOUTS:
            return self._torch_dropout(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _torch_dropout(self, func: Callable[..., Tensor], input: Tensor, p: float, train: bool) -> Tensor:
        return self._dropout(func, input, p, train)

    def _dropout(self, func: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        own = self._part.stop - self._part.start
        if not training or input.dim() == 0 or len(input) % own:
            return func(input, p, training, *([inplace] if func in _FUNCTIONAL_DROPOUTS else []))
        each = len(input) // own
        whole = torch.ones((each * self._count, *input.shape[1:]), dtype=input.dtype, device=input.device)
        if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
            whole = whole.contiguous(memory_format=torch.channels_last)  # draws follow the memory
        drawn = func(whole, p, True)[each * self._part.start : each * self._part.stop]
        return input.mul_(drawn) if inplace else input * drawn


def _functional_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, whose inner call of `torch.batch_norm` a mode does not see."""
    if training:
        return _batch_norm(input, weight, bias, running_mean, running_var, momentum, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if training:
        return _batch_norm(input, weight, bias, running_mean, running_var, momentum, eps)
    return torch.batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps, cudnn_enabled)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, momentum: float, eps: float
) -> Tensor:
    """`torch.batch_norm` in training mode, with the statistics of all processes."""
    if x.device.type == "cuda":
        found: Tensor = SyncBatchNorm.apply(x, weight, bias, mean, var, eps, momentum, dist.group.WORLD, dist.get_world_size())
        return found
    y, batch_mean, batch_var, count = _Normalise.apply(x, weight, bias, eps)
    if mean is not None and var is not None:
        with torch.no_grad():
            mean.lerp_(batch_mean.to(mean.dtype), momentum)
            var.lerp_((batch_var * (count / (count - 1))).to(var.dtype), momentum)
    normalised: Tensor = y
    return normalised


class _Normalise(torch.autograd.Function):
    """BatchNorm (Ioffe and Szegedy, ICML 2015) over processes; PyTorch's own SyncBatchNorm is for GPUs alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, float]:
        real = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        dims = [d for d in range(x.dim()) if d != 1]
        own_count = x.numel() // x.shape[1]
        own_var, own_mean = torch.var_mean(real, dims, correction=0)
        counts, means, variances = _gathered(own_count, own_mean, own_var)
        count = float(counts.sum())
        if count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        invstd = (var + eps).rsqrt().to(real.dtype)
        line = _line(x)
        normal = (real - mean.to(real.dtype).view(line)) * invstd.view(line)
        ctx.save_for_backward(normal, weight, invstd)
        ctx.count, ctx.bias_kind = count, None if bias is None else bias.dtype
        y = normal if weight is None else normal * weight.view(line)
        y = y if bias is None else y + bias.view(line)
        ctx.mark_non_differentiable(mean, var)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        normal, weight, invstd = ctx.saved_tensors
        dims, line = [d for d in range(dy.dim()) if d != 1], _line(dy)
        slope = dy.to(normal.dtype)
        own = torch.stack([slope.sum(dims), (slope * normal).sum(dims)])  # the gradients of bias and weight are of this process's images
        whole = own.to(torch.float64, copy=True)
        dist.all_reduce(whole)
        centre, along = (whole / ctx.count).to(normal.dtype)
        dx = slope - centre.view(line) - normal * along.view(line)
        dx = dx * (invstd if weight is None else invstd * weight).view(line)
        d_weight = None if weight is None else own[1].to(weight.dtype)
        d_bias = None if ctx.bias_kind is None else own[0].to(ctx.bias_kind)
        return dx.to(dy.dtype), d_weight, d_bias, None


def _line(x: Tensor) -> list[int]:
    return [-1 if d == 1 else 1 for d in range(x.dim())]


def _gathered(count: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (processes, 1), mean and variance (processes, channels) of each process's part, in fp64."""
    own = torch.cat([mean.new_full((1,), count, dtype=torch.float64), mean.double(), var.double()])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    whole = torch.stack(found)
    return whole[:, :1], whole[:, 1 : 1 + len(mean)], whole[:, 1 + len(mean) :]


def variance(x: Tensor) -> Tensor:
    """The unbiased variance of all elements in all processes, as `x.var()` gives for one; no gradient."""
    var, mean = torch.var_mean(x.detach(), correction=0)
    counts, means, variances = _gathered(x.numel(), mean.view(1), var.view(1))
    count = counts.sum()
    mean = (counts * means).sum() / count
    return ((counts * (variances + (means - mean).square())).sum() / (count - 1)).to(x.dtype)


def check_alike(world: World, model: nn.Module, where: str) -> None:
    """Raise CoppiceError unless all processes have the same model, up to rounding: a layer unknown to the mode may have its own."""
    if world.size == 1:
        return
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    told = world.numbers(torch.stack([value.double().norm().cpu() for value in tensors.values()]).tolist())
    for name, values in zip(tensors, zip(*told, strict=True), strict=True):
        if any(not math.isclose(value, values[0], rel_tol=_ALIKE, abs_tol=_ALIKE) for value in values):
            raise CoppiceError(
                f"{name} has become another in each process ({where}): it depends on more than one image at a time in a way that can't "
                "be shared; train in one process"
            )
