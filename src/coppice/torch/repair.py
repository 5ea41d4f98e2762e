"""Repair of a pruned PyTorch model: its layers as `coppice.refit` needs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np
import torch
from torch import Tensor, nn

from coppice.coupling import Coupling, Mask, keep_mask
from coppice.errors import CoppiceError
from coppice.graph import Op
from coppice.planning import Plan, masks_by_atom
from coppice.refit import Array, Refit, Refitting
from coppice.stepwise import of_one_shape
from coppice.torch.apply import masks_of
from coppice.torch.aten import base_name
from coppice.torch.layers import Layer, find_layers
from coppice.torch.lockstep import COPIES
from coppice.torch.program import Program, coupled_on
from coppice.torch.trees import named_tensors

__all__ = ["Refit", "repair"]


def repair(dense: nn.Module, pruned: nn.Module, coupling: Coupling, plan: Plan, batches: Iterable[Tensor], seed: int = 0) -> list[Refit]:
    """See `coppice.repair`."""
    same = of_one_shape(batches)
    left, right = _Model(dense, same), _Model(pruned, same)
    if plan.removed is None and plan.then is None:
        here = coupled_on(dense, coupling, same[0])
        keep = masks_by_atom(here, plan)
        masks = {layer.index: [keep_mask(axis, keep) for axis in here.dims[layer.output]] for layer in left.layers}
        twin = _twins(left.program.ops, right.program.ops)
    else:
        changed = masks_of(dense, plan)
        shapes = {layer.index: left.program.values[layer.output].shape for layer in left.layers}
        masks = {layer.index: _of_results(layer.layer, changed.get(layer.weight), shapes[layer.index]) for layer in left.layers}
        twin = _likely_twins(left.program.ops, right.program.ops)
    small = {layer.weight: layer for layer in right.layers if plan.stays(layer.weight)}
    return Refitting(left, right, small, twin, masks, np.random.default_rng(seed)).run()


class _Model:
    """`coppice.refit.Model` of a module."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.program = Program(model, batches)
        tensors = named_tensors(model)
        self.layers = [_Linear(layer, tensors) for layer in find_layers(self.program)]

    def array(self, value: int, batch: int) -> Array:
        return self.program.value(value, batch).detach().numpy()  # type: ignore[no-any-return]

    def adds(self, op: Op) -> bool:
        return base_name(op.call.func) == "add" and op.call.kwargs.get("alpha", 1) == 1 and len(op.call.args) <= 2


class _Linear:
    """`coppice.refit.Linear` of a :class:`Layer`."""

    channels = 1

    def __init__(self, layer: Layer, tensors: Mapping[str, Tensor]) -> None:
        self.layer, self._tensors = layer, tensors
        self.index, self.weight, self.input, self.output = layer.index, layer.weight, layer.input, layer.output
        self.normed = None if layer.norm is None else layer.norm.output

    @property
    def can_shift(self) -> bool:
        return self.layer.can_shift

    def matrix(self) -> Array:
        return self.layer.matrix(self._tensors[self.weight].detach()).numpy()

    def bias(self) -> Array | None:
        return None if self.layer.bias is None else self._tensors[self.layer.bias].detach().numpy()

    @torch.no_grad()
    def change(self, matrix: Array, shift: Array | None) -> None:
        weight = self._tensors[self.weight]
        weight.copy_(self.layer.weight_from(torch.from_numpy(matrix), weight).to(weight.dtype))
        for name, value in ({} if shift is None else self.layer.shifted(self._tensors, torch.from_numpy(shift))).items():
            self._tensors[name].copy_(value)

    def affine(self) -> tuple[Array, Array]:
        assert self.layer.norm is not None
        shift, scale = self.layer.norm.affine(self._tensors)
        return shift.numpy(), scale.numpy()

    def positions(self, y: Array) -> int:
        return self.layer.positions(y.shape)

    def samples(self, x: Array) -> int:
        return int(x.shape[0]) if self.layer.kernel else 1

    def features(self, x: Array, at: Array, y: Array) -> Array:
        return self.layer.features(torch.from_numpy(x), torch.from_numpy(at), y.shape[2:]).numpy()

    def responses(self, y: Array, at: Array) -> Array:
        return self.layer.responses(torch.from_numpy(y), torch.from_numpy(at)).numpy()


def _of_results(layer: Layer, weight: list[Mask] | None, shape: Sequence[int]) -> list[Mask]:
    """Which indices of each dim of a layer's results stay, given those of its weight."""
    masks = [np.ones(size, bool) for size in shape]
    if weight is not None:
        if layer.kernel:
            masks[1] = weight[0]
        else:
            masks[-1] = weight[0 if layer.transposed else 1]
    return masks


def _likely_twins(dense: Sequence[Op], pruned: Sequence[Op]) -> dict[int, int]:
    """The same where modules are gone: ops are paired in order, by the module that they run in; a wrong pair only makes a worse goal."""
    left, right = ([k for k, op in enumerate(ops) if base_name(op.call.func) not in COPIES] for ops in (dense, pruned))
    ours, theirs = [[(ops[k].module, ops[k].rule) for k in some] for ops, some in ((dense, left), (pruned, right))]
    blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    return {left[b.a + k]: right[b.b + k] for b in blocks for k in range(b.size)}


def _twins(dense: Sequence[Op], pruned: Sequence[Op]) -> dict[int, int]:
    """Dense op -> the op of the pruned model's recording that does the same; copies are left out. CoppiceError if they differ."""
    left, right = ([k for k, op in enumerate(ops) if base_name(op.call.func) not in COPIES] for ops in (dense, pruned))
    if [dense[k].rule for k in left] != [pruned[k].rule for k in right]:
        raise CoppiceError("the pruned model runs other ops than the dense one; repair needs them in step")
    return dict(zip(left, right, strict=True))
