"""Tensors that have a shape and no values: what a trial of the user's code at other widths runs on.

Each wraps a tensor on PyTorch's ``meta`` device and says that it lies on the real one, so that code and kernels choose as they always do.
Ops that no such tensor goes into run as usual: what the code works out from numbers alone has its values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

META = torch.device("meta")
MEMO_SIZE = 20_000
_memo: dict[Any, Any] = {}  # (op, what it was called with) -> shapes, strides and dtypes of its results


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
        said: list[Any] = [func]

        def unwrap(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                bare = isinstance(leaf, ShapeTensor)
                meta = leaf.meta if isinstance(leaf, ShapeTensor) else leaf.detach().to(META)
                devices.extend([leaf.device] * bare)
                given[id(meta)] = leaf
                said.append((meta.shape, meta.stride(), meta.dtype))
                return meta
            said.append((type(leaf), leaf))
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

        args, kwargs = _mapped(unwrap, args), _mapped(unwrap, kwargs or {})
        key = (*said, len(args), *kwargs)
        return _mapped(wrap, _remembered(func, args, kwargs, key) if _is_functional(func) else func(*args, **kwargs))


@cache
def _is_functional(func: Any) -> bool:
    """Whether the op only makes new tensors: nothing written to, no views."""
    return all(r.alias_info is None for r in func._schema.returns) and not func._schema.is_mutable


def _remembered(func: Any, args: Any, kwargs: Any, key: Any) -> Any:
    """PyTorch works many shapes out in Python, slowly, and a model calls the same op with the same shapes again and again."""
    known = _memo.get(key)
    if known is not None:
        several, sizes = known
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in sizes]
        return tuple(made) if several else made[0]
    result = func(*args, **kwargs)
    several = isinstance(result, tuple)
    tensors = result if several else (result,)
    if len(_memo) < MEMO_SIZE and all(isinstance(t, Tensor) and t.storage_offset() == 0 for t in tensors):
        _memo[key] = several, [(t.shape, t.stride(), t.dtype) for t in tensors]
    return result


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
