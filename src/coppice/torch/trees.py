"""Nested arguments of ops (tuples, lists, dicts); module trees, their tensors and copies. At every op and trial, so written to be fast."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = {int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, type, type(len), type(copy.copy)}
_OWN = nn.Module().__dict__.keys()  # PyTorch's own containers of a module, which are mostly empty, and nobody else's
_COPIED_OTHERWISE = ("__new__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")


@contextmanager
def without_collection() -> Iterator[None]:
    """No search for cyclic garbage meanwhile: among the objects that PyTorch alone brings it takes longer than a whole trial."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its paths, as ``named_modules(remove_duplicate=False)``, whose nested generators take longer."""
    found: list[tuple[str, nn.Module]] = []
    _visit("", model, found)
    return found


def _visit(path: str, module: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    """Add ``module`` and all in it. No closure: one that calls itself is a cycle, which keeps a whole model alive."""
    found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _visit(f"{path}.{name}" if path else name, child, found)


def hears_of_its_mode(modules: list[tuple[str, nn.Module]]) -> bool:
    """Whether code runs when the mode is set: what is worked out from weights and kept in evaluation is dropped there."""
    return any(type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval for _, m in modules)


def parameters_of(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """The parameters of all of ``modules``, under each of their names."""
    return [named for path, module in modules if module._parameters for named in _named(path, module._parameters)]


def buffers_of(modules: list[tuple[str, nn.Module]]) -> list[tuple[str, Tensor]]:
    """The buffers of all of ``modules``, under each of their names."""
    return [named for path, module in modules if module._buffers for named in _named(path, module._buffers)]


def _named(path: str, own: Mapping[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(f"{path}.{name}" if path else name, tensor) for name, tensor in own.items() if tensor is not None]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names."""
    modules = modules_of(model)
    return dict(parameters_of(modules) + buffers_of(modules))


def mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``change`` applied to every leaf; a tuple of any kind comes back as a plain one."""
    if isinstance(tree, tuple):
        return tuple([mapped(change, leaf) for leaf in tree])
    if isinstance(tree, list):
        return [mapped(change, leaf) for leaf in tree]
    if isinstance(tree, dict):
        return {key: mapped(change, leaf) for key, leaf in tree.items()}
    return change(tree)


def mapped_only(kind: Any, change: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``change`` applied to every leaf of the given kind."""
    return mapped(lambda leaf: change(leaf) if isinstance(leaf, kind) else leaf, tree)


def leaves(kind: type | tuple[type, ...], tree: Any) -> list[Any]:
    """Every leaf of ``tree`` of the given kind, in order."""
    if isinstance(tree, kind):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [found for leaf in tree for found in leaves(kind, leaf)]
    return [found for leaf in tree.values() for found in leaves(kind, leaf)] if isinstance(tree, dict) else []


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(value, memo)``, fast for module trees: only what is no module, container or number goes through ``deepcopy``."""
    kind = type(value)
    if kind in PLAIN:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    made: Any
    if kind in (dict, OrderedDict):
        memo[id(value)] = made = kind()
        for key, item in value.items():
            if type(item) not in PLAIN:
                there = memo.get(id(item))  # of most, before a call
                item = copied(item, memo) if there is None else there
            made[key if type(key) in PLAIN else copied(key, memo)] = item
    elif kind is tuple and PLAIN.issuperset(map(type, value)):
        made = value
    elif kind is set and PLAIN.issuperset(map(type, value)):
        memo[id(value)] = made = set(value)
    elif kind is list:
        memo[id(value)] = made = []
        made.extend(value if PLAIN.issuperset(map(type, value)) else [copied(item, memo) for item in value])
    elif isinstance(value, nn.Module) and _is_copied_by_state(kind):
        memo[id(value)] = made = object.__new__(kind)
        state = value.__getstate__()
        for key, item in state.items():
            own = type(item)
            if own not in PLAIN:
                state[key] = own() if key in _OWN and not item else copied(item, memo)
        if kind.__setstate__ is nn.Module.__setstate__:
            object.__setattr__(made, "__dict__", state)  # past the module's own, which looks for parameters
        else:
            made.__setstate__(state)
    else:
        made = copy.deepcopy(value, memo)
    return made


_by_state: dict[type, bool] = {}


def _is_copied_by_state(kind: type) -> bool:
    """Whether ``deepcopy`` copies such a module by its ``__dict__`` and nothing else."""
    found = _by_state.get(kind)
    if found is None:
        same = all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in _COPIED_OTHERWISE)
        slots = any(getattr(base, "__slots__", ()) for base in kind.__mro__)
        found = _by_state[kind] = same and not slots
    return found


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of ``tree``, in order."""
    return leaves(Tensor, tree)
