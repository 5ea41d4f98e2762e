"""Tensors that have a shape and no values: what a trial of the user's code at other widths runs on.

Each wraps a tensor on PyTorch's ``meta`` device and says that it lies on the real one, so that code and kernels choose as they always do.
Ops that no such tensor goes into run as usual: what the code works out from numbers alone has its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")


class ShapeTensor(Tensor):
    """``meta`` holds shape, strides and dtype; ``device`` is where the tensor says that it is."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device) -> ShapeTensor:
        made: ShapeTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
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
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
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
