"""Tensors that have a shape and no values: what a trial of the user's code at other widths runs on.

Each wraps a tensor on PyTorch's ``meta`` device and says that it lies on the real one, so that code and kernels choose as they always do.
Ops that no such tensor goes into run as usual: what the code works out from numbers alone has its values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

META = torch.device("meta")


class ShapeTensor(Tensor):
    """``meta`` holds shape, strides and dtype; ``device`` is where the tensor says that it is."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> ShapeTensor:
        made: ShapeTensor = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made.meta = meta
        return made

    def __init__(self, meta: Tensor, device: torch.device) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: dict[int, Tensor] = {}
        devices: list[torch.device] = []

        def unwrap(leaf: Any) -> Any:
            if isinstance(leaf, ShapeTensor):
                devices.append(leaf.device)
                given[id(leaf.meta)] = leaf
                return leaf.meta
            if isinstance(leaf, Tensor):
                meta = leaf.detach().to(META)
                given[id(meta)] = leaf
                return meta
            return META if isinstance(leaf, torch.device) else leaf

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            known = given.get(id(leaf))
            if known is None:
                return ShapeTensor(leaf, devices[0])
            if known.shape != leaf.shape:
                raise NotImplementedError(f"{func} changes a tensor's shape in place")
            return known

        return _mapped(wrap, func(*_mapped(unwrap, args), **_mapped(unwrap, kwargs or {})))


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (tuple, list)):
        made = [_mapped(change, leaf) for leaf in tree]
        return made if isinstance(tree, list) else tuple(made)
    if isinstance(tree, dict):
        return {key: _mapped(change, leaf) for key, leaf in tree.items()}
    return change(tree)


def shape_like(tensor: Tensor, shape: tuple[int, ...]) -> ShapeTensor:
    """A tensor of ``shape``, otherwise like ``tensor``."""
    return ShapeTensor(torch.empty(shape, dtype=tensor.dtype, device=META), tensor.device)


def like(tensor: Tensor, new: Tensor) -> Tensor:
    """``new`` as a parameter if ``tensor`` is one; PyTorch's choice of matmul kernel depends on ``requires_grad``."""
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def tensors_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], values: bool) -> dict[int, Any]:
    """A parameter or buffer of the given shape for each of the model's, by the id of that, as ``deepcopy`` wants it.

    Without ``values`` floating ones are shape tensors; whole numbers are mostly indices, at which code may look.
    """
    memo: dict[int, Any] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if id(tensor) not in memo:
                shape = shapes.get(name, tuple(tensor.shape))
                bare = not values and tensor.is_floating_point()
                memo[id(tensor)] = like(tensor, shape_like(tensor, shape) if bare else tensor.detach()[tuple(map(slice, shape))].clone())
    return memo


def without_values(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of the model, and inputs for it, of shape tensors."""
    return copy.deepcopy(model, tensors_of(model, {}, values=False)), tree_map_only(Tensor, lambda t: shape_like(t, tuple(t.shape)), inputs)
