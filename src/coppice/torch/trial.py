"""Trials: the user's code run at other widths, to see where it first disagrees with the plan.

On real tensors where a forward pass is cheap; else on fake ones, which have shapes and no values, at about half a millisecond an op.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from coppice.axes import Axis
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.graph import Op
from coppice.torch.apply import set_size
from coppice.torch.capture import record
from coppice.torch.lockstep import planned, planned_shapes, step

CHEAP = 500_000_000  # MACs of a forward pass that takes no longer than one on fake tensors


class _Stop(BaseException):
    """Ends a trial as soon as its answer is known; not an Exception, so that no ``except Exception`` of the user's code swallows it."""


class Trials:
    """Runs ``model`` on ``inputs`` at any widths. ``steps`` are the dense recording's; ``at_rest``: where a mere rerun differs."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], coupling: Coupling) -> None:
        self.model, self.inputs, self.coupling = model, inputs, coupling
        self.steps = planned(coupling, {})
        self._fake = coupling.cost().macs * coupling.graph.batch > CHEAP
        self.at_rest = self.run({})
        if self.at_rest is not None and self._fake:
            self._fake = False  # the code looks at values, or PyTorch takes other kernels on fake tensors: real ones, then
            self.at_rest = self.run({})

    def run(self, widths: Mapping[Axis, int], until: int | None = None) -> int | None:
        """The first step at which the code disagrees with ``widths`` (or fails); None where all agree, as far as ``until``.

        Where a width is 1, code may run other ops to the same end (``einsum`` does): then it is enough that it runs through.
        """
        shapes, want = planned_shapes(self.coupling, widths), planned(self.coupling, widths)
        agreed = 0
        may_detour, detour = 1 in widths.values(), False

        def compare(op: Op, results: list[Tensor]) -> None:
            nonlocal agreed, detour
            have = step(agreed, op, [tuple(t.shape) for t in results])
            if have is None or detour:
                return
            if may_detour and agreed < len(want) and want[agreed].name != have.name:
                detour = True
                return
            if agreed == len(want) or not want[agreed].agrees(have):
                raise _Stop
            agreed += 1
            if until is not None and agreed > until:
                raise _Stop

        finished = False
        with _no_values() if self._fake else torch.random.fork_rng(devices=[]):
            model, inputs = self._shrunk(shapes, widths)
            with suppress(_Stop):
                finished = record(model, inputs, compare)[2] is None
        if (finished and (detour or agreed == len(want))) or (until is not None and agreed > until):
            return None
        return min(agreed, len(want) - 1)

    def _shrunk(self, shapes: list[tuple[int, ...]], widths: Mapping[Axis, int]) -> tuple[nn.Module, tuple[Any, ...]]:
        """A copy of the model with tensors of the trial's shapes, and every bound attribute at its new size."""
        memo: dict[int, Any] = {}
        by_name = {name: shapes[v.id] for v in self.coupling.graph.weights() for name in v.names}
        for named in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if id(tensor) in memo:
                    continue
                shape = by_name[name]
                if self._fake:
                    new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                else:
                    new = tensor.detach()[tuple(slice(0, n) for n in shape)].clone()
                memo[id(tensor)] = _like(tensor, new)
        model = copy.deepcopy(self.model, memo)
        for (path, attribute, index), axis in self.coupling.bindings.items():
            module = model.get_submodule(path)
            size: int | list[int] = width(axis, widths)
            if index is not None:
                sizes = list(getattr(module, attribute))
                sizes[index] = size
                size = sizes
            set_size(module, attribute, size)
        if self._fake:
            return model, tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device), self.inputs)
        return model, tree_map_only(Tensor, torch.clone, self.inputs)


def _like(tensor: Tensor, new: Tensor) -> Tensor:
    """``new`` as a parameter if ``tensor`` is one; PyTorch's choice of matmul kernel depends on ``requires_grad``."""
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


@contextmanager
def _no_values() -> Iterator[None]:
    """Fake tensors; PyTorch logs an error for every op that refuses its shapes, which here is an answer like any other."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = disabled
