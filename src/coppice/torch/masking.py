"""Masks on a PyTorch model: made, held through training or growing with it, and taken in where others have made them.

One criterion more than `coppice.masking` has: movement while the model trains (Sanh et al., Movement Pruning, NeurIPS 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coppice.coupling import Coupling, Mask
from coppice.errors import CoppiceError
from coppice.masking import chosen, due, plan_of, sites_for
from coppice.masks import MaskRecipe, Site, choose
from coppice.planning import Plan
from coppice.torch.apply import zero
from coppice.torch.trees import named_tensors


def mask(
    model: nn.Module, coupling: Coupling, recipe: MaskRecipe, batches: Iterable[tuple[Tensor, Tensor]] | None = None, seed: int = 0
) -> tuple[nn.Module, Plan]:
    """What `coppice.mask` says."""
    where, masked = sites_for(coupling, recipe, batches), copy.deepcopy(model)
    masks = chosen(masked, coupling, where, recipe, batches, seed)
    zero(masked, masks)
    return masked, plan_of(coupling, masks)


# --- through training -----------------------------------------------------------------------------------------------


class Held:
    """Masked weights stay zero: what an optimiser's momentum or weight decay makes of them is undone after every step."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Mask]) -> None:
        zero(model, masks)
        tensors = named_tensors(model)
        self._gone = [(tensors[name], torch.from_numpy(~mask).to(tensors[name].device)) for name, mask in masks.items()]
        self.tensors: Mapping[str, Tensor] = {}

    def after_step(self, done: int = 0, total: int = 0) -> None:
        with torch.no_grad():
            for tensor, gone in self._gone:
                tensor.masked_fill_(gone, 0)

    def said(self) -> str:
        return ""


def hold_masks(model: nn.Module, masks: Mapping[str, Mask], optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
    """What `coppice.hold_masks` says: a hook that runs after every `optimizer.step()`."""
    held = Held(model, masks)
    return optimizer.register_step_post_hook(lambda *_: held.after_step())


class Growing:
    """Masks that grow while the model trains, by the cubic curve; by magnitude, or by -w dL/dw summed on the way.

    They are chosen anew a hundred times; in between they are held. What was zero has no magnitude to come back by.
    """

    def __init__(self, model: nn.Module, where: Sequence[Site], recipe: MaskRecipe) -> None:
        tensors = named_tensors(model)
        self._weights = {site.name: tensors[site.name] for site in where}
        self._where, self._recipe = list(where), recipe
        self._moved = {n: torch.zeros_like(w, dtype=torch.float64) for n, w in self._weights.items() if recipe.criterion == "movement"}
        self._gone = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self._weights.items()}
        self._share = torch.zeros((), dtype=torch.float64)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        kept = {"share": self._share}
        return kept | {f"moved/{n}": t for n, t in self._moved.items()} | {f"gone/{n}": t for n, t in self._gone.items()}

    def after_step(self, done: int, total: int) -> None:
        with torch.no_grad():
            for name, score in self._moved.items():
                gradient = self._weights[name].grad
                if gradient is not None:
                    score.sub_(self._weights[name] * gradient)
        share = due(self._recipe, done, total)
        if share is not None:
            self._choose(share)
        self._hold()

    def finish(self) -> dict[str, Mask]:
        """The masks at the sparsity that was asked for; weights that an average of the weights has brought back are zero again."""
        if float(self._share) < self._recipe.sparsity:
            self._choose(self._recipe.sparsity)
        self._hold()
        return {name: ~gone.cpu().numpy() for name, gone in self._gone.items()}

    def said(self) -> str:
        return f"{100 * float(self._share):.1f} % of the weights are zero"

    def _choose(self, share: float) -> None:
        ranked = {name: self._moved[name] if self._moved else weight.abs() for name, weight in self._weights.items()}
        scores: dict[str, Any] = {name: score.detach().cpu().double().numpy() for name, score in ranked.items()}
        for name, mask in choose(scores, self._where, MaskRecipe(share, scope=self._recipe.within)).items():
            self._gone[name].copy_(torch.from_numpy(~mask))
        self._share.fill_(share)

    def _hold(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.masked_fill_(self._gone[name], 0)


# --- masks that others have made, and hardware ----------------------------------------------------------------------


def take_in(model: nn.Module) -> tuple[nn.Module, dict[str, Mask]]:
    """A plain copy of a model that was pruned with `torch.nn.utils.prune`, and its masks by parameter name.

    What that keeps as `weight_orig` and `weight_mask` becomes the parameter `weight` again, with zeros.
    """
    from torch.nn.utils import prune

    made = [
        getattr(m, n.removesuffix("_mask"), None) for m in model.modules() for n, _ in m.named_buffers(recurse=False) if n.endswith("_mask")
    ]
    memo = {id(t): t.detach().clone() for t in made if isinstance(t, Tensor)}  # a product that it made, which can't be copied as it is
    plain = copy.deepcopy(model, memo)
    masks: dict[str, Mask] = {}
    for path, module in plain.named_modules():
        for name in [n.removesuffix("_mask") for n, _ in module.named_buffers(recurse=False) if n.endswith("_mask")]:
            if f"{name}_orig" in dict(module.named_parameters(recurse=False)):
                found = getattr(module, f"{name}_mask")
                prune.remove(module, name)
                masks[f"{path}.{name}" if path else name] = found.detach().cpu().numpy() != 0
    if not masks:
        raise CoppiceError("the model has no masks of torch.nn.utils.prune: nothing to take in")
    return plain, masks


def semi_structured(model: nn.Module) -> list[str]:
    """Store the linear layers of `model` whose weights are 2:4 as PyTorch's semi-structured tensors, in place; answers their names.

    CoppiceError where there is no GPU with sparse tensor cores (compute capability 8.0) or no such layer: elsewhere they buy nothing.
    """
    from torch.sparse import to_sparse_semi_structured

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and _is_two_of_four(m.weight)]
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if not capable:
        raise CoppiceError("2:4 tensors need an NVIDIA GPU of compute capability 8.0 or newer, there is none here: keep the dense weights")
    if not linear:
        raise CoppiceError("no linear layer of the model has 2:4 zeros: mask it with --nm 2:4 first")
    for _, module in linear:
        module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
    return [name for name, _ in linear]


def _is_two_of_four(weight: Tensor) -> bool:
    return weight.shape[1] % 4 == 0 and bool(((weight.detach().reshape(-1, 4) != 0).sum(1) <= 2).all())
