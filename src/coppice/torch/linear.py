"""`coppice.linear` of a PyTorch model: its layers in NumPy's arrays, which share the tensors' memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from coppice.coupling import Coupling
from coppice.graph import Op
from coppice.linear import Array
from coppice.stepwise import of_one_shape
from coppice.torch.aten import base_name
from coppice.torch.layers import Layer, find_layers
from coppice.torch.program import Program, coupled_on
from coppice.torch.trees import named_tensors


class Recorded:
    """`coppice.linear.Model` of a module that runs on ``batches``."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.program = Program(model, batches)
        self._tensors = named_tensors(model)
        self.layers = [Linear(layer, self._tensors) for layer in find_layers(self.program)]

    def array(self, value: int, batch: int) -> Array:
        return array_of(self.program.value(value, batch))

    def adds(self, op: Op) -> bool:
        return base_name(op.call.func) == "add" and op.call.kwargs.get("alpha", 1) == 1 and len(op.call.args) <= 2

    def tensor(self, name: str) -> Array:
        return np.array(array_of(self._tensors[name]))

    def write(self, values: Mapping[str, Array]) -> None:
        write(self._tensors, values)

    def answers(self) -> Array:
        return array_of(torch.cat(self.program.finish()))


def recorded(model: nn.Module, coupling: Coupling, batches: Iterable[Tensor]) -> tuple[Recorded, Coupling]:
    """``model`` on those of ``batches`` (model inputs) that have the first one's shape, and ``coupling`` as it is there.

    CoppiceError where there are no batches.
    """
    same = of_one_shape(batches)
    return Recorded(model, same), coupled_on(model, coupling, same[0])


class Linear:
    """`coppice.linear.Linear` of a :class:`Layer`."""

    channels = 1

    def __init__(self, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
        self.layer, self._tensors = layer, tensors
        self.index, self.weight, self.input, self.output = layer.index, layer.weight, layer.input, layer.output
        self.normed = None if layer.norm is None else layer.norm.output
        self.summed: tuple[int, ...] = (1,) if layer.kernel else (-1,)

    @property
    def can_shift(self) -> bool:
        return self.layer.can_shift

    def matrix(self) -> Array:
        return array_of(self.layer.matrix(self._tensors[self.weight]))

    def bias(self) -> Array | None:
        return None if self.layer.bias is None else array_of(self._tensors[self.layer.bias])

    def changed(self, matrix: Array, shift: Array | None) -> dict[str, Array]:
        weight = self.layer.weight_from(torch.from_numpy(matrix), self._tensors[self.weight])
        found = {self.weight: weight} | ({} if shift is None else self.layer.shifted(self._tensors, torch.from_numpy(shift)))
        return {name: array_of(value.to(self._tensors[name].dtype)) for name, value in found.items()}

    def affine(self) -> tuple[Array, Array]:
        assert self.layer.norm is not None
        shift, scale = self.layer.norm.affine(self._tensors)
        return array_of(shift), array_of(scale)

    def positions(self, shape: Sequence[int]) -> int:
        return self.layer.positions(shape)

    def samples(self, x: Array) -> int:
        return int(x.shape[0]) if self.layer.kernel else 1

    def features(self, x: Array, at: Array, shape: Sequence[int]) -> Array:
        return array_of(self.layer.features(torch.from_numpy(x), torch.from_numpy(at), shape[2:]))

    def responses(self, y: Array, at: Array) -> Array:
        return array_of(self.layer.responses(torch.from_numpy(y), torch.from_numpy(at)))


def array_of(tensor: Tensor) -> Array:
    """NumPy has no bfloat16, and computes slowly in half precision."""
    found = tensor.detach().cpu()
    return np.asarray((found.float() if found.dtype in (torch.bfloat16, torch.float16) else found).numpy())


@torch.no_grad()
def write(tensors: Mapping[str, Tensor], values: Mapping[str, Array]) -> None:
    """Set the tensors of these names."""
    for name, value in values.items():
        tensors[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
