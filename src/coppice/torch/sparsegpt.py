"""Masks by the optimal brain surgeon: what goes is made good by the weights that stay, layer by layer, on calibration images.

For each layer the Gram matrix H of its inputs, as the model masked so far gives them; a weight's score is w^2 / [H^-1]_jj, and column by
column the error of what went is passed on to the columns after it. After Frantar and Alistarh, SparseGPT: Massive Language Models Can Be
Accurately Pruned in One-Shot, ICML 2023; here the mask of a layer is chosen first, by any scope, then its columns are gone through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coppice.coupling import Mask
from coppice.masks import MaskRecipe, Site, choose, erk
from coppice.torch.layers import Layer, find_layers
from coppice.torch.program import Program
from coppice.torch.trees import named_tensors

RIDGE = 1e-2  # relative to the mean of the Gram matrix's diagonal, as in the paper
SAMPLES_A_FEATURE = 16
LARGEST = 6144  # features of a layer whose Hessian is inverted


def masked_by_obs(model: nn.Module, where: Sequence[Site], recipe: MaskRecipe, batches: Sequence[Tensor], seed: int) -> dict[str, Mask]:
    """Masks for the sites; the weights of `model` are updated in place. A layer that can't be refitted (read twice, too wide) goes by
    magnitude.
    """
    shares = erk(list(where), 1 - recipe.sparsity) if recipe.within == "erk" else {}
    program, tensors = Program(model, batches), named_tensors(model)
    layers = {layer.weight: layer for layer in find_layers(program)}
    generator = torch.Generator().manual_seed(seed)
    masks: dict[str, Mask] = {}
    for site in sorted(where, key=lambda site: layers[site.name].index if site.name in layers else -1):
        own = MaskRecipe(1 - shares[site.name], scope="layer") if shares else MaskRecipe(recipe.sparsity, recipe.nm, scope=recipe.within)
        layer, weight = layers.get(site.name), tensors[site.name]
        matrix = None if layer is None else layer.matrix(weight.detach())
        if layer is None or matrix is None or matrix.shape[2] > LARGEST:
            masks |= choose({site.name: weight.detach().abs().cpu().numpy()}, [site], own) if own else {}
            continue
        program.advance(layer.index)
        hessian = _gram(program, layer, matrix.shape[2], generator)
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        scores = matrix.double().square() / upper.diagonal(dim1=1, dim2=2).square()[:, None]
        found = choose({site.name: layer.weight_from(scores, weight).numpy()}, [site], own) if own else {}
        if site.name in found:
            masks |= found
            stays = layer.matrix(torch.from_numpy(found[site.name]))
            with torch.no_grad():
                weight.copy_(layer.weight_from(_swept(matrix.double(), stays, upper), weight))
    return masks


def _gram(program: Program, layer: Layer, features: int, generator: torch.Generator) -> Tensor:
    """Second moments of the layer's features (groups, F, F), with a ridge."""
    shape = program.values[layer.output].shape
    total, rows = torch.zeros(layer.groups, features, features, dtype=torch.float64), 0
    positions = layer.positions(shape)
    for k in range(program.active):
        x = program.value(layer.input, k)
        samples = x.shape[0] if layer.kernel else 1
        take = min(positions, max(1, -(-SAMPLES_A_FEATURE * features // (samples * program.active))))
        at = torch.randperm(positions, generator=generator)[:take]
        found = layer.features(x, at, shape[2:])
        total += found.transpose(1, 2) @ found
        rows += found.shape[1]
    total /= rows
    mean = total.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return total + (RIDGE * mean)[:, None, None] * torch.eye(features, dtype=total.dtype)


def _swept(matrix: Tensor, stays: Tensor, upper: Tensor) -> Tensor:
    """The weights (groups, outputs, features) with zeros where they don't stay, each error passed on to the columns after it."""
    matrix = matrix.clone()
    for column in range(matrix.shape[2]):
        gone = torch.where(stays[:, :, column], 0.0, matrix[:, :, column])
        error = gone / upper[:, column, column, None]
        matrix[:, :, column:] -= error[:, :, None] * upper[:, None, column, column:]
        matrix[:, :, column] = torch.where(stays[:, :, column], matrix[:, :, column], 0.0)
    return matrix
