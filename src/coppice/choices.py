"""Find the reshapes whose result the code picks apart along one dim: ``qkv.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)``.

Picking one index of the major part of a product is a slice of the product. So what lies behind that dim need not be the same for all its
indices: the head dim of the values may keep other indices than that of the queries and keys, only as many.
"""

from __future__ import annotations

from collections import defaultdict

from coppice.graph import Graph, Op

Place = tuple[int, int]  # a value, and a dim of it


def picked_apart(graph: Graph) -> dict[int, int]:
    """Op index of such a reshape -> the dim of its result. Every use of it, through copies and permutations, picks along that dim."""
    producers: dict[int, int] = {}
    users: dict[int, list[int]] = defaultdict(list)
    ops = (*graph.ops, *graph.training)
    for k, op in enumerate(ops):
        for value in dict.fromkeys((*(v for v in op.inputs if v is not None), *op.others)):
            users[value].append(k)
        for value in op.outputs:
            producers[value] = -1 if value in producers else k  # -1: written to more than once
    picks = {(op.inputs[0], op.attrs["dim"]) for op in ops if "picked" in op.attrs and op.inputs[0] is not None}
    found = {_source(graph, ops, producers, *place) for place in picks}
    outputs = {*graph.outputs, *graph.training_outputs}
    return {k: dim for k, dim in found if k >= 0 and _only_picked(graph, ops, users, outputs, (ops[k].outputs[0], dim))}


def _source(graph: Graph, ops: tuple[Op, ...], producers: dict[int, int], value: int, dim: int) -> tuple[int, int]:
    """The reshape that gave ``value`` its ``dim``, and which dim it was there; -1 where there is none."""
    while (k := producers.get(value, -1)) >= 0:
        op = ops[k]
        source = op.inputs[0] if len(op.inputs) == 1 else None
        if source is None or op.others:
            break
        if op.rule == "permute":
            dim = op.attrs["order"][dim]
        elif op.rule == "view" and not _only_ones(graph.shape(source), graph.shape(value)):
            return k, dim
        elif op.rule == "view":
            dim = _same_dim(graph.shape(value), graph.shape(source), dim)
        elif op.rule != "pointwise" or graph.shape(source) != graph.shape(value):
            break
        value = source
    return -1, 0


def _only_picked(graph: Graph, ops: tuple[Op, ...], users: dict[int, list[int]], outputs: set[int], place: Place) -> bool:
    pending, seen = [place], {place[0]}
    while pending:
        value, dim = pending.pop()
        if value in outputs or graph.shape(value)[dim] == 1:
            return False
        for op in (ops[k] for k in users[value]):
            if op.inputs != (value,) or op.others:
                return False
            if "picked" in op.attrs and op.attrs["dim"] == dim:
                continue
            to = _follow(graph, op, value, dim)
            if to is None or op.outputs[0] in seen:
                return False
            seen.add(op.outputs[0])
            pending.append((op.outputs[0], to))
    return True


def _follow(graph: Graph, op: Op, value: int, dim: int) -> int | None:
    """Where ``dim`` is in the result of an op that moves or copies whole dims; None where the op does more."""
    shape, out = graph.shape(value), graph.shape(op.outputs[0])
    if op.rule == "permute":
        return int(op.attrs["order"].index(dim))
    if op.rule == "pointwise" and shape == out:
        return dim
    return _same_dim(shape, out, dim) if op.rule == "view" and _only_ones(shape, out) else None


def _only_ones(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether a reshape from one to the other only adds or drops dims of size 1."""
    return [n for n in a if n != 1] == [n for n in b if n != 1]


def _same_dim(a: tuple[int, ...], b: tuple[int, ...], dim: int) -> int:
    """The dim of ``b`` that is dim ``dim`` of ``a`` (of a size other than 1), where only dims of size 1 differ."""
    nth = sum(n != 1 for n in a[:dim])
    return [k for k, n in enumerate(b) if n != 1][nth] if a[dim] != 1 else dim
