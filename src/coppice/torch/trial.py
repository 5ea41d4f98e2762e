"""Trials: the user's code run at other widths, to see where it first disagrees with the plan.

On the tensors of ``coppice.torch.shapes``, which have shapes and no values; on real ones where the code looks at values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from coppice.axes import Axis, find
from coppice.coupling import Coupling
from coppice.graph import Op
from coppice.torch import shapes
from coppice.torch.apply import set_size
from coppice.torch.aten import Call, Ref, base_name, by_name, translate
from coppice.torch.capture import decisions_of, quiet_eval, record
from coppice.torch.lockstep import COPIES, VIEWS, Planned, Sizes, found_dims, inside, plannable, told_sizes
from coppice.torch.shapes import ShapeTensor, in_shapes, shape_like
from coppice.torch.tracking import run_aside, shows, tracking_modules
from coppice.torch.trees import PLAIN, copied, modules_of, named_tensors, tensors_in, without_collection


class _Stop(BaseException):
    """Ends a trial as soon as its answer is known; not an Exception, so that no ``except Exception`` of the user's code swallows it."""


class Trials:
    """Runs a recorded model on its inputs at any widths. ``steps`` are the dense recording's; ``at_rest``: where a mere rerun differs."""

    def __init__(self, coupling: Coupling) -> None:
        origin = coupling.graph.origin
        self.model, self.inputs, self.coupling = origin.ran, origin.inputs, coupling
        self.steps = plannable(coupling)
        self.decisions = decisions_of(coupling.graph)
        dims = {name: found_dims(coupling.dims[v.id]) for v in coupling.graph.weights() for name in v.names}
        own = {id(tensor): (tensor, name) for name, tensor in reversed(named_tensors(self.model).items())}
        self._weights = [(tensor, dims.get(name)) for tensor, name in own.values()]
        self._with_values: bool = origin.with_values  # else what is real may take other kernels than the recording
        self._fake = shapes.USED or not self._with_values

    @cached_property
    def at_rest(self) -> int | None:
        found = self.run({})
        if found is not None and self._fake and self._with_values:
            self._fake = False  # the code looks at values, or PyTorch takes other kernels on them: real ones, then
            found = self.run({})
        return found

    def run(self, widths: Mapping[Axis, int], until: int | None = None) -> int | None:
        """The first step at which the code disagrees with ``widths`` (or fails); None where all agree, as far as ``until``."""
        with without_collection():
            return self._watched(widths, until)[0]

    def agrees(self, widths: Mapping[Axis, int]) -> bool:
        """Whether the code runs every planned op, and no other, at ``widths``, on tensors without values."""
        with without_collection():
            answer, watch = self._watched(widths) if self._fake else (0, None)
        return answer is None and watch is not None and not watch.left_any

    def _watched(self, widths: Mapping[Axis, int], until: int | None = None) -> tuple[int | None, _Watch]:
        watch = _Watch(self.steps, widths, until)
        model, inputs = self._at(watch.sizes)
        finished = False
        with torch.random.fork_rng(devices=[]), suppress(_Stop):
            if self._fake and not self.decisions:
                finished = _follow(model, inputs, watch)
            else:
                finished = record(model, inputs, watch, self.decisions)[2] is None
        return watch.answer(finished), watch

    def trains(self, widths: Mapping[Axis, int]) -> bool:
        """Whether the code also runs in training mode at ``widths``."""
        model, inputs = self._at(Sizes(widths))
        with torch.random.fork_rng(devices=[]), quiet_eval(model, training=True):
            try:
                model(*inputs)
            except Exception:  # user code may raise anything at all
                return False
        return True

    def _at(self, sizes: Sizes) -> tuple[nn.Module, tuple[Any, ...]]:
        """A copy of the model with tensors of the trial's shapes and every bound attribute at its new size, and the inputs."""
        given = [(tensor, tuple(tensor.shape) if dims is None else sizes.shape(dims)) for tensor, dims in self._weights]
        model: nn.Module = copied(self.model, in_shapes(given, values=not self._fake))
        modules = dict(modules_of(model))
        for (path, attribute, index), axis in self.coupling.bindings.items():
            size: int | list[int] = sizes[find(axis)]
            if index is not None:
                several = list(getattr(modules[path], attribute))
                several[index] = size
                size = several
            set_size(modules[path], attribute, size)
        if self._fake:
            return model, tree_map_only(Tensor, lambda t: shape_like(t, tuple(t.shape)), self.inputs)
        return model, tree_map_only(Tensor, torch.clone, self.inputs)


