"""Gradients for criteria: one backward pass a calibration batch, in eval mode; the model's flags and gradients stay as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coppice.errors import CoppiceError

Array = NDArray[Any]
Pairs = dict[str, tuple[Array, Array]]


def gradients(model: nn.Module, batches: Iterable[Any], loss: Callable[..., Tensor] | None) -> Iterator[Pairs]:
    """For each of ``batches``, (weight, gradient) of every parameter that got one.

    ``loss(outputs, targets)`` is cross-entropy where None. CoppiceError where there is no batch or a loss is not finite.
    """
    loss = loss or nn.functional.cross_entropy
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    flags = [(m, m.training) for m in model.modules()]
    count = 0
    model.eval()
    try:
        for p in frozen:
            p.requires_grad_(True)
        for inputs, targets in batches:
            value = loss(model(inputs), targets)
            if not torch.isfinite(value):
                raise CoppiceError(f"the loss on calibration batch {count} is {value.item()}; check the weights and the preprocessing")
            found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            yield {name: (_numpy(p), _numpy(g)) for (name, p), g in zip(parameters.items(), found, strict=True) if g is not None}
            count += 1
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, training in flags:
            module.training = training
    if not count:
        raise CoppiceError("there are no calibration batches; give at least one image")


def _numpy(tensor: Tensor) -> Array:
    found: Array = tensor.detach().float().cpu().numpy()
    return found


def synaptic_flow(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Array]:
    """|w dR/dw| of every parameter, where R sums the outputs of a copy with |w| for w on inputs of ones; in double precision."""
    copied = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p in copied.parameters():
            p.abs_().requires_grad_(True)
    ones = tuple(torch.ones_like(x, dtype=torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    total = sum(t.sum() for t in torch.utils._pytree.tree_flatten(copied(*ones))[0] if isinstance(t, Tensor) and t.is_floating_point())
    named = dict(copied.named_parameters())
    slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    return {
        name: np.zeros(p.shape) if g is None else np.abs((p * g).detach().numpy())
        for (name, p), g in zip(named.items(), slopes, strict=True)
    }
