"""The plan: which indices of which axis stay. The one artefact between deciding and editing; plain JSON.

A plan is complete by itself: for every tensor that changes it has an expression a dim over the axes (``"8 + a0 + 8"``: a fixed part, axis
``a0``, a fixed part; ``"(a1 a2)"``: a product, major first), and for every module attribute that holds a width its new value. Single
weights that are zero in what stays are a mask, one bit a weight. So it is applied, and a pruned model is rebuilt from it, without looking
at the model's structure again.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from coppice.axes import Axis, atoms, find
from coppice.cost import width
from coppice.coupling import Coupling, Mask, describe, keep_mask
from coppice.errors import CoppiceError
from coppice.flow import Flow
from coppice.graph import Kind
from coppice.modules import removable
from coppice.packed import PackedMask
from coppice.removals import Edit, Removable, clash, leaves_something

FORMAT = 1
WITH_MODULES = 2  # the format of a plan with modules, several cuts or masks: versions that know of none of these must not read it


@dataclass(frozen=True, slots=True)
class PlannedAxis:
    """An axis of the dense model, named after the first parameter and dim that it lies on, and the indices of it that stay."""

    name: str
    width: int
    keep: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Removal:
    """The modules that go: ``names`` and kinds as ``coppice.removable`` has them, and all that is needed to do it.

    ``edits`` replace modules; ``columns`` are the ranges of indices that other tensors lose, ``(dim, its size, start, stop)``;
    ``attributes`` are what other modules are set to.
    """

    names: Mapping[str, str]
    edits: tuple[Edit, ...]
    columns: Mapping[str, tuple[tuple[int, int, int, int], ...]]
    attributes: Mapping[str, Mapping[str, int | list[int]]]

    def to_dict(self) -> dict[str, object]:
        return {
            "names": dict(self.names),
            "edits": [{"path": e.path, "becomes": e.becomes, "options": dict(e.options)} for e in self.edits],
            "columns": {name: [list(r) for r in ranges] for name, ranges in self.columns.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Removal:
        return cls(
            {str(name): str(kind) for name, kind in raw["names"].items()},
            tuple(Edit(str(e["path"]), str(e["becomes"]), dict(e["options"])) for e in raw["edits"]),
            {str(name): tuple((int(d), int(n), int(a), int(b)) for d, n, a, b in ranges) for name, ranges in raw["columns"].items()},
            {str(p): {str(k): _size(v) for k, v in values.items()} for p, values in raw["attributes"].items()},
        )

    def masks(self, name: str) -> dict[int, Mask]:
        """Which indices of some dims of the tensor ``name`` stay."""
        found: dict[int, Mask] = {}
        for dim, size, start, stop in self.columns.get(name, ()):
            found.setdefault(dim, np.ones(size, bool))[start:stop] = False
        return found

    def takes(self, name: str) -> bool:
        """Whether the tensor of that name goes, with a module."""
        edit = next((e for e in self.edits if name.startswith(e.path + ".")), None)
        return edit is not None and not any(name.startswith(f"{edit.path}.{step}.") for step in edit.options.get("steps", ()))


@dataclass(frozen=True, slots=True)
class Plan:
    """``axes[k]`` is ``a{k}`` in the expressions of ``tensors``; ``attributes`` are new values by module path and attribute.

    ``removed``: modules that go first; the axes are those of the model without them. ``then``: a plan for the model that this one gives.
    ``weight_masks``: by parameter, which weights of what the axes leave stay; the others are zero.
    """

    axes: tuple[PlannedAxis, ...]
    tensors: Mapping[str, tuple[str, ...]]
    attributes: Mapping[str, Mapping[str, int | list[int]]]
    removed: Removal | None = None
    then: Plan | None = None
    weight_masks: Mapping[str, PackedMask] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, object]:
        plain: dict[str, object] = {
            "format": FORMAT if self.removed is None and self.then is None and not self.weight_masks else WITH_MODULES,
            "axes": [{"name": a.name, "width": a.width, "keep": list(a.keep)} for a in self.axes],
            "tensors": {name: list(dims) for name, dims in self.tensors.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
        }
        if self.removed is not None:
            plain["removed"] = self.removed.to_dict()
        if self.weight_masks:
            plain["masks"] = {name: mask.to_json() for name, mask in self.weight_masks.items()}
        if self.then is not None:
            plain["then"] = self.then.to_dict()
        return plain

    @property
    def cuts(self) -> list[Plan]:
        """This plan and those that follow it, each without the next."""
        return [replace(self, then=None), *(self.then.cuts if self.then is not None else ())]

    @property
    def modules(self) -> dict[str, str]:
        """Every module that goes: name -> kind."""
        return {name: kind for cut in self.cuts if cut.removed is not None for name, kind in cut.removed.names.items()}

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back. CoppiceError where the text is no plan, or names indices outside their axis."""
        try:
            return cls._from_dict(json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CoppiceError(f"not a pruning plan ({type(error).__name__}: {error}); give a plan.json that coppice wrote") from None

    @classmethod
    def _from_dict(cls, raw: Mapping[str, Any]) -> Plan:
        if raw.get("format") not in (FORMAT, WITH_MODULES):
            raise CoppiceError(
                f"the plan has format {raw.get('format')!r}, this version reads {FORMAT} and {WITH_MODULES}; "
                "use the coppice version that wrote it"
            )
        axes = tuple(PlannedAxis(str(a["name"]), int(a["width"]), tuple(map(int, a["keep"]))) for a in raw["axes"])
        tensors = {str(name): tuple(map(str, dims)) for name, dims in raw["tensors"].items()}
        attributes = {str(p): {str(k): _size(v) for k, v in values.items()} for p, values in raw["attributes"].items()}
        removed = Removal.from_dict(raw["removed"]) if "removed" in raw else None
        then = cls._from_dict(raw["then"]) if "then" in raw else None
        for axis in axes:
            if sorted(set(axis.keep)) != list(axis.keep) or not axis.keep or axis.keep[0] < 0 or axis.keep[-1] >= axis.width:
                raise CoppiceError(f"the plan's axis {axis.name} keeps indices that are not increasing within 0..{axis.width - 1}")
        masks = {str(name): PackedMask.from_json(mask) for name, mask in raw.get("masks", {}).items()}
        return cls(axes, tensors, attributes, removed, then, masks)

    def masks(self, name: str) -> list[Mask]:
        """Which indices of each dim of the tensor ``name`` stay."""
        return [_read(expression, self.axes, name) for expression in self.tensors[name]]

    def stays(self, name: str) -> bool:
        """Whether the dense model's tensor of that name goes with no module."""
        return not any(cut.removed is not None and cut.removed.takes(name) for cut in self.cuts)

    def changed(self) -> dict[str, list[Mask]]:
        """The masks of every tensor that loses something as the axes get narrower, of the model as it is then."""
        read: dict[str, Mask] = {}  # tensors share most expressions
        for name, dims in self.tensors.items():
            read.update({text: _read(text, self.axes, name) for text in dims if text not in read})
        cut = {text for text, mask in read.items() if not mask.all()}
        return {name: [read[text] for text in dims] for name, dims in self.tensors.items() if not cut.isdisjoint(dims)}


def _size(value: object) -> int | list[int]:
    if isinstance(value, list):
        return [int(v) for v in value]
    return int(value)  # type: ignore[call-overload, no-any-return]


def masks_by_atom(coupling: Coupling, plan: Plan) -> dict[Axis, Mask]:
    """Which indices of each prunable atom stay under ``plan``, which was made for this coupling."""
    by_name = {axis.name: axis.atom for axis in coupling.prunable}
    return {by_name[axis.name]: np.isin(np.arange(axis.width), axis.keep) for axis in plan.axes}


def kept_widths(coupling: Coupling, plan: Plan) -> dict[int, int]:
    """Axis id -> width after `plan`."""
    kept = {axis.name: len(axis.keep) for axis in plan.axes}
    return {axis.id: kept[axis.name] for axis in coupling.axes if axis.name in kept}


def remove_modules(coupling: Coupling, names: Iterable[str]) -> Plan:
    """The plan that removes the modules of these names (of ``coppice.removable``), and nothing else.

    CoppiceError where there is no such module, or one lies inside another.
    """
    known = {candidate.name: candidate for candidate in removable(coupling)}
    chosen = []
    for name in dict.fromkeys(names):
        if name not in known:
            close = difflib.get_close_matches(name, known, 3, 0.3)
            raise CoppiceError(
                f"{name!r} is no module that can go; coppice inspect --modules lists those"
                + (f", such as {', '.join(close)}" if close else "")
            )
        chosen.append(known[name])
    if not chosen:
        raise CoppiceError("no module is named; coppice inspect --modules lists those that can go")
    return plan_without(coupling, chosen)


def plan_without(coupling: Coupling, gone: Sequence[Removable]) -> Plan:
    """The plan that removes modules, and nothing else. CoppiceError where they can't all go."""
    for one, other in itertools.combinations(gone, 2):
        if reason := clash(one, other):
            raise CoppiceError(f"{one.name} and {other.name} can't both go: {reason}; name one of them")
    without: dict[Axis, int] = {axis: 0 for candidate in gone for axis in candidate.emptied}
    substitutes = {v: source for candidate in gone for v, source in candidate.substitutes.items()}
    if without and not leaves_something(coupling, without, Flow(coupling.graph).dead(substitutes)):
        raise CoppiceError(f"{', '.join(c.name for c in gone)} can't all go: nothing would be left of what they end in; leave one out")
    edits = tuple({e.path: e for candidate in gone for e in candidate.edits}.values())
    names = {candidate.name: candidate.kind for candidate in gone}
    keep = {axis: np.zeros(axis.size, bool) for axis in without}
    shell = Removal(names, edits, {}, {})
    columns = {}
    for value in coupling.graph.weights():
        ranges = [(d, *r) for d, axis in enumerate(coupling.dims[value.id]) for r in _gaps(keep_mask(axis, keep))]
        columns.update({name: tuple(ranges) for name in value.names if ranges and not shell.takes(name)})
    sizes = _attributes(coupling, without)
    full = _attributes(coupling, {})
    attributes = {
        path: {key: value for key, value in values.items() if value != full[path][key]}
        for path, values in sizes.items()
        if values != full[path] and not shell.takes(path + ".")
    }
    for candidate in gone:
        for path, values in candidate.attributes.items():
            attributes.setdefault(path, {}).update(values)
    return Plan((), {}, {}, replace(shell, columns=columns, attributes=attributes))


def _gaps(mask: Mask) -> list[tuple[int, int, int]]:
    """The runs of indices that go, as ``(size, start, stop)``."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], mask, [True])).astype(int)))
    return [(mask.size, int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def make_plan(coupling: Coupling, keep: Mapping[int, Mask]) -> Plan:
    """The plan that keeps ``keep[axis id]`` (a mask; missing: everything)."""
    prunable = coupling.prunable
    names = {axis.atom: f"a{k}" for k, axis in enumerate(prunable)}
    full = {a.id: keep.get(a.id, np.ones(a.width, bool)) for a in prunable}
    axes = tuple(PlannedAxis(a.name, a.width, tuple(np.flatnonzero(full[a.id]).tolist())) for a in prunable)
    tensors = {
        name: tuple(describe(axis, names) for axis in coupling.dims[value.id])
        for value in coupling.graph.weights()
        if any(atom in names for axis in coupling.dims[value.id] for atom in atoms(axis))
        for name in value.names
        if value.kind in (Kind.PARAMETER, Kind.BUFFER)
    }
    return Plan(axes, tensors, _attributes(coupling, {a.atom: int(full[a.id].sum()) for a in prunable}))


def remove(coupling: Coupling, indices: Mapping[str, Iterable[int]]) -> Plan:
    """The plan that removes ``indices[name]`` of the axes of these names (or of the dims, where one axis lies on them), and nothing else.

    CoppiceError where an axis is pinned, an index is not there, nothing would stay, or the code needs another axis to be cut in proportion.
    """
    keep: dict[int, Mask] = {}
    for name, gone in indices.items():
        axis, numbers = coupling.axis(name), sorted(set(gone))
        if axis.pinned is not None:
            raise CoppiceError(f"{name} can't be cut: {axis.pinned}")
        if numbers and not (numbers[0] >= 0 and numbers[-1] < axis.width):
            raise CoppiceError(f"{name} has indices 0 to {axis.width - 1}, not {numbers[0] if numbers[0] < 0 else numbers[-1]}")
        mask = keep.setdefault(axis.id, np.ones(axis.width, bool))
        mask[numbers] = False
        if not mask.any():
            raise CoppiceError(f"all {axis.width} indices of {name} would go; leave one")
    _check_proportions(coupling, keep)
    return make_plan(coupling, keep)


def _check_proportions(coupling: Coupling, keep: Mapping[int, Mask]) -> None:
    by_atom = {axis.atom: axis for axis in coupling.prunable}
    for bundle in coupling.free_bundles():
        first, *others = (by_atom[atom] for atom in bundle)
        kept = {a.id: int(keep[a.id].sum()) if a.id in keep else a.width for a in (first, *others)}
        for other in others:
            if kept[first.id] * other.width != kept[other.id] * first.width:
                raise CoppiceError(
                    f"the model's code keeps {first.name} ({first.width} wide) and {other.name} ({other.width} wide) in proportion: "
                    f"{kept[first.id]} and {kept[other.id]} indices of them can't stay; remove the same share of both"
                )


def _attributes(coupling: Coupling, widths: Mapping[Axis, int]) -> dict[str, dict[str, int | list[int]]]:
    found: dict[str, dict[str, int | list[int]]] = {}
    for (path, attribute, index), axis in coupling.bindings.items():
        size = width(find(axis), widths)
        if index is None:
            found.setdefault(path, {})[attribute] = size
        else:
            values = found.setdefault(path, {}).setdefault(attribute, list(coupling.sequences[path, attribute]))
            assert isinstance(values, list)
            values[index] = size
    return found


def compose(first: Plan, second: Plan) -> Plan:
    """The plan that does ``first`` and then ``second`` (made on the model that ``first`` gave); of widths alone in terms of one model."""
    if first.then is not None:
        return replace(first, then=compose(first.then, second))
    if second.removed is not None or second.then is not None:
        return replace(first, then=second)
    later = {axis.name: axis for axis in second.axes}
    axes = []
    for axis in first.axes:
        again = later.pop(axis.name, None)
        if again is None:
            axes.append(axis)
        elif again.width != len(axis.keep):
            raise CoppiceError(
                f"two cuts don't fit together on axis {axis.name}: {len(axis.keep)} indices kept, then {again.width} expected"
            )
        else:
            axes.append(PlannedAxis(axis.name, axis.width, tuple(axis.keep[k] for k in again.keep)))
    if any(len(axis.keep) < axis.width for axis in later.values()):
        raise CoppiceError(f"a later cut found an axis that the first cut does not know: {next(iter(later))}")
    attributes = {path: dict(values) for path, values in first.attributes.items()}
    for path, values in second.attributes.items():
        attributes.setdefault(path, {}).update(values)
    return Plan(tuple(axes), first.tensors, attributes, first.removed, weight_masks=_masks_of_both(first, second))


def _masks_of_both(first: Plan, second: Plan) -> dict[str, PackedMask]:
    """A weight stays where neither mask takes it; the first's lose the indices that the second plan removes."""
    cut = second.changed()
    found = {name: mask.sliced(cut[name]) if name in cut else mask for name, mask in first.weight_masks.items()}
    for name, mask in second.weight_masks.items():
        found[name] = PackedMask.of(mask.array() & found[name].array()) if name in found else mask
    return found


_TOKENS = re.compile(r"\(|\)|\+|a\d+|\d+")


def _read(expression: str, axes: tuple[PlannedAxis, ...], name: str) -> Mask:
    tokens = _TOKENS.findall(expression)[::-1]
    try:
        mask = _sequence(tokens, axes)
        if tokens or not expression:
            raise ValueError
    except (ValueError, IndexError):
        raise CoppiceError(f"the plan's expression {expression!r} for {name} can't be read") from None
    return mask


def _sequence(tokens: list[str], axes: tuple[PlannedAxis, ...]) -> Mask:
    """Items up to a closing bracket: with ``+`` between them a sum, else a product."""
    masks = [_item(tokens, axes)]
    summed = bool(tokens) and tokens[-1] == "+"
    while tokens and tokens[-1] != ")":
        if summed and tokens.pop() != "+":
            raise ValueError
        masks.append(_item(tokens, axes))
    if summed:
        return np.concatenate(masks)
    out = masks[0]
    for mask in masks[1:]:
        out = np.logical_and.outer(out, mask).reshape(-1)
    return out


def _item(tokens: list[str], axes: tuple[PlannedAxis, ...]) -> Mask:
    token = tokens.pop()
    if token == "(":
        mask = _sequence(tokens, axes)
        if tokens.pop() != ")":
            raise ValueError
        return mask
    if token.startswith("a"):
        axis = axes[int(token[1:])]
        mask = np.zeros(axis.width, bool)
        mask[list(axis.keep)] = True
        return mask
    return np.ones(int(token), bool)
