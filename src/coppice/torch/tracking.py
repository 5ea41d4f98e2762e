"""What all that watch a forward pass op by op share: which calls they write down, and which module is running."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from coppice.torch.aten import is_made_of_others
from coppice.torch.trees import modules_of

if TYPE_CHECKING:
    from coppice.torch.capture import Recorder

# Ops that neither compute nor move anything worth a line in the graph.
IGNORED = {
    "aten::_assert_async",
    "aten::record_stream",
    "aten::is_pinned",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
}


def says_nothing(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op neither computes nor moves anything; ``as_strided_`` to the same shape only normalises strides."""
    silent = _is_silent(func)
    return silent if silent is not None else tuple(args[1]) == tuple(args[0].shape)


@cache
def shows(func: Any) -> bool:
    """Whether every call of ``func`` is written down as it is."""
    return _is_silent(func) is False and not is_made_of_others(func)


@cache
def _is_silent(func: Any) -> bool | None:
    """Whether every call of ``func`` says nothing; None where that depends on the call."""
    name = func._schema.name
    return None if name == "aten::as_strided_" else name in IGNORED or name.startswith("prim::")


def run_aside(mode: TorchDispatchMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call that is not written down as it is: it says nothing, or other ops make it up. NotImplemented where it is."""
    if says_nothing(func, args):
        return func(*args, **kwargs)
    if is_made_of_others(func):
        with mode:
            return func.decompose(*args, **kwargs)
    return NotImplemented


@contextmanager
def tracking_modules(model: nn.Module, stack: list[str], recorder: Recorder | None = None) -> Iterator[None]:
    """Keep the path of the module that is running on top of ``stack``; ``recorder`` is told of every call of one.

    By an attribute of each module that its call looks up, since PyTorch's hooks for all modules take longer than many a module.
    """
    paths = {id(module): (path, module) for path, module in reversed(modules_of(model))}
    compiled = [(module, module._compiled_call_impl) for _, module in paths.values() if module._compiled_call_impl is not None]
    for path, module in paths.values():
        module.__dict__["_call_impl"] = _Tracked(module, path, stack, recorder)
    for module, _ in compiled:  # would be called instead
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for _, module in paths.values():
            module.__dict__.pop("_call_impl", None)
        for module, call in compiled:
            module._compiled_call_impl = call


class _Tracked:
    """The call of a module whose path is kept."""

    __slots__ = ("_module", "_path", "_recorder", "_stack")

    def __init__(self, module: nn.Module, path: str, stack: list[str], recorder: Recorder | None) -> None:
        self._module, self._path, self._stack, self._recorder = module, path, stack, recorder

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        module, recorder = self._module, self._recorder
        first = len(recorder.ops) if recorder is not None else 0
        self._stack.append(self._path)
        output = None
        try:
            output = type(module)._call_impl(module, *args, **kwargs)
            return output
        finally:
            self._stack.pop()
            if recorder is not None:
                recorder.note_call(self._path, args, output, first)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Of a copy that the user's code makes of a module, nothing is kept."""
        module = copy.deepcopy(self._module, memo)
        return partial(type(module)._call_impl, module)
