"""Generated networks (`coppice.testing.networks`) and what must hold when one is pruned at random (:func:`check_pruning`)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import coppice
from coppice.coupling import Coupling
from coppice.planning import make_plan
from coppice.testing.networks import random_network
from coppice.torch.apply import build
from coppice.torch.capture import in_double

TOLERANCE = 1e-8  # of outputs of size 1 to 10, in float64, through some 20 layers


@dataclass(frozen=True)
class Checked:
    """What :func:`check_model` saw of one network."""

    blocks: tuple[str, ...]  # class names of its modules, one for each module
    ops: tuple[str, ...]  # names of the ops recorded, one for each call
    axes: int
    prunable: int  # axes that may be cut
    cut: int  # axes that lost an index
    prunable_share: float  # of the parameters, those that lie on an axis that may be cut
    pins: Mapping[str, int]  # reason -> axes pinned for it
    zeroed: bool  # compared with the dense model, removed weights zero


class MismatchError(AssertionError):
    """The pruned model isn't what the plan says."""


def check_pruning(seed: int, size: int = 8, *, mixing: bool = True) -> Checked:
    """:func:`check_model` of `random_network(seed, size)`; without mixing ops the outputs are also compared with the dense model's."""
    model, inputs = random_network(seed, size, mixing=mixing)
    return check_model(model, inputs, seed, zeroed=not mixing)


def check_model(model: nn.Module, inputs: tuple[Any, ...], seed: int, *, zeroed: bool = False) -> Checked:
    """Prunes ``model`` by a random plan in float64 and checks the result against the dense model.

    Beyond `coppice.verify`: the dense model is left as it was, the plan survives JSON, every kept number is one of the dense
    model's own, the cost is the one predicted, a training step gives finite gradients, and the state goes through a round trip.
    With ``zeroed`` the outputs are also compared with the dense model's, whose removed weights are set to zero: that needs no
    part of coppice but `apply`, and holds where no op mixes the channels. Raises :class:`MismatchError` or `coppice.VerificationError`.
    """
    model, inputs = model.double(), in_double(inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    coupling = coppice.couple(coppice.capture(model, inputs))
    plan = random_plan(coupling, seed)
    pruned = coppice.apply(model, plan)
    verification = coppice.verify(model, pruned, coupling, plan)

    _require(type(pruned) is type(model), "the pruned model is of another class")
    _require(coppice.Plan.from_json(plan.to_json()) == plan, "the plan changes on its way through JSON")
    _require(all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the dense model was changed")
    kept = {axis.name: len(axis.keep) for axis in plan.axes}
    predicted = coupling.cost({axis.id: kept[axis.name] for axis in coupling.axes if axis.name in kept})
    counted = coppice.couple(replace(coppice.capture(pruned, inputs), origin=None)).cost()
    _require(predicted.params == sum(p.numel() for p in pruned.parameters()), "the predicted number of parameters is wrong")
    _require(predicted.bytes == counted.bytes, "the predicted number of bytes is wrong")
    _require(predicted.macs == counted.macs or verification.detour is not None, "the predicted number of MACs is wrong")
    origin = kept_elements(model, plan)
    _check_kept(model, pruned, origin)
    if zeroed:
        _check_zeroed(model, pruned, origin, inputs)
    _check_round_trip(model, pruned, plan, inputs)
    _check_training_step(pruned, inputs)

    on_axis = {name for axis in coupling.prunable for name, _ in axis.sites}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return Checked(
        blocks=tuple(type(m).__name__ for m in model.modules()),
        ops=tuple(op.name for op in coupling.graph.ops),
        axes=len(coupling.axes),
        prunable=len(coupling.prunable),
        cut=sum(len(axis.keep) < axis.width for axis in plan.axes),
        prunable_share=sum(n for name, n in sizes.items() if name in on_axis) / sum(sizes.values()),
        pins={reason: len(names) for reason, names in coupling.pins.items()},
        zeroed=zeroed,
    )


def random_plan(coupling: Coupling, seed: int) -> coppice.Plan:
    """A random subset of every prunable axis, at least one index of each; axes that are tied keep their widths in proportion."""
    rng = np.random.default_rng(seed)
    by_atom = {axis.atom: axis for axis in coupling.axes}
    keep = {}
    for bundle in coupling.bundles():
        unit = math.gcd(*(atom.size for atom in bundle))
        share = unit if rng.random() < 0.15 else int(rng.integers(1, unit, endpoint=True))
        for axis in (by_atom[atom] for atom in bundle):
            mask = np.zeros(axis.width, bool)
            mask[rng.choice(axis.width, axis.width // unit * share, replace=False)] = True
            keep[axis.id] = mask
    return make_plan(coupling, keep)


def kept_elements(model: nn.Module, plan: coppice.Plan) -> dict[str, Tensor]:
    """For each parameter, which of its elements (flat index) stay: found by pruning a copy whose weights are their own indices."""
    numbered = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in numbered.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape))
    return {name: p.detach().long() for name, p in coppice.apply(numbered, plan).named_parameters()}


def flat_outputs(made: object) -> list[Tensor]:
    """The tensors in a model's output, in order."""
    if isinstance(made, Tensor):
        return [made]
    items: Iterable[object] = made.values() if isinstance(made, Mapping) else made if isinstance(made, (tuple, list)) else ()
    return [tensor for item in items for tensor in flat_outputs(item)]


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise MismatchError(otherwise)


def _check_kept(model: nn.Module, pruned: nn.Module, origin: Mapping[str, Tensor]) -> None:
    dense = dict(model.named_parameters())
    for name, parameter in pruned.named_parameters():
        _require(torch.equal(parameter, dense[name].flatten()[origin[name]]), f"{name} holds numbers the dense model has elsewhere")
        _require(len(set(origin[name].flatten().tolist())) == origin[name].numel(), f"{name} holds an element twice")


def _check_zeroed(model: nn.Module, pruned: nn.Module, origin: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> None:
    """A removed channel that every consumer multiplies by zero is gone, whatever its bias and its activation made of it."""
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in zeroed.named_parameters():
            if parameter.dim() >= 2:
                kept = torch.zeros(parameter.numel(), dtype=torch.bool)
                kept[origin[name].flatten()] = True
                parameter.mul_(kept.view(parameter.shape))
        for made, wanted in zip(flat_outputs(pruned(*inputs)), flat_outputs(zeroed(*inputs)), strict=True):
            error = (made - wanted).abs().max().item()
            _require(error < TOLERANCE, f"differs from the dense model with its removed weights at zero, by {error:.2g}")


def _check_round_trip(model: nn.Module, pruned: nn.Module, plan: coppice.Plan, inputs: tuple[Any, ...]) -> None:
    again = build(model, plan, {name: tensor.clone() for name, tensor in pruned.state_dict().items()})
    with torch.no_grad():
        for made, wanted in zip(flat_outputs(again(*inputs)), flat_outputs(pruned(*inputs)), strict=True):
            _require(torch.equal(made, wanted), "saved and loaded, it gives other outputs")


def _check_training_step(pruned: nn.Module, inputs: tuple[Any, ...]) -> None:
    model = copy.deepcopy(pruned).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    with torch.random.fork_rng(devices=[]):  # dropout
        loss = torch.stack([y.square().mean() for y in flat_outputs(model(*inputs))]).sum()
    loss.backward()
    optimiser.step()
    for name, parameter in model.named_parameters():
        _require(parameter.grad is not None and bool(parameter.grad.isfinite().all()), f"{name} has no finite gradient")
        _require(bool(parameter.isfinite().all()), f"{name} is not finite after a training step")
