"""Tensors that have a shape and no values: what the recording, and a trial of the user's code at other widths, run on.

Each wraps a tensor on PyTorch's ``meta`` device and says that it lies on the real one, so that code and kernels choose as they always do.
Ops that no such tensor goes into run as usual: what the code works out from numbers alone has its values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from coppice.torch.quick_shapes import leaves_as_is, quick_shapes
from coppice.torch.trees import copied, mapped, named_tensors

USED = True  # whether recordings and trials run on such tensors first
META = torch.device("meta")
MEMO_SIZE = 20_000
_memo: dict[Any, Any] = {}  # (op, what it was called with) -> shapes, strides and dtypes of its results


class ShapeTensor(Tensor):
    """``meta`` holds shape, strides and dtype, and is made when an op runs on it; ``device`` is where the tensor says that it is."""

    _meta: Tensor | None = None

    @staticmethod
    def of(meta: Tensor, device: torch.device) -> ShapeTensor:
        made: ShapeTensor = Tensor._make_wrapper_subclass(
            ShapeTensor, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=device
        )
        made._meta = meta
        return made

    @staticmethod
    def blank(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, requires_grad: bool = False) -> ShapeTensor:
        made: ShapeTensor = Tensor._make_wrapper_subclass(
            ShapeTensor, shape, strides=stride, dtype=dtype, device=device, requires_grad=requires_grad
        )
        return made

    @property
    def meta(self) -> Tensor:
        if self._meta is None:
            self._meta = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=META)
        return self._meta

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        key: list[Any] = [func]
        device, named = _write_down(args, key), _write_down(kwargs, key) if kwargs else None
        return _remembered(func, args, kwargs, tuple(key), device or named)


def _write_down(tree: Any, key: list[Any]) -> torch.device | None:
    """Add to ``key`` all that the shapes of an op's results depend on; answers the device of the first shape tensor."""
    device = None
    for leaf in tree.items() if isinstance(tree, dict) else tree:
        kind = leaf.__class__
        if kind is int or kind is str:
            key.append(leaf)
        elif isinstance(leaf, Tensor):
            key.append((leaf.shape, leaf.stride(), leaf.dtype))
            if device is None and isinstance(leaf, ShapeTensor):
                device = leaf.device
        elif isinstance(leaf, (tuple, list)):
            key.append((tuple, len(leaf)))
            device = _write_down(leaf, key) or device
        else:
            key.append((kind, leaf))  # 1, 1.0 and True are equal
    return device


def _run(func: Any, args: Any, kwargs: Any, device: torch.device | None) -> Any:
    """``func`` on the ``meta`` tensors of its operands."""
    given: dict[int, Tensor] = {}

    def unwrap(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            meta = leaf.meta if isinstance(leaf, ShapeTensor) else leaf.detach().to(META)
            given[id(meta)] = leaf
            return meta
        return META if isinstance(leaf, torch.device) else leaf

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        known = given.get(id(leaf))
        if known is None:
            return ShapeTensor.of(leaf, device)  # type: ignore[arg-type]
        if known.shape != leaf.shape:
            raise NotImplementedError(f"{func} changes a tensor's shape in place")
        return known

    return mapped(wrap, func(*mapped(unwrap, args), **mapped(unwrap, kwargs)))


@cache
def _is_functional(func: Any) -> bool:
    """Whether the op only makes new tensors: nothing written to, no views."""
    return all(r.alias_info is None for r in func._schema.returns) and not func._schema.is_mutable


@cache
def _is_in_place(func: Any) -> bool:
    """Whether the op answers its first operand, written to."""
    name, returns = func._schema.name, func._schema.returns
    return name.endswith("_") and len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write


def _remembered(func: Any, args: Any, kwargs: Any, key: Any, device: torch.device | None) -> Any:
    """PyTorch works many shapes out in Python, slowly, and a model calls the same op with the same shapes again and again."""
    known = _memo.get(key)
    if known is not None:
        return args[0] if known[1] is None else _made(known, device)  # type: ignore[arg-type]
    if _is_in_place(func) and leaves_as_is(func, args):
        return args[0]
    if _is_functional(func) and device is not None and (quick := quick_shapes(func, args, kwargs)) is not None:
        known = len(quick) > 1, [(shape, _contiguous(shape), dtype) for shape, dtype in quick]
        if len(_memo) < MEMO_SIZE:
            _memo[key] = known
        return _made(known, device)
    result = _run(func, args, kwargs, device)
    if len(_memo) >= MEMO_SIZE:
        return result
    if _is_functional(func):
        several = isinstance(result, tuple)
        tensors = result if several else (result,)
        if all(isinstance(t, ShapeTensor) and t.storage_offset() == 0 for t in tensors):
            _memo[key] = several, [(t.shape, t.stride(), t.dtype) for t in tensors]
    elif _is_in_place(func) and result is args[0] and (result.shape, result.stride(), result.dtype) == key[1]:
        _memo[key] = False, None
    return result


def _made(known: tuple[bool, list[Any]], device: torch.device) -> Any:
    """New tensors as it was written down that they are."""
    several, sizes = known
    made = [ShapeTensor.blank(shape, stride, dtype, device) for shape, stride, dtype in sizes]
    return tuple(made) if several else made[0]


def shape_like(tensor: Tensor, shape: tuple[int, ...]) -> ShapeTensor:
    """A tensor of ``shape``, otherwise like ``tensor``."""
    made = ShapeTensor.blank(shape, _contiguous(shape), tensor.dtype, tensor.device, tensor.requires_grad)
    if isinstance(tensor, nn.Parameter):
        made._is_param = True  # what makes a subclass's instance a parameter
    return made


@lru_cache(MEMO_SIZE)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([math.prod(max(1, n) for n in shape[k + 1 :]) for k in range(len(shape))])


def like(tensor: Tensor, new: Tensor) -> Tensor:
    """``new`` as a parameter if ``tensor`` is one; PyTorch's choice of matmul kernel depends on ``requires_grad``."""
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def in_shapes(shapes: Iterable[tuple[Tensor, tuple[int, ...]]], values: bool) -> dict[int, Any]:
    """A parameter or buffer of the given shape for each of a model's, by the id of that, as ``deepcopy`` wants it.

    Without ``values`` floating ones are shape tensors; whole numbers are mostly indices, at which code may look.
    """
    memo: dict[int, Any] = {}
    for tensor, shape in shapes:
        if values or not tensor.is_floating_point():
            whole = tensor.detach()
            memo[id(tensor)] = like(tensor, (whole if whole.shape == shape else whole[tuple(map(slice, shape))]).clone())
        else:
            memo[id(tensor)] = shape_like(tensor, shape)
    return memo


def without_values(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of the model, and inputs for it, of shape tensors."""
    own = {id(tensor): tensor for tensor in named_tensors(model).values()}
    return copied(model, in_shapes([(t, tuple(t.shape)) for t in own.values()], values=False)), tree_map_only(
        Tensor, lambda t: shape_like(t, tuple(t.shape)), inputs
    )
