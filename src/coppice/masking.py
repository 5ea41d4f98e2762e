"""What masks need of a model of either framework: scores of its single weights, the plan that holds the masks, when they grow.

Criteria: magnitude; gradient magnitude; first-order Taylor (Molchanov et al., CVPR 2019); |w| times the norm of its input (Sun et al.,
Wanda, ICLR 2024); at random. `coppice.sparsegpt` changes the weights that stay as well, and movement shows while a model trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from coppice.coupling import Coupling, Mask
from coppice.errors import CoppiceError, VerificationError
from coppice.linear import Model
from coppice.masks import LOOKING, NOTHING, MaskRecipe, Site, choose, cubic, sites, sparsity
from coppice.packed import PackedMask
from coppice.planning import Plan, make_plan
from coppice.run import Json
from coppice.saliency import Array
from coppice.sparsegpt import masked_by_obs
from coppice.stepwise import of_one_shape
from coppice.targets import humanise

_UPDATES = 100  # of the masks while they grow


def sites_for(coupling: Coupling, recipe: MaskRecipe, batches: Iterable[Any] | None) -> list[Site]:
    """What can be masked. CoppiceError where that is nothing, or the recipe can't be followed at once and with these batches."""
    if batches is None and recipe.criterion in LOOKING:
        raise CoppiceError(f"masks by {recipe.criterion} need calibration batches: give batches of (inputs, labels)")
    if recipe.schedule != "one-shot":
        raise CoppiceError(f"the schedule {recipe.schedule} goes with training: give it to coppice.prune, here masks are made at once")
    where, _ = sites(coupling)
    if not where:
        raise CoppiceError(NOTHING)
    return where


def chosen(
    model: Any, coupling: Coupling, where: list[Site], recipe: MaskRecipe, batches: Iterable[Any] | None, seed: int
) -> dict[str, Mask]:
    """The masks of the weights with the lowest scores by the recipe's criterion; `sparsegpt` changes the others in place."""
    if recipe.criterion == "sparsegpt":
        here = coupling.graph.origin.recorded(model, of_one_shape(x for x, _ in batches or ()))
        masks = masked_by_obs(here, where, recipe, seed)
    else:
        masks = choose(weight_scores(model, coupling, where, recipe.criterion, batches or (), seed), where, recipe)
    if not masks:
        raise CoppiceError(f"no weight has an input dim that divides into groups for {recipe.nm}: give a sparsity instead")
    return masks


def weight_scores(
    model: Any, coupling: Coupling, where: Sequence[Site], criterion: str, batches: Iterable[Any], seed: int
) -> dict[str, Array]:
    """A score of every single weight of the sites: low means it can go. ``batches`` of (inputs, targets) are for criteria that look."""
    origin = coupling.graph.origin
    parameters = origin.parameters(model)
    weights = {site.name: parameters[site.name] for site in where}
    if criterion == "random":
        generator = np.random.default_rng(seed)
        return {name: generator.random(weight.shape) for name, weight in weights.items()}
    if criterion == "magnitude":
        return {name: np.abs(weight) for name, weight in weights.items()}
    if criterion == "wanda":
        norms = input_norms(origin.recorded(model, of_one_shape(x for x, _ in batches)))
        return {name: np.abs(weight) * norms.get(name, np.float32(1)) for name, weight in weights.items()}
    totals = {name: np.zeros(weight.shape) for name, weight in weights.items()}
    for pairs in origin.gradients(model, batches, None):
        for name in totals.keys() & pairs.keys():
            weight, slope = pairs[name]
            totals[name] += np.abs(slope) if criterion == "gradient" else np.square(weight * slope)
    return totals


def input_norms(model: Model) -> dict[str, Array]:
    """For each layer's weight, the root mean square of what each of its elements is multiplied with; of the weight's shape."""
    found = {}
    for layer in model.layers:
        model.program.advance(layer.index)
        shape = model.program.values[layer.output].shape
        at = np.arange(layer.positions(shape))
        squares = [
            np.square(layer.features(model.array(layer.input, k), at, shape)).mean(1, dtype=np.float64) for k in range(model.program.active)
        ]
        norms = np.sqrt(np.mean(squares, axis=0))
        spread = np.broadcast_to(norms[:, None, :], layer.matrix().shape)
        found[layer.weight] = layer.changed(np.ascontiguousarray(spread), None)[layer.weight]
    return found