class _Watch:
    """Follows a run, op by op, and stops it at the first that disagrees with the plan.

    A module may run other ops to the same end at other widths (PyTorch picks another attention kernel; ``einsum`` goes another way where a
    width is 1): its own ops are then left out, as long as all that follow agree again. At the dense widths nothing is left out.
    """

    def __init__(self, want: list[Planned], widths: Mapping[Axis, int], until: int | None) -> None:
        self.want, self.until, self.sizes = want, until, Sizes(widths)
        self.lenient, self.width_one = bool(widths), 1 in widths.values()
        self.agreed = 0
        self.detour: str | None = None  # the module whose ops are being left out
        self.left_at = 0  # where that began
        self.left_any = False
        self.reached = False

    def __call__(self, op: Op, results: list[Tensor]) -> None:
        self.see(base_name(op.call.func), op.module, results, lambda: told_sizes(op.attrs))

    def see(self, name: str, module: str, results: list[Tensor], told: Callable[[], tuple[int, ...]]) -> None:
        """An op has run in ``module``; ``told`` works out the sizes that it was told, which takes longer than the rest."""
        if name in COPIES:
            return
        if self.detour is not None:
            if inside(module, self.detour):
                return
            self.detour = None
        if self.agreed == len(self.want):
            raise _Stop
        want = self.want[self.agreed]
        if want.name != VIEWS.get(name, name):
            if not self._may_leave(module):
                raise _Stop
            self._leave(want.module)
            return
        if not self._fits(want, results, told):
            raise _Stop
        self.agreed += 1
        self.reached = self.until is not None and self.agreed > self.until
        if self.reached:
            raise _Stop

    def _fits(self, want: Planned, results: list[Tensor], told: Callable[[], tuple[int, ...]]) -> bool:
        count, sizes = len(want.dims), self.sizes
        if len(results) < count or (count > 1 and len(results) > count):
            return False
        for result, dims in zip(results, want.dims, strict=False):
            if result.shape != sizes.shape(dims):
                return False
        return not want.told or told() == want.told_at(sizes)

    def _may_leave(self, module: str) -> bool:
        expected = self.want[self.agreed].module
        return self.lenient and inside(module, expected) and (expected != "" or self.width_one)

    def _leave(self, module: str) -> None:
        self.detour, self.left_at, self.left_any = module, self.agreed, True
        while self.agreed < len(self.want) and inside(self.want[self.agreed].module, module):
            self.agreed += 1

    def answer(self, finished: bool) -> int | None:
        if self.reached or (finished and self.agreed == len(self.want)):
            return None
        return self.left_at if self.detour is not None else min(self.agreed, len(self.want) - 1)


class _Following(TorchDispatchMode):
    """Shows every op of a run without values to a watch, and keeps nothing."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = [""]
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not shows(func) and (result := run_aside(self, func, args, kwargs)) is not NotImplemented:
            return result
        result = ShapeTensor.__torch_dispatch__(func, types, args, kwargs) if ShapeTensor in types else func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else tensors_in(result)

        def told() -> tuple[int, ...]:
            return told_sizes(translate(func, Call(by_name(func, _refs(args), _refs(kwargs)), _refs(results)))[2])

        self._watch.see(base_name(func), self.stack[-1], results, told)
        return result


def _refs(tree: Any) -> Any:
    """``tree`` with a ref in the place of each tensor."""
    if isinstance(tree, Tensor):
        return Ref(0, tuple(tree.shape), tree.dtype in (torch.bool, torch.uint8))
    if isinstance(tree, (list, tuple)):
        return tree if PLAIN.issuperset(map(type, tree)) else [_refs(leaf) for leaf in tree]
    return {key: _refs(leaf) for key, leaf in tree.items()} if isinstance(tree, dict) else tree


def _follow(model: nn.Module, inputs: tuple[Any, ...], watch: _Watch) -> bool:
    """Whether ``model`` runs through on ``inputs``."""
    mode = _Following(watch)
    try:
        with quiet_eval(model), tracking_modules(model, mode.stack), mode:
            model(*inputs)
    except Exception:  # user code may raise anything at all
        return False
    return True
