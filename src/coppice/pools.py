"""Pooling layers that can go: the convolution before takes over the stride, or nothing after minds the size, or the convolution after does.

Where the convolution before does it, its results are those at every so many-th place: the pooling picks the first of each window. Where
the one after does, it reads what was to be pooled with its own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from coppice.flow import Source, Strided
from coppice.graph import Kind, ModuleCall, Op
from coppice.removals import Edit, Removable

if TYPE_CHECKING:
    from coppice.modules import Finder

CONVOLUTIONS = ("conv", "pointwise_conv")


def pools(finder: Finder) -> Iterator[Removable]:
    """Every pooling layer that is a module of its own and can go, in one way each: that which saves most."""
    for k, op in enumerate(finder.graph.ops):
        if op.attrs.get("function") == "pool":
            call = next((c for c in finder.calls if (c.first, c.last, c.path) == (k, k + 1, op.module)), None)
            found = (
                None if call is None else _into_before(finder, k, call) or _into_nothing(finder, k, call) or _into_after(finder, k, call)
            )
            if found is not None:
                yield found


def _into_before(finder: Finder, k: int, call: ModuleCall) -> Removable | None:
    """The pooling as every so many-th place, all the way back to the convolution before it."""
    flow, graph = finder.flow, finder.graph
    before, after = flow.reads[k][0], flow.writes[k][0]
    steps = graph.ops[k].attrs["window"]["stride"]
    sizes = tuple(math.ceil(size / step) for size, step in zip(flow.shape(before)[-len(steps) :], steps, strict=True))
    if math.prod(steps) == 1 or sizes != flow.shape(after)[-len(steps) :]:
        return None
    version = before
    while True:
        made_by = flow.made_by[version]
        if made_by is None or flow.only_use(version) is None:
            return None
        if graph.ops[made_by].rule in CONVOLUTIONS:
            break
        source = _place_by_place(finder, made_by)
        if source is None:
            return None
        version = source
    stride = _times(graph.ops[made_by], steps)
    owner = _module_of(finder, made_by)
    if owner is None or stride is None:
        return None
    whole = sum(term.evaluate({}) for term in finder.coupling.ops[made_by].macs)
    full = math.prod(flow.shape(version)[-len(steps) :])
    saved = whole - whole // full * math.prod(sizes)
    return _candidate(finder, k, call, {after: Strided(before, steps)}, saved, {owner.path: {"stride": list(stride)}}, {})


def _into_nothing(finder: Finder, k: int, call: ModuleCall) -> Removable | None:
    """No stride in its place, where all that reads it makes one size of any, or it has none."""
    flow = finder.flow
    before, after = flow.reads[k][0], flow.writes[k][0]
    if flow.shape(before) != flow.shape(after) and not _takes_any_size(finder, after):
        return None
    return _candidate(finder, k, call, {after: before}, 0, {}, {})


def _takes_any_size(finder: Finder, version: int) -> bool:
    flow, graph = finder.flow, finder.graph
    if version in flow.outputs or not flow.uses[version]:
        return False
    for k in flow.uses[version]:
        op = graph.ops[k]
        averaged = op.rule == "along" and {2, 3} <= set(op.attrs.get("mixed", ())) and len(flow.shape(version)) == 4
        if averaged or op.attrs.get("function") == "to a size":
            continue
        if _place_by_place(finder, k) != version or not _takes_any_size(finder, flow.writes[k][0]):
            return False
    return True


def _into_after(finder: Finder, k: int, call: ModuleCall) -> Removable | None:
    """The convolution that reads the pooled map strides over the one that was to be pooled."""
    flow, graph = finder.flow, finder.graph
    before, after = flow.reads[k][0], flow.writes[k][0]
    steps, version = graph.ops[k].attrs["window"]["stride"], after
    use = flow.only_use(version)
    while use is not None and graph.ops[use].rule not in CONVOLUTIONS:
        if _place_by_place(finder, use) != version:
            return None
        version = flow.writes[use][0]
        use = flow.only_use(version)
    if use is None or flow.at(graph.ops[use].inputs[0], use) != version:
        return None
    op, stride, owner = graph.ops[use], _times(graph.ops[use], steps), _module_of(finder, use)
    if owner is None or stride is None:
        return None
    window, kernel = op.attrs["window"], graph.shape(op.inputs[1])[2:]  # type: ignore[arg-type]
    sizes = tuple(
        (size + 2 * pad - dilation * (width - 1) - 1) // step + 1
        for size, pad, dilation, width, step in zip(
            flow.shape(before)[2:], window["padding"], window["dilation"], kernel, stride, strict=True
        )
    )
    if sizes != flow.shape(flow.writes[use][0])[2:]:
        return None
    return _candidate(finder, k, call, {after: before}, 0, {owner.path: {"stride": list(stride)}}, {use: stride})


def _candidate(
    finder: Finder,
    k: int,
    call: ModuleCall,
    substitutes: dict[int, Source],
    macs: int,
    attributes: dict[str, dict[str, list[int]]],
    strides: dict[int, tuple[int, ...]],
) -> Removable:
    dead = finder.flow.dead(substitutes) | {k}
    return Removable(
        call.path, "pool", substitutes, dead, (Edit(call.path, "identity"),), macs, 0, k, attributes=attributes, strides=strides,
        span=(k, k + 1),
    )  # fmt: skip


def _place_by_place(finder: Finder, k: int) -> int | None:
    """The one version that op ``k`` computes from besides weights, if it treats each place alike and by itself."""
    op = finder.graph.ops[k]
    computed = [v for v in op.inputs if v is not None and finder.graph.values[v].kind is Kind.INTERMEDIATE]
    alike = op.rule == "batch_norm" or (op.rule == "pointwise" and len([v for v in op.inputs if v is not None]) == 1)
    return finder.flow.at(computed[0], k) if alike and len(computed) == 1 and not op.others else None


def _module_of(finder: Finder, k: int) -> ModuleCall | None:
    """The convolution as a module of its own."""
    return next((c for c in finder.calls if c.path == finder.graph.ops[k].module and c.first <= k < c.last), None)


def _times(op: Op, steps: tuple[int, ...]) -> tuple[int, ...] | None:
    stride = op.attrs["window"]["stride"]
    return tuple(a * b for a, b in zip(stride, steps, strict=True)) if len(stride) == len(steps) else None
