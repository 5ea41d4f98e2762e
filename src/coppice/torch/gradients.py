"""Element saliency from gradients: one backward pass a calibration batch, in eval mode, nothing kept but running means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coppice.errors import CoppiceError

Array = NDArray[Any]


def mean_over_batches(
    model: nn.Module, element: Callable[[Array, Array | None], Array], batches: Iterable[Any], loss: Callable[..., Tensor] | None
) -> dict[str, Array]:
    """Mean over ``batches`` of ``element(weight, gradient)`` for every parameter; the model's flags and gradients are left as they were.

    ``loss(outputs, targets)`` is cross-entropy where None. CoppiceError where there is no batch or a loss is not finite.
    """
    loss = loss or nn.functional.cross_entropy
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    flags = [(m, m.training) for m in model.modules()]
    totals = {name: np.zeros(p.shape, np.float32) for name, p in parameters.items()}
    count = 0
    model.eval()
    try:
        for p in frozen:
            p.requires_grad_(True)
        for inputs, targets in batches:
            value = loss(model(inputs), targets)
            if not torch.isfinite(value):
                raise CoppiceError(f"the loss on calibration batch {count} is {value.item()}; check the weights and the preprocessing")
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                if g is not None:
                    totals[name] += element(p.detach().float().cpu().numpy(), g.float().cpu().numpy())
            count += 1
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, training in flags:
            module.training = training
    if not count:
        raise CoppiceError("there are no calibration batches; give at least one image")
    return {name: total / count for name, total in totals.items()}
