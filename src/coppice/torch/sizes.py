"""Sizes that the user's code holds: find the attributes that hold a width, and the widths that the code ties together or freezes.

The axes say what a plan may do; the user's Python code must agree, since the pruned model stays the user's own class. So the code is tried:
the model with every axis cut to an arbitrary width is run on fake tensors, in lockstep with the plan. Where it first disagrees,
in this order:

1. an attribute of the module that runs there (or of one around it) that holds an old size is bound to the axis;
2. axes are tied, so that their widths stay in proportion, as in ``head_dim = embed_dim // num_heads``, or a ``chunk`` in halves;
3. the axes of that op are pinned: their size is frozen in the code.

A step is taken only if the run then gets further, and goes for every module of the same class. Runs on fake tensors cost milliseconds.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from coppice.axes import Axis, Form, atoms, factors, find, pin, product_of
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.graph import Kind
from coppice.torch.apply import set_size
from coppice.torch.capture import record
from coppice.torch.known import bind_known_modules
from coppice.torch.lockstep import Step, first_difference, planned_shapes, steps

ROUNDS = 3  # trials with different widths after the last change, so that no agreement is a coincidence


def bind_sizes(model: nn.Module, inputs: tuple[Any, ...], coupling: Coupling) -> None:
    """Fill ``coupling.bindings`` and ``coupling.ties``, and pin what the code freezes."""
    bind_known_modules(model, coupling)
    search = _Search(model, inputs, coupling)
    seed = agreed = 0
    while agreed < ROUNDS:
        at = search.trial(seed)
        if at is None:
            seed, agreed = seed + 1, agreed + 1
            continue
        agreed = 0
        search.resolve(at, seed)
    coupling.refresh()


class _Search:
    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], coupling: Coupling) -> None:
        self.model, self.inputs, self.coupling = model, inputs, coupling
        graph = coupling.graph
        self.dense = steps(graph.ops, [v.shape for v in graph.values])
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.by_module: dict[str, list[int]] = {}
        for k, op in enumerate(graph.ops):
            self.by_module.setdefault(op.module, []).append(k)
        self.fake = True
        if self._run({}) is not None:
            self.fake = False  # the model looks at values, or takes other kernels on fake tensors
        if not self.fake and (at := self._run({})) is not None:
            self._pin_everything(at)

    # -- trials -----------------------------------------------------------------------------------------------

    def trial(self, seed: int) -> int | None:
        """The step at which the code disagrees with arbitrary widths drawn from ``seed``; None where it runs through."""
        return self._run(self.widths(seed))

    def widths(self, seed: int) -> dict[Axis, int]:
        """Some eighths of every axis where its size allows: code that divides a width (by heads, by groups) often asserts that it can."""
        rng = random.Random(seed)
        chosen: dict[Axis, int] = {}
        for bundle in self.coupling.bundles():
            unit = math.gcd(*(a.size for a in bundle))
            levels = 8 if unit % 8 == 0 else 4 if unit % 4 == 0 else unit
            part = rng.randint(max(1, levels // 3), max(1, levels - 1))
            chosen.update({a: a.size // levels * part for a in bundle})
        return chosen

    def _run(self, widths: dict[Axis, int]) -> int | None:
        shapes = planned_shapes(self.coupling, widths)
        want = [Step(s.index, s.name, tuple(shapes[v] for v in self.coupling.graph.ops[s.index].outputs[:1])) for s in self.dense]
        with FakeTensorMode(allow_non_fake_inputs=True) if self.fake else torch.random.fork_rng(devices=[]):
            model, inputs = self._shrunk(shapes, widths)
            recorder, _, error = record(model, inputs)
        have = steps(recorder.ops, [v.shape for v in recorder.values])
        return first_difference(want, have, error is None)

    def _shrunk(self, shapes: list[tuple[int, ...]], widths: dict[Axis, int]) -> tuple[nn.Module, tuple[Any, ...]]:
        """The model at the trial's shapes, holding no values."""
        memo: dict[int, Any] = {}
        by_name = {name: shapes[v.id] for v in self.coupling.graph.weights() for name in v.names}
        for named in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                if id(tensor) in memo:
                    continue
                shape = by_name[name]
                if self.fake:
                    new = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                else:
                    new = tensor.detach()[tuple(slice(0, n) for n in shape)].clone()
                memo[id(tensor)] = nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new
        model = copy.deepcopy(self.model, memo)
        for (path, attribute, index), axis in self.coupling.bindings.items():
            module = model.get_submodule(path)
            size = width(axis, widths)
            if index is not None:
                sizes = list(getattr(module, attribute))
                sizes[index] = size
                set_size(module, attribute, sizes)
            else:
                set_size(module, attribute, size)
        inputs = self.inputs
        if self.fake:
            inputs = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=t.device), inputs)
        return model, inputs

    # -- resolving a disagreement -----------------------------------------------------------------------------------

    def resolve(self, at: int, seed: int) -> None:
        """Bind, tie or pin, so that the code gets past step ``at``."""
        k = self.dense[at].index
        widths = self.widths(seed)
        for step in (self._bind_attribute, self._tie):
            if step(k, at, seed, widths):
                return
        self._pin(k, widths)

    def _gets_further(self, at: int, seed: int) -> bool:
        after = self.trial(seed)
        return after is None or after > at

    def _changed(self, axis: Axis, widths: dict[Axis, int]) -> bool:
        return width(axis, widths) != find(axis).size

    def sized(self, k: int) -> list[Axis]:
        """Every axis that op ``k`` could be told the size of: its results' dims, its operands' dims, their parts, its letters."""
        op = self.coupling.graph.ops[k]
        dims = [a for v in (*op.outputs, *op.inputs) if v is not None for a in self.coupling.dims[v]]
        return [part for axis in (*self.coupling.ops[k].letters.values(), *dims) for part in _within(axis)]

    def _around(self, path: str) -> Iterator[str]:
        """The module and those around it, innermost first."""
        yield path
        while path:
            path = path.rpartition(".")[0]
            yield path

    def _bind_attribute(self, k: int, at: int, seed: int, widths: dict[Axis, int]) -> bool:
        sized = self.sized(k)
        first = {find(a): i for i, a in reversed(list(enumerate(sized)))}
        changed = [(i, a.size) for a, i in first.items() if self._changed(a, widths)]
        for path in self._around(self.coupling.graph.ops[k].module):
            candidates = list(self._candidates(path, changed))
            singles = [[c] for c in candidates]
            for chosen in [*singles, candidates] if len(candidates) > 1 else singles:
                before = dict(self.coupling.bindings)
                self._bind_like(path, k, chosen)
                if self._gets_further(at, seed):
                    return True
                self.coupling.bindings.clear()
                self.coupling.bindings.update(before)
        return False

    def _candidates(self, path: str, changed: list[tuple[int, int]]) -> Iterator[tuple[str, int | None, int]]:
        module = self.modules[path]
        for attribute, value in vars(module).items():
            held = [(None, value)] if type(value) is int else list(enumerate(value)) if isinstance(value, (tuple, list)) else []
            for index, number in held:
                if (path, attribute, index) not in self.coupling.bindings and type(number) is int:
                    yield from ((attribute, index, position) for position, size in changed if number == size)

    def _bind_like(self, path: str, k: int, chosen: list[tuple[str, int | None, int]]) -> None:
        """Bind the chosen attributes here and, where they hold the old size too, in every module of the same class."""
        for other, op in self._alike(path, k):
            sized = self.sized(op)
            for attribute, index, position in chosen:
                value = getattr(self.modules[other], attribute, None)
                number = value if index is None else value[index] if isinstance(value, (tuple, list)) and len(value) > index else None
                if position < len(sized) and number == find(sized[position]).size:
                    self.coupling.bindings[other, attribute, index] = sized[position]
                    if index is not None:
                        self.coupling.sequences[other, attribute] = tuple(value)  # type: ignore[arg-type]

    def _alike(self, path: str, k: int) -> Iterator[tuple[str, int]]:
        """``(path, op)`` first, then the same op in every other module of the class of the module at ``path``."""
        yield path, k
        op = self.coupling.graph.ops[k]
        suffix = op.module[len(path) :]
        ordinal = self.by_module[op.module].index(k)
        for other, module in self.modules.items():
            if other != path and type(module) is type(self.modules[path]) and path:
                there = self.by_module.get(other + suffix, [])
                if ordinal < len(there) and self.coupling.graph.ops[there[ordinal]].rule == op.rule:
                    yield other, there[ordinal]

    def _tie(self, k: int, at: int, seed: int, widths: dict[Axis, int]) -> bool:
        for choice in self._tie_choices(k, widths):
            if self._try_tie([choice(op) for _, op in self._alike(self.coupling.graph.ops[k].module, k)], at, seed):
                return True
        return False

    def _tie_choices(self, k: int, widths: dict[Axis, int]) -> Iterator[Callable[[int], list[Axis]]]:
        """What might be in proportion at op ``k``, each as a function that names the same axes at the like op of another module."""
        if self.coupling.graph.ops[k].rule == "take_apart":
            yield self._pieces
        own, read = self._own(k), self._entering(k)
        for i, mine in enumerate(own):
            for j, theirs in enumerate(read):
                if theirs is not mine and theirs.size == mine.size and self._changed(theirs, widths):
                    yield partial(self._pair, i, j)

    def _pieces(self, k: int) -> list[Axis]:
        op = self.coupling.graph.ops[k]
        return [self.coupling.dims[v][op.attrs["dim"]] for v in op.outputs]

    def _pair(self, i: int, j: int, k: int) -> list[Axis]:
        own, read = self._own(k), self._entering(k)
        fits = i < len(own) and j < len(read) and own[i].size == read[j].size
        return [read[j], own[i]] if fits else []

    def _own(self, k: int) -> list[Axis]:
        return list(dict.fromkeys(run for a in self.sized(k) for run in _runs(a)))

    def _entering(self, k: int) -> list[Axis]:
        """The axes of what the module that runs op ``k`` has read so far, which its code can take a size from."""
        path = self.coupling.graph.ops[k].module
        before = [i for i in self.by_module[path] if i <= k]
        inside = [i for i, o in enumerate(self.coupling.graph.ops[:k]) if o.module == path or o.module.startswith(path + ".") or not path]
        values = [v for i in {*before, *inside[:4], k} for v in self.coupling.graph.ops[i].inputs if v is not None]
        activations = [v for v in values if self.coupling.graph.values[v].kind is Kind.INTERMEDIATE]
        return list(dict.fromkeys(find(a) for v in activations for a in self.coupling.dims[v]))

    def _try_tie(self, sets: list[list[Axis]], at: int, seed: int) -> bool:
        """Tie every set of axes that can be; keep it so if the code gets further."""
        ties, pinned = len(self.coupling.ties), []
        for axes in sets:
            free = [_free(a) for a in axes]
            moving = tuple(dict.fromkeys(a for f in free if f for a in f[0]))
            still = [a for f in free if f for a in f[1]]
            if None in free or len(moving) < 2 or set(moving) & set(still):
                continue
            for a in still:
                pinned.append((a, a.pinned))
                pin(a, "the code works its size out from other widths")
            self.coupling.ties.append(moving)
        if len(self.coupling.ties) > ties and self._gets_further(at, seed):
            return True
        del self.coupling.ties[ties:]
        for a, reason in pinned[::-1]:
            a.pinned = reason
        return False

    def _pin(self, k: int, widths: dict[Axis, int]) -> None:
        op = self.coupling.graph.ops[k]
        where = type(self.modules[op.module]).__name__
        pinned = False
        for _, other in self._alike(op.module, k):
            told = [a for v in self.coupling.graph.ops[other].outputs for a in self.coupling.dims[v]]
            for axes in ([*told, *self.coupling.ops[other].letters.values()], self.sized(other)):
                changed = {atom for axis in axes for atom in atoms(axis) if self._changed(atom, widths)}
                for atom in changed:
                    pin(atom, f"its size is frozen in the code of {where}")
                pinned = pinned or bool(changed)
                if changed:
                    break
        if not pinned:
            self._pin_everything(next(i for i, s in enumerate(self.dense) if s.index == k))

    def _pin_everything(self, at: int) -> None:
        op = self.coupling.graph.ops[self.dense[at].index]
        for axis in self.coupling.prunable:
            pin(axis.atom, f"the code does not run the same ops twice (first at {op.name} in {op.module or 'the model'})")
        self.coupling.refresh()


