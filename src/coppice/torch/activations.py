"""Statistics of what layers read, channel by channel: what the criteria that look at activations are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from coppice.coupling import Coupling
from coppice.saliency import share_out
from coppice.torch.layers import Layer, find_layers
from coppice.torch.program import Program, coupled_on, of_one_shape

MAPS = 16  # images whose maps are decomposed
SMALLEST = 1e-3  # ridge of a correlation matrix


def magnitude(x: Tensor, weight: Tensor) -> Tensor:
    """Mean |a|. Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017, section 2.2."""
    return x.abs().flatten(2).mean((0, 2))


def nonzero(x: Tensor, weight: Tensor) -> Tensor:
    """1 - APoZ, the share of activations that are not zero. Hu et al., Network Trimming, 2016."""
    return (x != 0).flatten(2).double().mean((0, 2))


def rank(x: Tensor, weight: Tensor) -> Tensor:
    """Mean rank of the feature maps. Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020."""
    maps = x[:MAPS].flatten(3) if x.dim() > 3 else x[:MAPS].flatten(2)[:, :, None]
    ranks: Tensor = torch.linalg.matrix_rank(maps.float())
    return ranks.double().mean(0)


def independence(x: Tensor, weight: Tensor) -> Tensor:
    """Variance of a channel that the other channels don't explain.

    After Sui et al., CHIP: CHannel Independence-based Pruning, NeurIPS 2021, with least squares for their nuclear norms.
    """
    rows = x.flatten(2).transpose(0, 1).flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    gram = rows @ rows.T / rows.shape[1]
    ridge = SMALLEST * gram.diagonal().mean() + 1e-12
    inverse: Tensor = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return 1 / inverse.diagonal()


def times_weight(x: Tensor, weight: Tensor) -> Tensor:
    """Norm of the activation times |w| of what reads it. After Sun et al., A Simple and Effective Pruning Approach (Wanda), ICLR 2024."""
    return x.flatten(2).square().mean((0, 2)).sqrt() * weight.abs().sum(1)


STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {f.__name__: f for f in (magnitude, nonzero, rank, independence, times_weight)}


def activation_scores(model: nn.Module, coupling: Coupling, batches: Iterable[Tensor], statistic: str) -> dict[int, NDArray[Any]]:
    """The statistic of each index of each prunable axis, summed over the layers that read it, averaged over the batches.

    An axis that no layer with a weight reads has equal scores.
    """
    same = of_one_shape(batches)
    here, program = coupled_on(model, coupling, same[0]), Program(model, same)
    outside = {axis.name: axis.id for axis in coupling.prunable}
    ids = {axis.atom: outside[axis.name] for axis in here.prunable}
    scores: dict[int, NDArray[Any]] = {axis.id: np.zeros(axis.width) for axis in coupling.prunable}
    weights = dict(model.named_parameters(remove_duplicate=False))
    for layer in find_layers(program):
        program.advance(layer.index)
        weight = _by_input(layer, weights[layer.weight].detach())
        found = [STATISTICS[statistic](_channels(layer, program.value(layer.input, k)), weight) for k in range(program.active)]
        axis = here.dims[layer.input][1 if layer.kernel else -1]
        share_out(axis, torch.stack(found).double().mean(0).numpy(), ids, scores)
    return {axis: found if found.any() else np.ones_like(found) for axis, found in scores.items()}


def _channels(layer: Layer, x: Tensor) -> Tensor:
    """(samples, channels, places...); the rows of a matrix product are samples."""
    return x if layer.kernel else x[:, :, None]


def _by_input(layer: Layer, weight: Tensor) -> Tensor:
    """The weight as (input channels, everything that reads it)."""
    matrix = layer.matrix(weight)
    groups, outputs, features = matrix.shape
    width = weight.shape[1] if layer.kernel else features
    return matrix.view(groups, outputs, width, -1).transpose(1, 2).reshape(groups * width, -1)