def plan_of(coupling: Coupling, masks: Mapping[str, Mask]) -> Plan:
    """The plan that removes no index and holds these masks."""
    return replace(make_plan(coupling, {}), weight_masks={name: PackedMask.of(found) for name, found in masks.items()})


def unpacked(plan: Plan) -> dict[str, Mask]:
    return {name: packed.array() for name, packed in plan.weight_masks.items()}


def places_in_dense(plan: Plan, name: str, shape: tuple[int, ...]) -> Mask:
    """Which weights of the dense model's parameter, of that shape, the plan's mask leaves: those that it removes count as left."""
    keep = plan.masks(name) if name in plan.tensors else [np.ones(size, bool) for size in shape]
    stays = np.ones(shape, bool)
    stays[np.ix_(*keep)] = plan.weight_masks[name].array()
    return stays


def fitting(masks: Mapping[str, Mask], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Mask]:
    """These masks. CoppiceError where one is of another model than the one whose parameters have these shapes."""
    for name, mask in masks.items():
        if shapes.get(name) != mask.shape:
            has = f"of shape {shapes[name]}" if name in shapes else "not in this model"
            raise CoppiceError(
                f"the mask of {name} is of shape {mask.shape}, the weight is {has}; give the model that the masks were made for"
            )
    return masks


# --- in a run ---------------------------------------------------------------------------------------------------------


def levels(recipe: MaskRecipe) -> list[MaskRecipe]:
    """The recipe's sparsity in rounds that each take the same share of what is left."""
    count = recipe.steps if recipe.schedule == "iterative" else 1
    last = replace(recipe, schedule="one-shot")
    return [replace(last, sparsity=1 - (1 - recipe.sparsity) ** (k / count)) for k in range(1, count)] + [last]


def rounds(recipe: MaskRecipe, epochs: int) -> list[tuple[str, MaskRecipe, int]]:
    """What to mask one after the other: the stage's name, its recipe, and the epochs of fine-tuning after it."""
    each, over = divmod(epochs, len(levels(recipe)))
    found = [(f"masked {k}", level, each) for k, level in enumerate(levels(recipe), 1)]
    name, level, last = found[-1]
    return [*found[:-1], (name, level, last + over)]


def due(recipe: MaskRecipe, done: int, total: int) -> float | None:
    """The share of zeros for which masks that grow by the cubic curve are chosen anew after ``done`` of ``total`` steps: a hundred times,
    and once for the whole sparsity. None where they stay as they are.
    """
    share = cubic(recipe.sparsity, done, total)
    if share == recipe.sparsity:
        return share if cubic(recipe.sparsity, done - 1, total) < share else None
    return share if done % max(1, total // _UPDATES) == 0 else None


def facts(coupling: Coupling, plan: Plan, recipe: MaskRecipe) -> Json:
    """What a run notes of the masks of ``plan``, which were made for this coupling by ``recipe``."""
    chosen = {"criterion": recipe.criterion, "scope": recipe.within, "asked": str(recipe)}
    return sparsity(coupling, unpacked(plan), recipe).to_dict() | chosen


def zeros_said(noted: Mapping[str, Any]) -> str:
    """The words on the zeros of a step, of which ``noted`` are the facts."""
    return f"{100 * noted['share']:.1f} % of {humanise(noted['weights'], 'params')} weights are zero"


def check_zeros(plan: Plan, zeros: Mapping[str, Mask]) -> str:
    """What was checked, in words: ``zeros`` are the zeros of the masked weights by name. VerificationError where a masked one is none."""
    for name, stays in unpacked(plan).items():
        if not (zeros[name] | stays).all():
            raise VerificationError(f"{name} has weights that the plan masks and that are not zero")
    return f"every weight that the plan masks is zero, in {len(plan.weight_masks)} tensors"
