"""Apply a plan: an edited copy of the user's model, of the user's own class. The model given is never touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coppice.coupling import Mask
from coppice.errors import CoppiceError
from coppice.masking import fitting
from coppice.planning import Plan, Removal
from coppice.torch.stand_ins import stand_in
from coppice.torch.trees import copied, hears_of_its_mode, modules_of, named_tensors, without_collection


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` without the modules and indices that ``plan`` removes: parameters, buffers, and the attributes that hold sizes.

    Weights that the plan masks are zero, kept values are copied bit for bit; ``requires_grad``, dtype, device and tied parameters stay as
    they are.
    CoppiceError where the plan belongs to another model.
    """
    for cut in plan.cuts:
        if cut.removed is not None:
            model = without_modules(model, cut.removed)
        if cut.removed is None or cut.axes:
            model = _edited_copy(model, cut.changed(), cut.tensors, cut.attributes)
        zero(model, {name: mask.array() for name, mask in cut.weight_masks.items()})
    return model


def without_modules(model: nn.Module, removed: Removal) -> nn.Module:
    """A copy of ``model`` whose modules and columns are as ``removed`` says."""
    paths = dict(modules_of(model))
    for path in (*(edit.path for edit in removed.edits), *removed.attributes):
        if path not in paths:
            raise CoppiceError(
                f"the plan names the module {path}, which this model does not have; give the model that the plan was made for"
            )
    masks = {}
    for name, tensor in named_tensors(model).items():
        found = removed.masks(name)
        if found:
            masks[name] = [found.get(dim, np.ones(size, bool)) for dim, size in enumerate(tensor.shape)]
    shallow = _edited_copy(model, masks, removed.columns, removed.attributes)
    # All of them before any is in its place: a merged one reads others.
    made = {edit.path: stand_in(shallow, edit) for edit in removed.edits}
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        module.training = shallow.get_submodule(path).training
        setattr(shallow.get_submodule(parent), name, module)
    return shallow


