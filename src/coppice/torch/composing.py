"""One layer composed of several linear ones: convolutions or linear layers with BatchNorms between them, and a shortcut around it all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from coppice.errors import CoppiceError

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def composed(model: nn.Module, steps: list[dict[str, Any]], shortcut: bool) -> nn.Module:
    """The layer that does what the layers and norms of ``model`` that ``steps`` name do one after the other, in evaluation."""
    first, *rest = steps
    like = model.get_submodule(first["layer"]).weight
    assert isinstance(like, Tensor)
    made = _of(model, first)
    for step in rest:
        made = _normed(made, model.get_submodule(step["norm"])) if "norm" in step else _after(made, _of(model, step))
    if shortcut:
        middle = tuple(size // 2 for size in made.weight.shape[2:])
        for k in range(made.weight.shape[0]):
            place = (k, k % made.weight.shape[1], *middle)
            made.weight[place] += 1
    return made.module(like)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A layer in double precision; a linear one has no places."""

    weight: Tensor
    bias: Tensor | None
    groups: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    def module(self, like: Tensor) -> nn.Module:
        """The layer, of the precision and on the device of ``like``."""
        made: Any
        outputs, inputs, *kernel = self.weight.shape
        if not kernel:
            made = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=self.bias is not None)
        else:
            made = nn.utils.skip_init(
                CONVOLUTIONS[len(kernel)], inputs * self.groups, outputs, tuple(kernel),
                stride=self.stride, padding=self.padding, groups=self.groups, bias=self.bias is not None,
            )  # fmt: skip
        made.to(dtype=like.dtype, device=like.device)
        with torch.no_grad():
            made.weight.copy_(self.weight)
            if self.bias is not None:
                made.bias.copy_(self.bias)
        made.requires_grad_(like.requires_grad)
        return made  # type: ignore[no-any-return]


def _of(model: nn.Module, step: Mapping[str, Any]) -> Kernel:
    layer = model.get_submodule(step["layer"])
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    own = bias.detach().double() if isinstance(bias, Tensor) else None
    return Kernel(weight.detach().double().clone(), own, int(step["groups"]), tuple(step["stride"]), tuple(step["padding"]))


def _normed(layer: Kernel, norm: nn.Module) -> Kernel:
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise CoppiceError(f"a {type(norm).__name__} can't be folded into a layer; leave that merge out")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    weight = layer.weight * scale.view(-1, *(1,) * (layer.weight.dim() - 1))
    return replace(layer, weight=weight, bias=shift if layer.bias is None else shift + layer.bias * scale)


def _all_groups(layer: Kernel) -> Kernel:
    """The same as a kernel of all inputs, zero between groups."""
    if layer.groups == 1:
        return layer
    outputs, inputs = layer.weight.shape[:2]
    full = layer.weight.new_zeros(outputs, inputs * layer.groups, *layer.weight.shape[2:])
    for g in range(layer.groups):
        rows = slice(g * outputs // layer.groups, (g + 1) * outputs // layer.groups)
        full[rows, g * inputs : (g + 1) * inputs] = layer.weight[rows]
    return replace(layer, weight=full, groups=1)


def _after(first: Kernel, second: Kernel) -> Kernel:
    """What ``second`` makes of what ``first`` gives, as one kernel; of as many groups as both have, else of one."""
    if first.groups != second.groups:
        first, second = _all_groups(first), _all_groups(second)
    a, b = (layer.weight.unflatten(0, (layer.groups, -1)) for layer in (first, second))  # groups, out a group, in a group, kernel
    sizes, others = first.weight.shape[2:], second.weight.shape[2:]
    kernel = [p + (q - 1) * s for p, q, s in zip(sizes, others, first.stride, strict=True)]
    out = a.new_zeros(first.groups, b.shape[1], a.shape[2], *kernel)
    for place in itertools.product(*map(range, others)):
        here = (slice(None),) * 3 + place
        there = (slice(None),) * 3 + tuple(slice(p * s, p * s + size) for p, s, size in zip(place, first.stride, sizes, strict=True))
        out[there] += torch.einsum("gom,gmi...->goi...", b[here], a)
    bias = second.bias
    if first.bias is not None:
        carried = torch.einsum("gom,gm->go", b.flatten(3).sum(3) if others else b, first.bias.view(first.groups, -1)).flatten()
        bias = carried if bias is None else bias + carried
    stride = tuple(s * t for s, t in zip(first.stride, second.stride, strict=True))
    padding = tuple(p + s * q for p, s, q in zip(first.padding, first.stride, second.padding, strict=True))
    return Kernel(out.flatten(0, 1), bias, first.groups, stride, padding)
