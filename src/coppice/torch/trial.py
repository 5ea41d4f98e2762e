"""Trials: the user's code run at other widths, to see where it first disagrees with the plan.

On real tensors where a forward pass is cheap; else on those of ``coppice.torch.shapes``, which have shapes and no values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from coppice.axes import Axis
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.graph import Op
from coppice.torch.apply import set_size
from coppice.torch.capture import decisions_of, record
from coppice.torch.lockstep import inside, planned, planned_shapes, step
from coppice.torch.shapes import shape_like, tensors_of

CHEAP = 3_000_000  # MACs that take as long as an op on fake tensors


class _Stop(BaseException):
    """Ends a trial as soon as its answer is known; not an Exception, so that no ``except Exception`` of the user's code swallows it."""


class Trials:
    """Runs ``model`` on ``inputs`` at any widths. ``steps`` are the dense recording's; ``at_rest``: where a mere rerun differs."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], coupling: Coupling) -> None:
        self.model, self.inputs, self.coupling = model, inputs, coupling
        self.steps = planned(coupling, {})
        self.decisions = decisions_of(coupling.graph)
        self._fake = coupling.cost().macs * coupling.graph.batch > CHEAP * len(coupling.graph.ops)
        self.at_rest = self.run({})
        if self.at_rest is not None and self._fake:
            self._fake = False  # the code looks at values, or PyTorch takes other kernels on them: real ones, then
            self.at_rest = self.run({})

    def run(self, widths: Mapping[Axis, int], until: int | None = None) -> int | None:
        """The first step at which the code disagrees with ``widths`` (or fails); None where all agree, as far as ``until``."""
        shapes = planned_shapes(self.coupling, widths)
        watch = _Watch(self.coupling, widths, until, shapes)
        finished = False
        memo, inputs = self._tensors(shapes)
        model = self._shrunk(memo, widths)
        with torch.random.fork_rng(devices=[]), suppress(_Stop):
            finished = record(model, inputs, watch, self.decisions)[2] is None
        return watch.answer(finished)

    def trains(self, widths: Mapping[Axis, int]) -> bool:
        """Whether the code also runs in training mode at ``widths``."""
        memo, inputs = self._tensors(planned_shapes(self.coupling, widths))
        with torch.random.fork_rng(devices=[]):
            return record(self._shrunk(memo, widths), inputs, training=True)[2] is None

    def _tensors(self, shapes: list[tuple[int, ...]]) -> tuple[dict[int, Any], tuple[Any, ...]]:
        """Parameters and buffers of the trial's shapes (by the id of the model's own, as ``deepcopy`` wants them), and the inputs."""
        by_name = {name: shapes[v.id] for v in self.coupling.graph.weights() for name in v.names}
        memo = tensors_of(self.model, by_name, values=not self._fake)
        if self._fake:
            return memo, tree_map_only(Tensor, lambda t: shape_like(t, tuple(t.shape)), self.inputs)
        return memo, tree_map_only(Tensor, torch.clone, self.inputs)

    def _shrunk(self, memo: dict[int, Any], widths: Mapping[Axis, int]) -> nn.Module:
        """A copy of the model with the tensors of ``memo``, and every bound attribute at its new size."""
        model = copy.deepcopy(self.model, memo)
        for (path, attribute, index), axis in self.coupling.bindings.items():
            module = model.get_submodule(path)
            size: int | list[int] = width(axis, widths)
            if index is not None:
                sizes = list(getattr(module, attribute))
                sizes[index] = size
                size = sizes
            set_size(module, attribute, size)
        return model


class _Watch:
    """Follows a run, op by op, and stops it at the first that disagrees with the plan.

    A module may run other ops to the same end at other widths (PyTorch picks another attention kernel; ``einsum`` goes another way where a
    width is 1): its own ops are then left out, as long as all that follow agree again. At the dense widths nothing is left out.
    """

    def __init__(self, coupling: Coupling, widths: Mapping[Axis, int], until: int | None, shapes: list[tuple[int, ...]]) -> None:
        self.want, self.until = planned(coupling, widths, shapes), until
        self.modules = [coupling.graph.ops[s.index].module for s in self.want]
        self.lenient, self.width_one = bool(widths), 1 in widths.values()
        self.agreed = 0
        self.detour: str | None = None  # the module whose ops are being left out
        self.left_at = 0  # where that began
        self.reached = False

    def __call__(self, op: Op, results: list[Tensor]) -> None:
        have = step(0, op, [tuple(t.shape) for t in results])
        if have is None:
            return
        if self.detour is not None:
            if inside(op.module, self.detour):
                return
            self.detour = None
        if self.agreed == len(self.want):
            raise _Stop
        want = self.want[self.agreed]
        if want.name != have.name and self._may_leave(op.module):
            self._leave(self.modules[self.agreed])
            return
        if not want.agrees(have):
            raise _Stop
        self.agreed += 1
        self.reached = self.until is not None and self.agreed > self.until
        if self.reached:
            raise _Stop

    def _may_leave(self, module: str) -> bool:
        expected = self.modules[self.agreed]
        return self.lenient and inside(module, expected) and (expected != "" or self.width_one)

    def _leave(self, module: str) -> None:
        self.detour, self.left_at = module, self.agreed
        while self.agreed < len(self.want) and inside(self.modules[self.agreed], module):
            self.agreed += 1

    def answer(self, finished: bool) -> int | None:
        if self.reached or (finished and self.agreed == len(self.want)):
            return None
        return self.left_at if self.detour is not None else min(self.agreed, len(self.want) - 1)
