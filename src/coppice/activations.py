"""Statistics of what layers read, channel by channel: what the criteria that look at activations are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from coppice.coupling import Coupling
from coppice.linear import Array, Linear, Model
from coppice.saliency import share_out

MAPS = 16  # images whose maps are decomposed
SMALLEST = 1e-3  # ridge of a correlation matrix


def magnitude(x: Array, weight: Array) -> Array:
    """Mean |a|. Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017, section 2.2."""
    return np.asarray(np.abs(x).mean(_all_but_channels(x)))


def nonzero(x: Array, weight: Array) -> Array:
    """1 - APoZ, the share of activations that are not zero. Hu et al., Network Trimming, 2016."""
    return np.asarray((x != 0).mean(_all_but_channels(x)))


def rank(x: Array, weight: Array) -> Array:
    """Mean rank of the feature maps. Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020."""
    some = x[:MAPS]
    maps = some.reshape(*some.shape[: 3 if some.ndim > 3 else 2], -1)
    ranks = np.linalg.matrix_rank((maps if some.ndim > 3 else maps[:, :, None]).astype(np.float32))
    return np.asarray(ranks.astype(np.float64).mean(0))


def independence(x: Array, weight: Array) -> Array:
    """Variance of a channel that the other channels don't explain.

    After Sui et al., CHIP: CHannel Independence-based Pruning, NeurIPS 2021, with least squares for their nuclear norms.
    """
    rows = x.swapaxes(0, 1).reshape(x.shape[1], -1).astype(np.float64)
    rows = rows - rows.mean(1, keepdims=True)
    gram = rows @ rows.T / rows.shape[1]
    ridge = SMALLEST * np.diagonal(gram).mean() + 1e-12
    return np.asarray(1 / np.diagonal(np.linalg.inv(gram + ridge * np.eye(len(gram)))))


def times_weight(x: Array, weight: Array) -> Array:
    """Norm of the activation times |w| of what reads it. After Sun et al., A Simple and Effective Pruning Approach (Wanda), ICLR 2024."""
    return np.asarray(np.sqrt(np.square(x).mean(_all_but_channels(x))) * np.abs(weight).sum(1))


STATISTICS: dict[str, Callable[[Array, Array], Array]] = {f.__name__: f for f in (magnitude, nonzero, rank, independence, times_weight)}


def activation_scores(model: Model, here: Coupling, coupling: Coupling, statistic: str) -> dict[int, Array]:
    """The statistic of each index of each prunable axis, summed over the layers that read it, averaged over the batches.

    ``here`` is the coupling of the model as it runs on its batches, ``coupling`` the one whose ids count. An axis that no layer with a
    weight reads has equal scores.
    """
    outside = {axis.name: axis.id for axis in coupling.prunable}
    ids = {axis.atom: outside[axis.name] for axis in here.prunable}
    scores: dict[int, Array] = {axis.id: np.zeros(axis.width) for axis in coupling.prunable}
    for layer in model.layers:
        model.program.advance(layer.index)
        batches = [_channels(model.array(layer.input, k), layer.summed) for k in range(model.program.active)]
        found = np.stack([STATISTICS[statistic](x, _by_input(layer, x.shape[1])) for x in batches])
        grid = found.astype(np.float64).mean(0).reshape([model.program.values[layer.input].shape[dim] for dim in layer.summed])
        for k, dim in enumerate(layer.summed):
            share_out(here.dims[layer.input][dim], grid.sum(tuple(j for j in range(grid.ndim) if j != k)), ids, scores)
    return {axis: found if found.any() else np.ones_like(found) for axis, found in scores.items()}


def _all_but_channels(x: Array) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _channels(x: Array, dims: Sequence[int]) -> Array:
    """An input as (samples, channels, places...), where the indices of these dims are the channels."""
    behind = 1 + len(dims)
    moved = np.moveaxis(x, dims, range(1, behind))
    return moved.reshape(len(moved), math.prod(moved.shape[1:behind]), *moved.shape[behind:])


def _by_input(layer: Linear, channels: int) -> Array:
    """The weight as (input channels, everything that reads it)."""
    matrix = layer.matrix()
    groups, outputs, _ = matrix.shape
    return np.asarray(matrix.reshape(groups, outputs, channels // groups, -1).swapaxes(1, 2).reshape(channels, -1))
