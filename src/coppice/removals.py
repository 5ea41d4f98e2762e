"""What can be said of a module that can go: what it computes, what goes with it, and how the user's class does without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coppice.axes import Axis, find
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.flow import Source

PRODUCTS = ("conv", "pointwise_conv", "conv_transpose", "mm", "bmm", "attention", "lstm")  # rules of what is worth removing


@dataclass(frozen=True, slots=True)
class Edit:
    """The module at ``path`` becomes another: ``becomes`` names it (``coppice.torch.stand_ins``), ``options`` is plain data."""

    path: str
    becomes: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Composed:
    """A layer composed of those of ops ``first`` and ``second``, by its sizes (``inputs`` and ``outputs`` a group)."""

    first: int
    second: int
    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Removable:
    """A module that can go. ``kind``: a word of ``KINDS``; ``dead``: the ops that go, ``at`` where they begin.

    ``macs`` of one sample and ``params`` are what the removal saves (less than nothing: what it costs). ``emptied``: the axes that go as a
    whole; ``attributes``: what other modules are set to; ``strides``: those of convolutions that take one over, by op. ``composed``: the
    layer that two become. Candidates of disjoint ``span`` (first op and the one after the last) don't clash.
    """

    name: str
    kind: str
    substitutes: Mapping[int, Source]
    dead: frozenset[int]
    edits: tuple[Edit, ...]
    macs: int
    params: int
    at: int
    emptied: tuple[Axis, ...] = ()
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strides: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    composed: Composed | None = None
    span: tuple[int, int] = (0, 0)


KINDS = {
    "residual": "a branch beside a shortcut, which stays",
    "attention": "the attention half of a transformer block",
    "mlp": "the MLP half of a transformer block",
    "layer": "layers that give what they are given, in shape",
    "branch": "a branch that ends in a concat, with the columns that read it",
    "pool": "a pooling layer: a convolution takes over its stride, or what follows takes any size",
    "merge": "two layers in a row as one, without the activation between them, or a layer and its shortcut as one",
    "gate": "a gate that multiplies a tensor, such as squeeze-and-excitation",
}


def clash(one: Removable, other: Removable) -> str | None:
    """Why two candidates can't both go; None where they can."""
    paths = [[*(edit.path for edit in c.edits), *c.attributes] for c in (one, other)]
    if any(a == b or a.startswith(b + ".") or b.startswith(a + ".") for a in paths[0] for b in paths[1]):
        return "one lies in the other"
    if one.substitutes.keys() & other.substitutes.keys() or not one.dead.isdisjoint(other.dead):
        return "they share some of what goes"
    return None


def leaves_something(coupling: Coupling, emptied: Iterable[Axis], dead: frozenset[int]) -> bool:
    """Whether every value that is still computed keeps an index of each of its dims."""
    without = dict.fromkeys(emptied, 0)
    live = (v for k, op in enumerate(coupling.graph.ops) if k not in dead for v in op.outputs)
    return all(width(axis, without) for v in live for axis in coupling.dims[v] if find(axis).size)
