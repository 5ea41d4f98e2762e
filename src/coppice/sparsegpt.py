"""Masks by the optimal brain surgeon: what goes is made good by the weights that stay, layer by layer, on calibration images.

For each layer the Gram matrix H of its inputs, as the model masked so far gives them; a weight's score is w^2 / [H^-1]_jj, and column by
column the error of what went is passed on to the columns after it. After Frantar and Alistarh, SparseGPT: Massive Language Models Can Be
Accurately Pruned in One-Shot, ICML 2023; here the mask of a layer is chosen first, by any scope, then its columns are gone through.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coppice.coupling import Mask
from coppice.linear import Array, Linear, Model
from coppice.masks import MaskRecipe, Site, choose, erk

RIDGE = 1e-2  # relative to the mean of the Gram matrix's diagonal, as in the paper
SAMPLES_A_FEATURE = 16
LARGEST = 6144  # features of a layer whose Hessian is inverted


def masked_by_obs(model: Model, where: Sequence[Site], recipe: MaskRecipe, seed: int) -> dict[str, Mask]:
    """Masks for the sites; the weights of `model` are updated in place. A layer that can't be refitted (read twice, too wide) goes by
    magnitude.
    """
    shares = erk(list(where), 1 - recipe.sparsity) if recipe.within == "erk" else {}
    layers = {layer.weight: layer for layer in model.layers}
    rng = np.random.default_rng(seed)
    masks: dict[str, Mask] = {}
    for site in sorted(where, key=lambda site: layers[site.name].index if site.name in layers else -1):
        own = MaskRecipe(1 - shares[site.name], scope="layer") if shares else MaskRecipe(recipe.sparsity, recipe.nm, scope=recipe.within)
        if not own:  # every weight of it stays
            continue
        layer = layers.get(site.name)
        matrix = None if layer is None else np.array(layer.matrix(), np.float64)  # before it is written over
        if layer is None or matrix is None or matrix.shape[2] > LARGEST:
            masks |= choose({site.name: np.abs(model.tensor(site.name))}, [site], own)
            continue
        model.program.advance(layer.index)
        inverse = np.linalg.inv(_gram(model, layer, matrix.shape[2], rng))
        upper = np.linalg.cholesky(inverse).swapaxes(1, 2)
        scores = np.square(matrix) / np.square(np.diagonal(upper, axis1=1, axis2=2))[:, None]
        found = choose({site.name: layer.changed(scores, None)[site.name]}, [site], own)
        if site.name in found:
            masks |= found
            model.write({site.name: found[site.name].astype(np.float32)})
            stays = layer.matrix() != 0  # the mask as the matrix has it
            model.write(layer.changed(_swept(matrix, stays, upper), None))
    return masks


def _gram(model: Model, layer: Linear, features: int, rng: np.random.Generator) -> Array:
    """Second moments of the layer's features (groups, F, F), with a ridge."""
    shape, count = model.program.values[layer.output].shape, model.program.active
    total, rows = np.zeros((1, features, features)), 0
    positions = layer.positions(shape)
    for k in range(count):
        x = model.array(layer.input, k)
        take = min(positions, max(1, -(-SAMPLES_A_FEATURE * features // (layer.samples(x) * count))))
        found = layer.features(x, rng.permutation(positions)[:take], shape).astype(np.float64)
        total = total + found.swapaxes(1, 2) @ found
        rows += found.shape[1]
    total /= rows
    mean = np.maximum(np.diagonal(total, axis1=1, axis2=2).mean(1), 1e-12)
    return np.asarray(total + (RIDGE * mean)[:, None, None] * np.eye(features))


def _swept(matrix: Array, stays: Mask, upper: Array) -> Array:
    """The weights (groups, outputs, features) with zeros where they don't stay, each error passed on to the columns after it."""
    matrix = matrix.copy()
    for column in range(matrix.shape[2]):
        gone = np.where(stays[:, :, column], 0.0, matrix[:, :, column])
        error = gone / upper[:, column, column, None]
        matrix[:, :, column:] -= error[:, :, None] * upper[:, None, column, column:]
        matrix[:, :, column] = np.where(stays[:, :, column], matrix[:, :, column], 0.0)
    return matrix
