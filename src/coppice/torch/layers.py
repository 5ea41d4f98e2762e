"""Convolutions and linear layers as what they both are: a matrix that multiplies patches of features, group by group.

``Layer.features`` gives the patches that the weight is multiplied with at some sampled positions, ``Layer.responses`` what comes out
there, so that a refit of the weight is one least-squares problem whatever the layer is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coppice.graph import Kind, Op, Value
from coppice.refit import only_use
from coppice.torch.aten import Ref, base_name
from coppice.torch.program import Program

CONVOLUTIONS = ("conv", "pointwise_conv")  # rules


@dataclass(frozen=True, slots=True)
class Norm:
    """The BatchNorm right after a layer, by the names of its tensors; ``output`` is its result."""

    output: int
    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float

    def affine(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Shift and scale of what it does in eval mode; a scale of next to nothing is taken as one, as nothing can be undone there."""
        scale = (tensors[self.var] + self.eps).rsqrt() * (tensors[self.weight] if self.weight else 1)
        shift = (tensors[self.bias] if self.bias else 0) - tensors[self.mean] * scale
        return shift.detach(), torch.where(scale.abs() < 1e-4, 1.0, scale).detach()


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or matrix product with a parameter: op ``index`` of its recording.

    ``weight`` and ``bias`` are parameter names, ``input`` and ``output`` value ids. The weight as a matrix is (groups, out, features).
    """

    index: int
    weight: str
    bias: str | None
    input: int
    output: int
    groups: int
    transposed: bool
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    norm: Norm | None = None

    @property
    def can_shift(self) -> bool:
        """Whether a constant can be added to the results: in the bias, or in the mean that a BatchNorm takes away."""
        return self.bias is not None or self.norm is not None

    def shifted(self, tensors: Mapping[str, Tensor], by: Tensor) -> dict[str, Tensor]:
        """The tensors that change when ``by`` (outputs) is added to the layer's results, by name: at most one."""
        if self.bias is not None:
            return {self.bias: tensors[self.bias].detach() + by.to(tensors[self.bias].dtype)}
        if self.norm is not None:
            return {self.norm.mean: tensors[self.norm.mean] - by.to(tensors[self.norm.mean].dtype)}
        return {}

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (groups, outputs a group, features a group), features in the order of :meth:`features`."""
        if not self.kernel:
            return (weight if self.transposed else weight.T)[None]
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight_from(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`: a weight of the shape of ``like``."""
        if not self.kernel:
            return matrix[0] if self.transposed else matrix[0].T
        return matrix.reshape(like.shape)

    def positions(self, shape: Sequence[int]) -> int:
        """How many positions a sample of a result of this shape has (a matrix product's rows all belong to one sample)."""
        return math.prod(shape[2:]) if self.kernel else shape[0]

    def responses(self, y: Tensor, at: Tensor) -> Tensor:
        """The layer's results ``y`` at positions ``at``, as (groups, samples, outputs a group)."""
        if not self.kernel:
            return y[at][None]
        n, c = y.shape[:2]
        picked = y.flatten(2)[:, :, at].view(n, self.groups, c // self.groups, len(at))
        return picked.permute(1, 0, 3, 2).reshape(self.groups, n * len(at), c // self.groups)

    def features(self, x: Tensor, at: Tensor, out_size: Sequence[int]) -> Tensor:
        """What the weight is multiplied with for the results at positions ``at``, as (groups, samples, features a group)."""
        if not self.kernel:
            return x[at][None]
        pads = [p for size in reversed(self.padding) for p in (size, size)]
        x = torch.nn.functional.pad(x, pads) if any(pads) else x
        places = _patches(at, out_size, x.shape[2:], self.kernel, self.stride, self.dilation)
        n, c = x.shape[:2]
        picked = x.flatten(2)[:, :, places]  # n c positions kernel
        picked = picked.view(n, self.groups, c // self.groups, len(at), -1).permute(1, 0, 3, 2, 4)
        return picked.reshape(self.groups, n * len(at), -1)


def _patches(
    at: Tensor, out_size: Sequence[int], in_size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Flat input positions (positions, kernel elements) that the results at flat positions ``at`` are computed from."""
    flat = torch.zeros(len(at), 1, dtype=torch.long)
    rest, coordinates = at, []
    for size in reversed(out_size):
        coordinates.append(rest % size)
        rest = rest // size
    for dim, place in enumerate(reversed(coordinates)):
        along = place[:, None] * stride[dim] + torch.arange(kernel[dim]) * dilation[dim]
        flat = (flat[:, :, None] * in_size[dim] + along[:, None, :]).flatten(1)
    return flat


def find_layers(program: Program) -> list[Layer]:
    """The layers of a recording whose results are used and whose weight is a parameter that nothing else reads; in order."""
    reads = Counter(v for op in program.ops for v in {*op.inputs, *op.others} if v is not None)
    made = {out: op for op in program.ops for out in op.outputs}
    found = []
    for k, op in enumerate(program.ops):
        layer = _layer(k, op, program.values, made)
        used = layer is not None and (reads[layer.output] > 0 or layer.output in program.outputs)
        if layer is not None and used and all(reads[v.id] <= 1 for v in program.values if layer.weight in v.names):
            use = only_use(program, layer.output, k)
            norm = _norm(program.ops[use], program.values) if use is not None and program.ops[use].rule == "batch_norm" else None
            found.append(replace(layer, norm=norm))
    return found


def _norm(op: Op, values: Sequence[Value]) -> Norm | None:
    weight, bias, mean, var = [None if v is None else next(iter(values[v].names), None) for v in op.inputs[1:5]]
    if mean is None or var is None:
        return None
    return Norm(op.outputs[0], weight, bias, mean, var, [a for a in op.call.args if isinstance(a, float)][-1])


def _layer(index: int, op: Op, values: Sequence[Value], made: dict[int, Op]) -> Layer | None:
    if op.rule not in (*CONVOLUTIONS, "mm") or op.inputs[0] is None or op.inputs[1] is None:
        return None
    bias = _parameter(op.inputs[2] if len(op.inputs) > 2 else None, values)
    has_bias = len(op.inputs) > 2 and op.inputs[2] is not None
    if has_bias and bias is None:
        return None
    weight, source = _parameter(op.inputs[1], values), made.get(op.inputs[1])
    if op.rule == "mm":
        if weight is None and source is not None and base_name(source.call.func) in ("t", "transpose", "permute"):
            weight, transposed = _parameter(source.inputs[0], values), True
        else:
            transposed = False
        return None if weight is None else Layer(index, weight, bias, op.inputs[0], op.outputs[0], 1, transposed)
    if weight is None:
        return None
    _, w, _, stride, padding, dilation, _, _, groups = op.call.args[:9]
    assert isinstance(w, Ref)
    kernel = tuple(w.shape[2:])
    stride, padding, dilation = (tuple(v) * (len(kernel) if len(v) == 1 else 1) for v in (stride, padding, dilation))
    return Layer(index, weight, bias, op.inputs[0], op.outputs[0], groups, False, kernel, stride, padding, dilation)


def _parameter(value: int | None, values: Sequence[Value]) -> str | None:
    if value is None or values[value].kind is not Kind.PARAMETER:
        return None
    return values[value].names[0]
