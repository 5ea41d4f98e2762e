"""What `coppice inspect` says of a model: its axes, where they lie, what they cost, what moves together, what is pinned and why."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from coppice.axes import Axis, atoms
from coppice.coupling import Coupling, PrunableAxis, describe
from coppice.graph import Kind


def inspect_axes(coupling: Coupling) -> dict[str, Any]:
    """Plain data: the totals, and for each axis its sites, its shares of the cost, what it is tied to, and why it is pinned, if it is.

    An axis's share is what would be saved if it went as a whole; shares of different axes overlap, since an op runs over several.
    """
    total, saved = coupling.cost(), _saved(coupling)
    tied = {atom: bundle for bundle in coupling.bundles() for atom in bundle}
    names = {axis.atom: axis.name for axis in coupling.axes}
    axes = [
        {
            "name": axis.name,
            "width": axis.width,
            "sites": [list(site) for site in axis.sites],
            "macs_share": saved["macs", axis.atom] / max(total.macs, 1),
            "params_share": saved["params", axis.atom] / max(total.params, 1),
            "mixed": axis.mixed,
            "tied_to": [names[atom] for atom in tied.get(axis.atom, ()) if atom is not axis.atom],
            "pinned": axis.pinned,
        }
        for axis in coupling.axes
    ]
    share = prunable_share(coupling)
    return {
        "macs": total.macs, "params": total.params, "bytes": total.bytes, "prunable_share": share, "axes": axes, "pins": coupling.pins,
    }  # fmt: skip


def _saved(coupling: Coupling) -> Counter[tuple[str, Axis]]:
    """What each cost would lose with each axis."""
    saved: Counter[tuple[str, Axis]] = Counter()
    for term in coupling.cost_terms:
        whole = term.evaluate({})
        for atom in {atom for axis in term.axes for atom in atoms(axis)}:
            saved[term.kind, atom] += whole - term.evaluate({atom: 0})
    return saved


def prunable_share(coupling: Coupling) -> float:
    """The part of the parameters that lie on an axis that can be cut."""
    free = {axis.atom for axis in coupling.prunable}
    sizes = {True: 0, False: 0}
    for value in coupling.graph.weights():
        if value.kind is Kind.PARAMETER:
            sizes[any(atom in free for axis in coupling.dims[value.id] for atom in atoms(axis))] += math.prod(value.shape)
    return sizes[True] / max(sum(sizes.values()), 1)


def inspect_axis(coupling: Coupling, axis: PrunableAxis) -> list[tuple[str, str, int, str]]:
    """Every tensor and dim that ``axis`` lies on, as ``(name, kind, dim, how the dim is made up)``, the axis in brackets."""
    by_name = {value.names[0]: value for value in coupling.graph.weights()}
    mark = {axis.atom: f"[{axis.width}]"}
    sites = ((by_name[name], name, dim) for name, dim in axis.sites)
    return [(name, value.kind.value, dim, describe(coupling.dims[value.id][dim], mark)) for value, name, dim in sites]
