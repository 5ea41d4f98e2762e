"""`coppice.elimination` on PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coppice import elimination, mending
from coppice.coupling import Coupling
from coppice.elimination import Draw, Refitter
from coppice.linear import Array
from coppice.stepwise import of_one_shape
from coppice.torch.linear import Recorded, array_of, recorded
from coppice.torch.program import coupled_on


def removal_losses(
    model: nn.Module, coupling: Coupling, batches: Iterable[Tensor], seed: int = 0, orders: Mapping[int, Sequence[int]] | None = None
) -> dict[int, Array]:
    """Axis id -> for each index the loss that its removal adds, along the axis's path. ``batches`` are model inputs.

    CoppiceError where there are no batches.
    """
    same, copied = of_one_shape(batches), copy.deepcopy(model).eval()
    here = coupled_on(model, coupling, same[0])
    return elimination.removal_losses(lambda some: Recorded(copied, some), here, coupling, same, drawn(seed), orders)


def refitter(model: nn.Module, coupling: Coupling, batches: Iterable[Tensor], seed: int = 0) -> Refitter:
    """What reads an axis of ``model``, refitted on ``batches`` (model inputs) for any choice of what stays of the axis."""
    return Refitter(*recorded(model, coupling, batches), drawn(seed))


def drawn(seed: int) -> Draw:
    """Orders drawn by PyTorch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> NDArray[np.intp]:
        found: NDArray[np.intp] = torch.randperm(count, generator=generator).numpy()
        return found

    return draw


def divergence(outputs: Tensor, dense: Tensor, temperature: float = mending.TEMPERATURE) -> float:
    """See `coppice.mending.divergence`."""
    return mending.divergence(array_of(outputs), array_of(dense), temperature)
