"""Coupling: from a recorded graph to axes and pins, in one pass over the ops.

Each op's rule unifies the dims of its operands and results (``coppice.axes``). What remains are atoms: the independent axes,
each with every place where it lies. What can't be cut is pinned, with its reason; there are no hints to give.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from coppice.axes import Axis, Form, atoms, decided, find, in_proportion, mix, pin, product_of, terms, unify
from coppice.choices import picked_apart
from coppice.cost import Cost, Term
from coppice.errors import CoppiceError
from coppice.graph import Graph, Kind, Op
from coppice.movement import FIXED, SHAPE_RULES, Dims, cut, fixed
from coppice.notation import Dim, Special, parse, spread
from coppice.rules import LINES

Mask = NDArray[np.bool_]
ALONE = "no parameter lies on it"
UNREAD = "the forward pass does not read it"
KERNEL = "a kernel or image size"


@dataclass(slots=True)
class OpDims:
    """What the oracle and surgery need of one op: operand dims summed away, whether any dim is mixed, the letters' axes, and its cost."""

    contracted: list[tuple[int, int]] = field(default_factory=list)
    mixes: list[Axis] = field(default_factory=list)
    letters: dict[str, Axis] = field(default_factory=dict)
    macs: tuple[Term, ...] = ()


@dataclass(slots=True, eq=False)
class PrunableAxis:
    """One independent axis: ``sites`` are ``(parameter or buffer, dim)``; ``pinned`` is None where it may be cut."""

    id: int
    name: str
    width: int
    atom: Axis
    sites: tuple[tuple[str, int], ...]
    multiple: int

    @property
    def pinned(self) -> str | None:
        return self.atom.pinned

    @property
    def mixed(self) -> bool:
        return self.atom.mixed


