"""Repair of a pruned Keras model: its layers as `coppice.refit` needs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from coppice.coupling import Coupling, keep_mask
from coppice.errors import CoppiceError
from coppice.keras.linear import Recorded
from coppice.keras.program import coupled_on
from coppice.linear import Array
from coppice.planning import Plan, masks_by_atom
from coppice.refit import Refit, Refitting
from coppice.stepwise import of_one_shape


def repair(dense: Any, pruned: Any, coupling: Coupling, plan: Plan, batches: Iterable[Array], seed: int = 0) -> list[Refit]:
    """See `coppice.repair`."""
    same = of_one_shape(batches)
    left, right = Recorded(dense, same), Recorded(pruned, same)
    if [op.rule for op in left.program.ops] != [op.rule for op in right.program.ops]:
        raise CoppiceError("the pruned model runs other ops than the dense one; repair needs them in step")
    here = coupled_on(dense, coupling, same[0])
    keep = masks_by_atom(here, plan)
    masks = {layer.index: [keep_mask(axis, keep) for axis in here.dims[layer.output]] for layer in left.layers}
    twin = {k: k for k in range(len(left.program.ops))}
    small = {layer.weight: layer for layer in right.layers}
    return Refitting(left, right, small, twin, masks, np.random.default_rng(seed)).run()
