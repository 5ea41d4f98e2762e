"""What several tests cut: a call on operands that lost some indices beside the dense call (rules and ops), a model to half of its MACs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

import coppice
from coppice.axes import Axis, atoms
from coppice.cost import width
from coppice.coupling import Coupling, Mask, keep_mask
from coppice.graph import Graph
from coppice.torch.apply import sliced
from coppice.torch.capture import capture


@dataclass(frozen=True)
class Told:
    """The sizes that a caller has to give: the number of groups, where a slice starts, the results' shapes."""

    groups: int = 1
    start: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()


Call = Callable[[list[Tensor], Told], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """A call on operands of the given shapes; ``told`` are the dense sizes. ``mixed``: it mixes an axis; ``cut``: something can be cut."""

    name: str
    rule: str
    shapes: tuple[tuple[int, ...], ...]
    call: Call
    told: Told = Told()
    mixed: bool = False
    cut: bool = True


class Operands(nn.Module):
    """The call as a model whose parameters are its operands."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        operands = [torch.rand(s, generator=generator, dtype=torch.float64) + 0.2 for s in case.shapes]
        self.operands = nn.ParameterList(operands)
        self.case = case

    def forward(self) -> Tensor | tuple[Tensor, ...]:
        return self.case.call(list(self.operands), self.case.told)


def coupled(case: Case) -> tuple[Coupling, Graph]:
    """The axes of the call alone: its results are no outputs, which would be pinned."""
    graph = capture(Operands(case), ())
    return coppice.couple(replace(graph, outputs=(), origin=None)), graph


def some(coupling: Coupling, of: Callable[[Axis], bool], rng: np.random.Generator) -> dict[Axis, Mask]:
    """A random mask, with something removed, for every atom that may be cut and that ``of`` accepts."""
    free = {a for d in coupling.dims for axis in d for a in atoms(axis) if a.pinned is None and a.size > 1 and of(a)}
    masks: dict[Axis, Mask] = {}
    for atom in sorted(free, key=id):
        masks[atom] = np.ones(atom.size, bool)
        masks[atom][rng.permutation(atom.size)[: rng.integers(1, atom.size)]] = False
    return masks


def run(case: Case, coupling: Coupling, graph: Graph, masks: Mapping[Axis, Mask]) -> tuple[list[Tensor], list[Tensor]]:
    """The results of the call on the cut operands, and the dense results cut, summed-away indices at zero."""
    whole = [p.detach() for p in Operands(case).operands]
    ids = {name: v.id for v in graph.weights() for name in v.names}
    cuts = [[keep_mask(a, masks) for a in coupling.dims[ids[f"operands.{k}"]]] for k in range(len(whole))]
    zeroed = [t.clone() for t in whole]
    copied = {op.outputs[0]: op.inputs[0] for op in graph.ops if op.name == "aten._to_copy"}  # to another precision
    for op, info in zip(graph.ops, coupling.ops, strict=True):
        for position, dim in info.contracted:
            read = copied.get(op.inputs[position], op.inputs[position])
            k = next((k for k in range(len(whole)) if ids[f"operands.{k}"] == read), None)
            if k is not None:
                zeroed[k].index_fill_(dim, torch.from_numpy(np.flatnonzero(~cuts[k][dim])), 0)
    counts = {a: int(m.sum()) for a, m in masks.items()}
    letters = {name: axis for info in coupling.ops for name, axis in info.letters.items()}
    shapes = tuple(tuple(width(a, counts) for a in coupling.dims[v]) for v in graph.outputs)
    told = Told(
        *(width(letters[x], counts) if x in letters else d for x, d in (("g", case.told.groups), ("start", case.told.start))), shapes
    )
    made = case.call([sliced(t, c) for t, c in zip(whole, cuts, strict=True)], told)
    dense = case.call(zeroed, case.told)
    made, dense = [list(r) if isinstance(r, (tuple, list)) else [r] for r in (made, dense)]
    return made, [sliced(t, [keep_mask(a, masks) for a in coupling.dims[v]]) for t, v in zip(dense, graph.outputs, strict=True)]


def to_half_of_the_macs(model: nn.Module, coupling: Coupling) -> nn.Module:
    """``model`` cut to half of its MACs by L2, and verified; it is the user's own class still, and its code takes no other way."""
    plan = coppice.plan(coupling, coppice.score(model, coupling, "l2"), {"macs": 0.5 * coupling.cost().macs})
    pruned = coppice.apply(model, plan)
    proof = coppice.verify(model, pruned, coupling, plan)
    assert proof.max_error < 1e-10
    assert proof.detour is None
    assert type(pruned) is type(model)
    return pruned