@dataclass(slots=True, eq=False)
class Coupling:
    """The axes of a graph. ``dims[v]`` are the axes of value ``v``; ``ties`` are sets of axes whose widths must stay in proportion.

    ``bindings`` say which attributes of the user's modules hold a width: ``(module path, attribute, index or None) -> axis``, with the
    dense values of those that are sequences in ``sequences``; the front-end finds them, ``coppice.plan`` evaluates them. ``training``: what
    is known of the ops of ``graph.training``.
    """

    graph: Graph
    dims: list[Dims]
    ops: list[OpDims]
    cost_terms: list[Term]
    ties: list[tuple[Axis, ...]] = field(default_factory=list)
    bindings: dict[tuple[str, str, int | None], Axis] = field(default_factory=dict)
    sequences: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    training: list[OpDims] = field(default_factory=list)
    _axes: list[PrunableAxis] | None = None

    @property
    def axes(self) -> list[PrunableAxis]:
        """Every axis that lies on a parameter or buffer, pinned ones included; kernel sizes are none."""
        if self._axes is None:
            self._axes = _collect_axes(self)
        return self._axes

    def refresh(self) -> None:
        """Forget the list of axes after something more was pinned or refined."""
        self._axes = None

    @property
    def prunable(self) -> list[PrunableAxis]:
        return [a for a in self.axes if a.pinned is None]

    def on(self, tensor: str, dim: int) -> list[PrunableAxis]:
        """The axes that lie on a dim of a parameter or buffer, in order (heads and head dim, the parts of a concat), pinned or not."""
        value = next((v for v in self.graph.weights() if tensor in v.names), None)
        if value is None or not -len(value.shape) <= dim < len(value.shape):
            raise CoppiceError(f"there is no dim {dim} of a tensor {tensor!r} in this model; the axes' sites say what there is")
        by_atom = {axis.atom: axis for axis in self.axes}
        return [by_atom[atom] for atom in dict.fromkeys(atoms(self.dims[value.id][dim])) if atom in by_atom]

    def axis(self, name: str) -> PrunableAxis:
        """The axis of that name, or the one that lies on the dim of that name (``"layer1.conv2.weight:1"``)."""
        named = next((a for a in self.axes if a.name == name), None)
        if named is not None:
            return named
        tensor, _, dim = name.rpartition(":")
        if not dim.isdigit():
            raise CoppiceError(f"{name!r} names no axis; give a tensor and a dim of it, such as conv1.weight:0")
        found = self.on(tensor, int(dim))
        if len(found) != 1:
            raise CoppiceError(
                f"{name} is made of {len(found)} axes: {', '.join(a.name for a in found) or 'its size is 1'}; name one of them"
            )
        return found[0]

    def tied_to(self, axis: PrunableAxis) -> list[PrunableAxis]:
        """The axes whose widths must stay in proportion to that of ``axis``."""
        by_atom = {a.atom: a for a in self.axes}
        bundle = next((b for b in self._tied() if axis.atom in b), ())
        return [by_atom[a] for a in bundle if a is not axis.atom and a in by_atom]

    def _tied(self) -> list[tuple[Axis, ...]]:
        """The ties, those that share an atom joined."""
        group: dict[Axis, dict[Axis, None]] = {}
        for tie in self.ties:
            merged = dict.fromkeys(a for atom in tie for a in (*group.get(find(atom), ()), find(atom)))
            group.update(dict.fromkeys(merged, merged))
        return list(dict.fromkeys(tuple(merged) for merged in group.values()))

    def free_bundles(self) -> list[tuple[Axis, ...]]:
        """The atoms that may move, those tied together as one bundle; a bundle with a pinned atom can't move and is left out."""
        bundle_of = {a: bundle for bundle in self._tied() for a in bundle}
        found = dict.fromkeys(bundle_of.get(axis.atom, (axis.atom,)) for axis in self.prunable)
        return [bundle for bundle in found if all(a.pinned is None for a in bundle)]

    def bundles(self) -> list[tuple[Axis, ...]]:
        """The prunable atoms, those tied together as one bundle, in proportion. A tie to a pinned atom pins the others."""
        for bundle in self._tied():
            reason = next((a.pinned for a in bundle if a.pinned), None)
            if reason and any(a.pinned is None for a in bundle):
                for atom in bundle:
                    pin(atom, reason)
                self.refresh()
        return self.free_bundles()

    @property
    def pins(self) -> dict[str, list[str]]:
        """Reason -> names of the axes pinned for it."""
        found: dict[str, list[str]] = defaultdict(list)
        for axis in self.axes:
            if axis.pinned is not None:
                found[axis.pinned].append(axis.name)
        return dict(found)

    def widths(self, kept: Mapping[int, int] | None = None) -> dict[Axis, int]:
        """Axis ids -> widths as atoms -> widths."""
        return {a.atom: kept[a.id] for a in self.axes if kept and a.id in kept}

    def cost(self, kept: Mapping[int, int] | None = None) -> Cost:
        """MACs, parameters and bytes of one sample at the given widths (axis id -> width; missing: full). Exact, no re-tracing."""
        widths = self.widths(kept)
        total = Counter[str]()
        for term in self.cost_terms:
            total[term.kind] += term.evaluate(widths)
        return Cost(total["macs"], total["params"], total["bytes"])


def couple(graph: Graph) -> Coupling:
    """Find the axes of ``graph``. Linear in the number of ops."""
    dims: list[Dims | None] = [None] * len(graph.values)
    for value in graph.values:
        if value.kind is Kind.INPUT:
            dims[value.id] = fixed(value.shape, "model input")
        elif value.kind is Kind.CONSTANT:
            dims[value.id] = fixed(value.shape, "a constant made by the code")
        elif value.kind is not Kind.INTERMEDIATE:
            dims[value.id] = tuple(Axis(size) for size in value.shape)
    infos: list[OpDims] = []
    macs: list[Term] = []
    apart = picked_apart(graph)
    for k, op in enumerate((*graph.ops, *graph.training)):
        if k in apart:
            op = replace(op, attrs={**op.attrs, "apart": apart[k]})
        operands = [() if v is None else _given(dims, graph, v) for v in op.inputs]
        for axis in (a for v in op.others for a in _given(dims, graph, v)):
            pin(axis, f"read by {op.name}, whose rule says nothing about it")
        results, info, products = apply_rule(op, operands, [graph.shape(v) for v in op.outputs])
        for out, axes in zip(op.outputs, results, strict=True):
            before = dims[out]
            if before is not None and graph.values[out].kind is not Kind.INTERMEDIATE:  # written in place
                for old, new in zip(before, axes, strict=True):
                    unify(old, new)
            dims[out] = axes
        infos.append(info)
        if len(infos) <= len(graph.ops):
            info.macs = tuple(Term("macs", tuple(p), 1, graph.batch) for p in products)
            macs += info.macs
    for v in (*graph.outputs, *graph.training_outputs):
        for axis in _given(dims, graph, v):
            pin(axis, "model output")
    known = [d if d is not None else fixed(v.shape) for d, v in zip(dims, graph.values, strict=True)]
    sizes = [
        Term(kind, known[w.id], w.itemsize if kind == "bytes" else 1, 1)
        for w in graph.weights()
        for kind in (("params", "bytes") if w.kind is Kind.PARAMETER else ("bytes",))
    ]
    coupling = Coupling(graph, known, infos[: len(graph.ops)], macs + sizes, training=infos[len(graph.ops) :])
    _tie_choices(coupling)
    _pin_unread(coupling)
    _pin_lone_axes(coupling)
    newer = graph.origin.bind_sizes(coupling) if graph.origin is not None else None
    return coupling if newer is None else couple(newer)


