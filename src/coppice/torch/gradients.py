"""Gradients for criteria: one backward pass a calibration batch, in eval mode; the model's flags and gradients stay as they were.

A BatchNorm that has never seen a batch has no statistics to use: it takes those of the batch, so that criteria for networks at their
initialisation (SNIP) see what training would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    fresh = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and _is_fresh(norm)]
    try:
        for p in frozen:
            p.requires_grad_(True)
        for inputs, targets in batches:
            with _batch_statistics(fresh):
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


def _is_fresh(norm: _BatchNorm) -> bool:
    """Whether its running statistics are those that it was made with."""
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and var is not None and not bool(mean.any()) and bool((var == 1).all())


@contextmanager
def _batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Have these use the batch's statistics, and keep none."""
    kept = [(norm, norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm in norms:
            norm.running_mean = norm.running_var = None  # in eval mode too, PyTorch takes the batch's then
        yield
    finally:
        for norm, mean, var in kept:
            norm.running_mean, norm.running_var = mean, var


def _numpy(tensor: Tensor) -> Array:
    found: Array = tensor.detach().float().cpu().numpy()
    return found


def synaptic_flow(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Array]:
    """|w dR/dw| of every parameter, where R sums the outputs of a copy with |w| for w on inputs of ones; in double precision.

    A BatchNorm scales what flows and takes no mean away: a trained one's would stop the flow of a channel that is needed.
    """
    copied = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for p in copied.parameters():
            p.abs_().requires_grad_(True)
        for norm in copied.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                norm.running_mean.zero_()
    ones = tuple(torch.ones_like(x, dtype=torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    total = sum(t.sum() for t in torch.utils._pytree.tree_flatten(copied(*ones))[0] if isinstance(t, Tensor) and t.is_floating_point())
    named = dict(copied.named_parameters())
    slopes = torch.autograd.grad(total, list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    return {
        name: np.zeros(p.shape) if g is None else np.abs((p * g).detach().numpy())
        for (name, p), g in zip(named.items(), slopes, strict=True)
    }