def _within(axis: Axis) -> Iterator[Axis]:
    """``axis`` and everything below it."""
    axis = find(axis)
    yield axis
    for part in axis.parts:
        yield from _within(part)


def _runs(axis: Axis) -> Iterator[Axis]:
    """``axis``, and where it is a product every run of neighbouring factors (heads x head dim of a fused q, k, v)."""
    axis = find(axis)
    yield axis
    if axis.form is Form.PRODUCT:
        parts = factors(axis)
        for start in range(len(parts)):
            for stop in range(start + 2, len(parts) + (start > 0)):
                yield product_of(parts[start:stop])


def _free(axis: Axis) -> tuple[list[Axis], list[Axis]] | None:
    """The atoms that must move in proportion for ``axis`` to scale, and those that must stand still; None where it can't scale."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        return None if axis.pinned else ([axis], [])
    if axis.form is Form.SUM:
        parts = [_free(p) for p in axis.parts]
        if any(p is None for p in parts):
            return None
        return [a for p in parts if p for a in p[0]], [a for p in parts if p for a in p[1]]
    loose = [(find(p).size, k) for k, p in enumerate(axis.parts) if _free(p) is not None]
    if not loose:
        return None
    moving = _free(axis.parts[max(loose)[1]])
    assert moving is not None
    still = [a for k, p in enumerate(axis.parts) if k != max(loose)[1] for a in atoms(p) if not a.pinned]
    return moving[0], [*moving[1], *still]