def _given(dims: Sequence[Dims | None], graph: Graph, value: int) -> Dims:
    found = dims[value]
    return fixed(graph.shape(value)) if found is None else found


def _tie_choices(coupling: Coupling) -> None:
    """What one dim of a tensor holds, whichever index chooses it, keeps one width."""
    choices = dict.fromkeys(a for dims in coupling.dims for d in dims if (a := find(d)).form is Form.CHOICE)
    while unlike := [c for c in choices if c.form is Form.CHOICE and in_proportion(c.parts) is None]:
        for choice in unlike:
            decided(choice)
    for choice in (c for c in choices if c.form is Form.CHOICE):
        ties = in_proportion(choice.parts) or ()
        coupling.ties += ties
        if not ties:  # one axis all along
            decided(choice)


def _pin_unread(coupling: Coupling) -> None:
    """A weight that no op reads (a mask token without masks) may meet others in code that did not run: nobody knows which."""
    graph = coupling.graph
    read = {v for op in (*graph.ops, *graph.training) for v in (*op.inputs, *op.others, *op.outputs)} | set(graph.outputs)
    for axis in (a for v in graph.weights() if v.id not in read for a in coupling.dims[v.id]):
        pin(axis, UNREAD)


def _pin_lone_axes(coupling: Coupling) -> None:
    on_weights = set(_atoms_of(coupling.dims[v.id] for v in coupling.graph.weights()))
    for axis in _atoms_of(coupling.dims):
        if axis not in on_weights:
            pin(axis, ALONE)


def _atoms_of(dims_of: Iterable[Dims]) -> Iterator[Axis]:
    """The atoms below all of these dims."""
    for axis in {find(axis) for dims in dims_of for axis in dims}:
        yield from atoms(axis)


def apply_rule(op: Op, operands: list[Dims], shapes: list[tuple[int, ...]]) -> tuple[list[Dims], OpDims, list[list[Axis]]]:
    """The results' axes, what the op contracts and mixes, and its MACs as products of axes."""
    if op.rule in SHAPE_RULES:
        info = OpDims([(0, d) for d in op.attrs.get("summed", ())])
        results = SHAPE_RULES[op.rule](operands, shapes, op.attrs)
        info.mixes = [operands[0][d] for d in op.attrs.get("mixed", ())]
        if "start" in op.attrs:
            info.letters["start"] = cut(operands[0][op.attrs["dim"]], op.attrs["start"])[0]
        return results, info, []
    rule = LINES[op.rule]
    try:
        return _apply_line(rule.text(op.attrs), rule.products(op.attrs), op, operands, shapes)
    except ValueError as error:
        reason = f"{op.name} does not fit its rule: {error}"
        return SHAPE_RULES["unknown"](operands, shapes, {"reason": reason}), OpDims(), []


