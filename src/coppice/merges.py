"""Layers that can be one: two in a row without the activation between them, or a layer and the shortcut around it.

A convolution, a linear layer and a BatchNorm in evaluation are linear, so a run of them is one layer, whose kernel is composed of theirs
(``coppice.torch.composing``). That is exact but for the border: where the second convolution pads, it reads zeros, and the first one, moved
out there, would answer something else. So the second must not pad, unless the first answers zero to zeros and sees one place at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coppice.flow import Source
from coppice.graph import Kind, ModuleCall
from coppice.pools import CONVOLUTIONS
from coppice.removals import Composed, Edit, Removable

if TYPE_CHECKING:
    from coppice.modules import Finder


@dataclass(frozen=True, slots=True)
class Linear:
    """A module that is one convolution or linear layer: the version that it reads, the one that it gives, its window (None: no places)."""

    call: ModuleCall
    op: int
    reads: int
    gives: int
    weight: tuple[int, ...]
    groups: int
    window: dict[str, tuple[int, ...]] | None
    biased: bool

    def step(self) -> dict[str, Any]:
        window = self.window or {"stride": (), "padding": ()}
        return {"layer": self.call.path, "groups": self.groups, "stride": list(window["stride"]), "padding": list(window["padding"])}


@dataclass(frozen=True, slots=True)
class _Run:
    """What lies between two layers: BatchNorms by path, and the activation: the versions before and after it, and its module."""

    norms: list[str]
    activation: tuple[int, int] | None
    module: ModuleCall | None
    end: int


def merges(finder: Finder) -> Iterator[Removable]:
    found = [layer for call in finder.calls if (layer := _linear(finder, call)) is not None]
    readers = {layer.reads: layer for layer in found}  # where there are several, none of them is the second of a merge
    for first in found:
        if (whole := _with_shortcut(finder, first)) is not None:
            yield whole
        run = _run_after(finder, first)
        second = None if run is None else readers.get(run.end)
        if run is not None and second is not None and finder.flow.only_use(run.end) is not None:
            merged = _merged(finder, first, run, second)
            if merged is not None:
                yield merged


def _linear(finder: Finder, call: ModuleCall) -> Linear | None:
    flow, graph = finder.flow, finder.graph
    if not call.bare or len(call.inputs) != 1:
        return None
    reads, gives = flow.at(call.inputs[0], call.first), flow.at(call.outputs[0], call.last)
    weighted = [k for k in range(call.first, call.last) if graph.ops[k].rule in (*CONVOLUTIONS, "mm")]
    names = {n for k in range(call.first, call.last) for v in flow.reads[k] for n in graph.values[flow.value[v]].names}
    own = {f"{call.path}.weight", f"{call.path}.bias"}
    if len(weighted) != 1 or reads is None or gives is None or not names <= own:
        return None
    op = graph.ops[weighted[0]]
    others = {graph.ops[k].rule for k in range(call.first, call.last)} - {op.rule}
    shape = next((value.shape for value in graph.weights() if f"{call.path}.weight" in value.names), None)
    if shape is None or not others <= ({"view", "permute"} if op.rule == "mm" else set()):
        return None
    if any(value.kind is Kind.PARAMETER and set(value.names) & own and len(value.names) > 1 for value in graph.weights()):
        return None  # tied to another layer's
    if op.rule == "mm":
        return None if len(shape) != 2 else Linear(call, weighted[0], reads, gives, shape, 1, None, f"{call.path}.bias" in names)
    return Linear(call, weighted[0], reads, gives, shape, op.attrs["sizes"]["g"], op.attrs["window"], f"{call.path}.bias" in names)


def _run_after(finder: Finder, first: Linear) -> _Run | None:
    """From a layer through BatchNorms and at most one activation, for as long as nothing else reads what it gives."""
    flow, graph = finder.flow, finder.graph
    norms: list[str] = []
    activation, module, version = None, None, first.gives
    while True:
        k = flow.only_use(version)
        if k is None:
            return None
        op = graph.ops[k]
        if op.rule in (*CONVOLUTIONS, "mm", "view", "permute"):
            return _Run(norms, activation, module, version)
        call = next((c for c in finder.calls if c.path == op.module and c.first <= k < c.last), None)
        if op.rule == "batch_norm" and activation is None and call is not None and first.window is not None:
            norms.append(call.path)
        elif op.rule == "pointwise" and activation is None and len([v for v in op.inputs if v is not None]) == 1 and not op.others:
            alone = call is not None and all(j == k for j in range(call.first, call.last))
            activation, module = (version, flow.writes[k][0]), call if alone else None
        else:
            return None
        version = flow.writes[k][0]


def _merged(finder: Finder, first: Linear, run: _Run, second: Linear) -> Removable | None:
    if (first.window is None) != (second.window is None) or not _fits_at_the_border(first, run, second):
        return None
    steps = [first.step(), *({"norm": path} for path in run.norms), second.step()]
    gone = [first.call.path, *run.norms]
    substitutes: dict[int, Source] = {}
    if run.activation is None or run.module is not None:
        edits = [Edit(first.call.path, "merged", {"of": steps})]
        rest = [*run.norms, *([run.module.path] if run.module is not None else []), second.call.path]
    else:  # an activation that other places share, or in the code: it does nothing to what went through one before
        op = finder.graph.ops[finder.flow.uses[run.activation[0]][0]]
        if op.attrs.get("function") != "clip" or not finder.is_clipped(first.reads, op.attrs["bounds"]):
            return None
        edits = [Edit(second.call.path, "merged", {"of": steps})]
        rest = gone
    if run.activation is not None:
        substitutes[run.activation[1]] = run.activation[0]
    edits += [Edit(path, "identity") for path in rest]
    whole = _composed(first, second)
    macs, params = _saved(finder, first, run, second, whole)
    return Removable(
        _joint_name(first.call.path, second.call.path), "merge", substitutes, frozenset(), tuple(edits), macs, params, first.op,
        composed=whole, span=(first.call.first, second.call.last),
    )  # fmt: skip


def _joint_name(first: str, second: str) -> str:
    """Both paths, the second without what it shares with the first."""
    parts, others = first.split("."), second.split(".")
    shared = next((k for k, (a, b) in enumerate(zip(parts, others, strict=False)) if a != b), 0)
    return f"{first}+{'.'.join(others[shared:])}"


def _fits_at_the_border(first: Linear, run: _Run, second: Linear) -> bool:
    if first.window is None or second.window is None:
        return True
    if {*first.window["dilation"], *second.window["dilation"]} != {1}:
        return False
    if not any(second.window["padding"]):
        return True
    place_by_place = set(first.weight[2:]) == {1} and set(first.window["stride"]) == {1} and not any(first.window["padding"])
    return place_by_place and not first.biased and not run.norms


def _composed(first: Linear, second: Linear) -> Composed:
    groups = first.groups if first.groups == second.groups else 1
    inputs, outputs = first.weight[1] * first.groups // groups, second.weight[0] // groups
    if first.window is None or second.window is None:
        return Composed(first.op, second.op, 1, inputs, outputs, (), (), ())
    strides, pads = first.window["stride"], first.window["padding"]
    kernel = tuple(a + (b - 1) * s for a, b, s in zip(first.weight[2:], second.weight[2:], strides, strict=True))
    stride = tuple(s * t for s, t in zip(strides, second.window["stride"], strict=True))
    padding = tuple(p + s * q for p, s, q in zip(pads, strides, second.window["padding"], strict=True))
    return Composed(first.op, second.op, groups, inputs, outputs, kernel, stride, padding)


def _saved(finder: Finder, first: Linear, run: _Run, second: Linear, whole: Composed) -> tuple[int, int]:
    """MACs and parameters that one layer has fewer than the two."""
    weight = whole.groups * whole.outputs * whole.inputs * math.prod(whole.kernel)
    macs = sum(term.evaluate({}) for k in (first.op, second.op) for term in finder.coupling.ops[k].macs)
    before = math.prod(second.weight)
    own = sum(term.evaluate({}) for term in finder.coupling.ops[second.op].macs)
    norms = sum(finder.sizes[f"{path}.{name}"] for path in run.norms for name in ("weight", "bias") if f"{path}.{name}" in finder.sizes)
    biased = (first.biased or bool(run.norms) or second.biased) * second.weight[0]
    had = math.prod(first.weight) + before + first.biased * first.weight[0] + second.biased * second.weight[0] + norms
    return macs - own // before * weight, had - weight - biased


def _with_shortcut(finder: Finder, layer: Linear) -> Removable | None:
    """A sum of a tensor and what a convolution (and BatchNorms) makes of it: the same as one convolution, if a module does it all."""
    flow, graph = finder.flow, finder.graph
    window = layer.window
    if (
        window is None
        or set(window["stride"]) != {1}
        or set(window["dilation"]) != {1}
        or flow.shape(layer.reads) != flow.shape(layer.gives)
    ):
        return None
    if any(2 * pad != size - 1 for pad, size in zip(window["padding"], layer.weight[2:], strict=True)):
        return None
    norms, version = [], layer.gives
    while (k := flow.only_use(version)) is not None and graph.ops[k].rule == "batch_norm":
        norms.append(graph.ops[k].module)
        version = flow.writes[k][0]
    if k is None or graph.ops[k].attrs.get("function") != "add" or {flow.at(v, k) for v in graph.ops[k].inputs} != {version, layer.reads}:
        return None
    total = flow.writes[k][0]
    whole = next((c for c in finder.calls if c.bare and len(c.inputs) == 1 and finder.gives(c, total)), None)
    if whole is None or flow.at(whole.inputs[0], whole.first) != layer.reads:
        return None
    steps = [layer.step(), *({"norm": path} for path in norms)]
    edit = Edit(whole.path, "merged", {"of": steps, "shortcut": True})
    norm_sizes = sum(finder.sizes[f"{path}.{name}"] for path in norms for name in ("weight", "bias") if f"{path}.{name}" in finder.sizes)
    bias = (bool(norms) and not layer.biased) * layer.weight[0]
    return Removable(f"{whole.path}:merge", "merge", {}, frozenset(), (edit,), 0, norm_sizes - bias, k, span=(whole.first, whole.last))
