"""Apply a plan: an edited copy of the user's model, of the user's own class. The model given is never touched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from coppice.coupling import Mask
from coppice.errors import CoppiceError
from coppice.planning import Plan
from coppice.torch.trees import copied, hears_of_its_mode, modules_of, named_tensors, without_collection


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` without the indices that ``plan`` removes: parameters, buffers, and the attributes that hold sizes.

    Kept values are copied bit for bit; ``requires_grad``, dtype, device and tied parameters stay as they are.
    CoppiceError where the plan belongs to another model.
    """
    return _edited_copy(model, plan, lambda tensor, masks: sliced(tensor, masks) if masks else None)


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
    changed = plan.changed()
    state = copy.deepcopy(optimizer.state_dict())
    order = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = dict(pruned.named_parameters())
    for index, parameter in enumerate(order):
        name = names.get(id(parameter), "")
        if name not in changed or index not in state["state"]:
            continue
        slots = state["state"][index]
        for key, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[key] = sliced(value, changed[name])
                if slots[key].shape != sizes[name].shape:
                    raise CoppiceError(
                        f"the pruned model's {name} does not have the plan's shape; give the model that the plan was applied to"
                    )
    return state


def _edited_copy(model: nn.Module, plan: Plan, edit: Callable[[Tensor, list[Mask] | None], Tensor | None]) -> nn.Module:
    """A deep copy in which every parameter and buffer is what ``edit`` makes of it (None: an ordinary copy)."""
    changed = plan.changed()
    tensors = named_tensors(model)
    for name in plan.tensors:
        if name not in tensors:
            raise CoppiceError(f"the plan names {name}, which this model does not have; give the model that the plan was made for")
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in memo:
            masks = changed.get(name)
            if masks is not None and tuple(m.size for m in masks) != tuple(tensor.shape):
                raise CoppiceError(
                    f"the plan was made for {name} of shape {tuple(m.size for m in masks)}, this model's is {tuple(tensor.shape)}; "
                    "give the model that the plan was made for"
                )
            edited = edit(tensor, masks)
            if edited is not None:
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
    for path, values in plan.attributes.items():
        module = pruned.get_submodule(path)
        for attribute, value in values.items():
            set_size(module, attribute, value)
    return pruned


def set_size(module: nn.Module, attribute: str, value: int | list[int]) -> None:
    """Set an attribute that holds a size, keeping the type of a sequence."""
    if isinstance(value, list):
        old = getattr(module, attribute, None)
        setattr(module, attribute, type(old)(value) if isinstance(old, (tuple, list)) else tuple(value))
    else:
        setattr(module, attribute, value)


def sliced(tensor: Tensor, masks: list[Mask]) -> Tensor:
    """A copy of ``tensor`` restricted to the indices whose mask is True, dim by dim."""
    out = tensor.detach()
    for dim, mask in enumerate(masks):
        if not mask.all():
            out = out.index_select(dim, torch.from_numpy(mask.nonzero()[0]).to(out.device))
    return out.clone() if out is tensor or out.data_ptr() == tensor.data_ptr() else out