class _Letters:
    """The axes bound to the letters of one line, for one op. Letters of products get their sizes from ``attrs`` or from what is left."""

    def __init__(self, sizes: Mapping[str, int], fixed_sizes: Mapping[str, int]) -> None:
        self.bound: dict[str, Axis] = {k: Axis(v) for k, v in sizes.items()}
        self.bound |= {k: Axis(v, FIXED) for k, v in fixed_sizes.items()}
        self.ellipsis: list[Axis] = []

    def bind(self, dim: Dim, axis: Axis) -> None:
        if dim is Special.FRESH:
            pin(axis, KERNEL)
        elif isinstance(dim, tuple):
            if len(dim) == 1:
                self._letter(dim[0], axis)
            else:
                self._product(dim, axis)

    def _letter(self, letter: str, axis: Axis) -> None:
        known = self.bound.get(letter)
        if known is None or (find(known).size == 1 != find(axis).size):
            self.bound[letter] = axis
        elif find(axis).size != 1:
            unify(known, axis)

    def _product(self, dim: tuple[str, ...], axis: Axis) -> None:
        size = find(axis).size
        open_ = [x for x in dim if x != "~" and x not in self.bound] or (["~"] if "~" in dim else [])
        known = math.prod(find(self.bound[x]).size for x in dim if x in self.bound)
        if len(open_) > 1 or size % known or (not open_ and size != known):
            raise ValueError(f"{size} does not divide into ({' '.join(dim)})")
        if open_ and open_ != ["~"]:
            self.bound[open_[0]] = Axis(size // known)
        rest = Axis(size // known, KERNEL) if "~" in dim else None
        unify(axis, product_of([rest if x == "~" and rest is not None else self.bound[x] for x in dim]))


def _order(dim: Dim) -> int:
    """Plain letters first: they give the sizes that a product's letters need."""
    return len(dim) if isinstance(dim, tuple) else 0


@dataclass(frozen=True, slots=True)
class _Layout:
    """A line with its ellipses opened for operands and results of given ranks; tensors are counted through, operands first.

    ``order``: ``(dim, tensor, its place)`` as they are bound; ``ellipses``: the places of each tensor's ellipsis.
    """

    spreads: list[list[Dim]]
    results: list[list[Dim]]
    order: list[tuple[Dim, int, int]]
    ellipses: list[list[int]]
    contracted: list[tuple[int, int]]  # where a summed-away letter stands: there a removed index is masked to take it out of the sum


@cache
def _layout(text: str, ranks: tuple[int | None, ...], out_ranks: tuple[int, ...]) -> _Layout:
    """``ranks``: None for an operand that is not given."""
    line = parse(text)
    spreads = [spread(p, rank) if rank is not None else [] for p, rank in zip(line.operands, ranks, strict=False)]
    results = [spread(p, rank) for p, rank in zip(line.results, out_ranks, strict=False)]
    places = [(dim, k, d) for k, dims in enumerate([*spreads, *results]) for d, dim in enumerate(dims)]
    contracted = [(k, d) for dim, k, d in places if k < len(spreads) and isinstance(dim, tuple) and set(dim) & line.contracted]
    ellipses = [[d for d, dim in enumerate(dims) if dim is Special.ELLIPSIS] for dims in (*spreads, *results)]
    return _Layout(spreads, results, sorted(places, key=lambda place: _order(place[0])), ellipses, contracted)


def _apply_line(
    text: str, macs: tuple[str, ...], op: Op, operands: list[Dims], shapes: list[tuple[int, ...]]
) -> tuple[list[Dims], OpDims, list[list[Axis]]]:
    line = parse(text)
    ranks = tuple([None if v is None else len(o) for v, o in zip(op.inputs, operands, strict=True)])
    layout = _layout(text, ranks, tuple(map(len, shapes)))
    spreads, results = layout.spreads, layout.results
    letters = _Letters(op.attrs.get("sizes", {}), op.attrs.get("fixed", {}))
    outs = [[Axis(size) for size in shape] for shape in shapes[: len(results)]]
    tensors: list[Sequence[Axis]] = [*operands[: len(spreads)], *outs]
    for dim, k, d in layout.order:
        letters.bind(dim, tensors[k][d])
    _broadcast_ellipsis([[axes[d] for d in places] for places, axes in zip(layout.ellipses, tensors, strict=True) if places])
    mixed = sorted(line.mixed & letters.bound.keys())
    for letter in mixed:
        mix(letters.bound[letter])
    info = OpDims(layout.contracted, [letters.bound[x] for x in mixed], letters.bound)
    products = [_monomial(text, letters, spreads, operands, outs, results) for text in macs]
    extra = [fixed(shape) for shape in shapes[len(results) :]]
    return [*map(tuple, outs), *extra], info, products


def _broadcast_ellipsis(groups: list[list[Axis]]) -> None:
    for group in groups:
        for back in range(1, len(group) + 1):
            for other in groups:
                if other is not group and len(other) >= back and find(other[-back]).size != 1 != find(group[-back]).size:
                    unify(group[-back], other[-back])


def _monomial(
    text: str, letters: _Letters, spreads: list[list[Dim]], operands: list[Dims], outs: list[list[Axis]], results: list[list[Dim]]
) -> list[Axis]:
    found: list[Axis] = []
    for token in text.split():
        if token in ("~out", "..."):
            special = Special.FRESH if token == "~out" else Special.ELLIPSIS
            found += [a for d, a in zip(results[0], outs[0], strict=True) if d is special]
        elif token.startswith("~"):
            k = int(token[1:])
            found += [a for d, a in zip(spreads[k], operands[k], strict=True) if d is Special.FRESH]
        else:
            found.append(letters.bound[token])
    return found


def _collect_axes(coupling: Coupling) -> list[PrunableAxis]:
    sites: dict[Axis, list[tuple[str, int]]] = defaultdict(list)
    multiple: dict[Axis, int] = {}
    for value in coupling.graph.weights():
        for d, axis in enumerate(coupling.dims[value.id]):
            for atom, cofactor in cofactors(axis):
                if atom.size > 1 and atom.pinned != KERNEL:
                    sites[atom].append((value.names[0], d))
                    multiple[atom] = min(multiple.get(atom, cofactor), cofactor)
    axes: list[PrunableAxis] = []
    used: Counter[str] = Counter()
    for atom, places in sites.items():
        stem = f"{places[0][0]}:{places[0][1]}"
        used[stem] += 1
        name = stem if used[stem] == 1 else f"{stem}.{used[stem]}"
        unique = tuple(dict.fromkeys(places))
        axes.append(PrunableAxis(len(axes), name, atom.size, atom, unique, multiple[atom]))
    return axes


def cofactors(axis: Axis, times: int = 1) -> list[tuple[Axis, int]]:
    """Every atom below ``axis`` with the product of the sizes it is multiplied by (heads x head dim: 64 for a head)."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        return [(axis, times)]
    found = []
    for part in axis.parts:
        factor = times if axis.form is Form.SUM else times * axis.size // find(part).size
        found += cofactors(part, factor)
    return found


def keep_mask(axis: Axis, kept: Mapping[Axis, Mask]) -> Mask:
    """Which indices of ``axis`` stay, given those of its atoms (missing: all)."""
    axis = find(axis)
    if axis.form is Form.ATOM:
        found = kept.get(axis)
        return np.ones(axis.size, bool) if found is None else found
    masks = [keep_mask(p, kept) for p in axis.parts]
    if axis.form is Form.CHOICE:
        if any((m != masks[0]).any() for m in masks):
            raise ValueError("which indices of a choice stay depends on the place")
        return masks[0]
    if axis.form is Form.SUM:
        return np.concatenate(masks)
    out = masks[0]
    for mask in masks[1:]:
        out = np.logical_and.outer(out, mask).reshape(-1)
    return out


def describe(axis: Axis, names: Mapping[Axis, str]) -> str:
    """``axis`` as text: ``8 + a0 + 8``, ``(a1 a2)``, ``3``."""
    axis = find(axis)
    if axis.form is Form.ATOM or axis.pinned:
        return names.get(axis, str(axis.size))
    parts = [describe(p, names) for p in (terms(axis) if axis.form is Form.SUM else axis.parts)]
    if axis.form is Form.SUM:
        return " + ".join(parts)
    return "(" + " ".join(f"({p})" if " + " in p else p for p in parts) + ")"