def zero(model: nn.Module, masks: Mapping[str, Mask]) -> None:
    """Set the weights to zero at which their mask is False, in place. CoppiceError where a mask is of another model."""
    tensors = named_tensors(model) if masks else {}
    fitting(masks, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with torch.no_grad():
        for name, mask in masks.items():
            tensors[name].masked_fill_(torch.from_numpy(~mask).to(tensors[name].device), 0)


def build(model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> nn.Module:
    """The pruned model from a freshly made dense ``model``, a plan, and the pruned ``state`` (as saved: names -> tensors)."""
    pruned = apply(model, plan)
    missing = load_exactly(pruned, state)
    if missing:
        raise CoppiceError(f"the saved weights don't belong to this model and plan: {missing}")
    return pruned


def load_exactly(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Load ``state`` into ``model``; answers what does not fit, as text. Tied names that the file holds once are filled in."""
    own = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(own.items()) if name in state}
    full = {name: state.get(name, state.get(first.get(id(tensor), ""))) for name, tensor in own.items()}
    for name, tensor in own.items():
        given = full[name]
        if given is None:
            return f"{name} is missing"
        if given.shape != tensor.shape:
            return f"{name} has shape {tuple(given.shape)}, expected {tuple(tensor.shape)}"
    if extra := sorted(set(state) - set(own)):
        return f"{extra[0]} is not a name of this model"
    loaded = OrderedDict((k, v) for k, v in full.items() if v is not None)
    loaded._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]  # versions, which some modules ask for
    model.load_state_dict(loaded, strict=True)
    return None


def slice_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, pruned: nn.Module, plan: Plan) -> dict[str, Any]:
    """The state of ``optimizer`` (over ``model``'s parameters) for an optimiser of the same groups over ``pruned``'s parameters.

    Every state tensor shaped like its parameter (momentum, Adam's moments) is sliced as the parameter is; load the answer with
    ``load_state_dict``. The new optimiser must be made over the same parameters in the same order.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    changed = masks_of(model, plan)
    state = copy.deepcopy(optimizer.state_dict())
    order: list[Tensor | None] = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = dict(pruned.named_parameters())
    if plan.modules:
        order = _renumbered(state, names, order, sizes, plan)
    for index, parameter in enumerate(order):
        name = "" if parameter is None else names.get(id(parameter), "")
        if name not in changed or index not in state["state"]:
            continue
        assert parameter is not None
        slots = state["state"][index]
        for key, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[key] = sliced(value, changed[name])
                if slots[key].shape != sizes[name].shape:
                    raise CoppiceError(
                        f"the pruned model's {name} does not have the plan's shape; give the model that the plan was applied to"
                    )
    return state


def _renumbered(
    state: dict[str, Any], names: Mapping[int, str], order: Sequence[Tensor | None], sizes: Mapping[str, Tensor], plan: Plan
) -> list[Tensor | None]:
    """Number an optimiser's state as the parameters of a model without some modules are: group by group, in that model's own order.

    What is new there (the kernel of merged layers, and its bias) has no state, and the group of its module's weight. Answers the dense
    parameters in the new order (None: a new one).
    """
    groups = {names.get(id(order[k]), ""): g for g, group in enumerate(state["param_groups"]) for k in group["params"]}
    old = {names.get(id(parameter), ""): k for k, parameter in enumerate(order)}
    sorted_in: list[list[str]] = [[] for _ in state["param_groups"]]
    for name in sizes:
        group = groups.get(name, groups.get(name.rpartition(".")[0] + ".weight"))
        if group is not None:  # else no parameter of the optimiser
            sorted_in[group].append(name)
    flat = [name for some in sorted_in for name in some]
    kept = {name for name in flat if name in old and plan.stays(name)}
    state["state"] = {k: state["state"][old[name]] for k, name in enumerate(flat) if name in kept and old[name] in state["state"]}
    number = iter(range(len(flat)))
    for group, some in zip(state["param_groups"], sorted_in, strict=True):
        group["params"] = [next(number) for _ in some]
    return [order[old[name]] if name in kept else None for name in flat]


def masks_of(model: nn.Module, plan: Plan) -> dict[str, list[Mask]]:
    """The masks of every tensor of the dense ``model`` that stays and loses something, by all cuts of ``plan``."""
    found: dict[str, list[Mask]] = {}
    tensors = named_tensors(model)
    for cut in plan.cuts:
        columns = {} if cut.removed is None else {name: cut.removed.masks(name) for name in cut.removed.columns}
        narrowed = cut.changed()
        for name in {*columns, *narrowed} & {name for name in tensors if plan.stays(name)}:
            masks = found.setdefault(name, [np.ones(size, bool) for size in tensors[name].shape])
            for dim, mask in columns.get(name, {}).items():
                masks[dim] = _and_then(masks[dim], mask)
            for dim, mask in enumerate(narrowed.get(name, ())):
                masks[dim] = _and_then(masks[dim], mask)
    return found


def _and_then(first: Mask, second: Mask) -> Mask:
    """Which indices stay when ``second`` is about those that ``first`` kept."""
    both: Mask = first.copy()
    both[first] = second
    return both


def _edited_copy(
    model: nn.Module, changed: Mapping[str, list[Mask]], named: Iterable[str], attributes: Mapping[str, Mapping[str, int | list[int]]]
) -> nn.Module:
    """A deep copy in which the tensors that ``changed`` has are cut by its masks, and attributes set; ``named`` must all be there."""
    tensors = named_tensors(model)
    for name in named:
        if name not in tensors:
            raise CoppiceError(f"the plan names {name}, which this model does not have; give the model that the plan was made for")
    memo: dict[int, Any] = {}
    indices: dict[int, Tensor | None] = {}  # by the id of the mask, as tensors share most
    for name, tensor in tensors.items():
        if id(tensor) not in memo:
            masks = changed.get(name)
            if masks is not None and tuple(m.size for m in masks) != tuple(tensor.shape):
                raise CoppiceError(
                    f"the plan was made for {name} of shape {tuple(m.size for m in masks)}, this model's is {tuple(tensor.shape)}; "
                    "give the model that the plan was made for"
                )
            if masks is not None:
                indices.update({id(mask): _indices(mask) for mask in masks if id(mask) not in indices})
                edited = _selected(tensor, [indices[id(mask)] for mask in masks])
                same = nn.Parameter(edited, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else edited
                memo[id(tensor)] = same
    with without_collection():
        pruned: nn.Module = copied(model, memo)
    modules = modules_of(pruned)
    if hears_of_its_mode(modules):  # what it kept is of the dense widths
        flags = [(module, module.training) for _, module in modules]
        pruned.train(pruned.training)
        for module, was in flags:
            module.training = was
    for path, values in attributes.items():
        module = pruned.get_submodule(path)
        for attribute, value in values.items():
            set_size(module, attribute, value)
    return pruned


def set_size(module: nn.Module, attribute: str, value: int | list[int]) -> None:
    """Set an attribute that holds a size, keeping the type of a sequence."""
    if isinstance(value, list):
        old = getattr(module, attribute, None)
        setattr(module, attribute, type(old)(value) if isinstance(old, (tuple, list)) else tuple(value))
    elif type(module).__setattr__ is nn.Module.__setattr__ and attribute in module.__dict__ and not hasattr(type(module), attribute):
        module.__dict__[attribute] = value  # what setting it comes to, after a search among parameters, buffers and modules
    else:
        setattr(module, attribute, value)


def sliced(tensor: Tensor, masks: list[Mask]) -> Tensor:
    """A copy of ``tensor`` restricted to the indices whose mask is True, dim by dim."""
    return _selected(tensor, list(map(_indices, masks)))


def _indices(mask: Mask) -> Tensor | None:
    """The indices that stay; None where all do."""
    kept = mask.nonzero()[0]
    return None if kept.size == mask.size else torch.from_numpy(kept)


def _selected(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """A copy of ``tensor`` restricted to these indices, dim by dim."""
    out = tensor.detach()
    for dim, kept in enumerate(indices):
        if kept is not None:
            out = out.index_select(dim, kept.to(out.device))
    return out.clone() if out is tensor or out.data_ptr() == tensor.data_ptr() else out
