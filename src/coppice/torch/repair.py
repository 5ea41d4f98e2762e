"""Repair of a pruned PyTorch model: its layers as `coppice.refit` needs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

import numpy as np
from torch import Tensor, nn

from coppice.coupling import Coupling, Mask, keep_mask
from coppice.errors import CoppiceError
from coppice.graph import Op
from coppice.planning import Plan, masks_by_atom
from coppice.refit import Refit, Refitting
from coppice.stepwise import of_one_shape
from coppice.torch.apply import masks_of
from coppice.torch.aten import base_name
from coppice.torch.layers import Layer
from coppice.torch.linear import Recorded
from coppice.torch.lockstep import COPIES
from coppice.torch.program import coupled_on

__all__ = ["Refit", "repair"]


def repair(dense: nn.Module, pruned: nn.Module, coupling: Coupling, plan: Plan, batches: Iterable[Tensor], seed: int = 0) -> list[Refit]:
    """See `coppice.repair`."""
    same = of_one_shape(batches)
    left, right = Recorded(dense, same), Recorded(pruned, same)
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
