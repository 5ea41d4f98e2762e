"""Which modules of a network can go, found from its recorded graph: what each computes, and how the user's class does without it.

A removal is a substitution on versions of values (``coppice.flow``): a residual sum becomes its other operand, a gate one, a layer what
comes into it, a branch of a concat nothing. What then is computed for nothing is what the removal saves, and what the oracle leaves out.
How the model's own code comes to skip it is a list of edits of its modules: each is replaced by one that passes on what it is given, or
answers a constant. What no such edits can express is no candidate.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from coppice.axes import Axis, atoms, find
from coppice.cost import width
from coppice.coupling import Coupling
from coppice.flow import Constant, Flow, Source
from coppice.graph import Kind, ModuleCall, Op
from coppice.merges import merges
from coppice.pools import pools
from coppice.removals import PRODUCTS, Edit, Removable, leaves_something

ATTENTION = ("attention", "bmm")


def removable(coupling: Coupling) -> list[Removable]:
    """Every module that can go, in the order of the forward pass; each is a candidate by itself, with a name of its own."""
    return _named(Finder(coupling).found())


class Finder:
    """Looks for candidates in one graph. ``calls`` are the modules called once, outermost first; ``sizes`` those of parameters, by name."""

    def __init__(self, coupling: Coupling) -> None:
        self.coupling, self.graph = coupling, coupling.graph
        self.flow = Flow(self.graph)
        times = Counter(call.path for call in self.graph.calls)
        self.calls = [call for call in self.graph.calls if call.path and times[call.path] == 1]
        self.calls.sort(key=lambda call: (call.first - call.last, len(call.path)))  # outermost first
        self.sizes = {n: math.prod(v.shape) for v in self.graph.weights() for n in v.names if v.kind is Kind.PARAMETER}
        self.tied = {find(axis) for tie in coupling.ties for axis in tie}
        self._seen: set[frozenset[tuple[int, Source]]] = set()

    def found(self) -> list[Removable]:
        found = [c for k, op in enumerate(self.graph.ops) for c in self._at(k, op) if c is not None]
        found += [c for call in self.calls if (c := self._layer(call)) is not None]
        found += [*pools(self), *merges(self)]
        return sorted(found, key=lambda c: (c.at, -len(c.dead)))

    def _at(self, k: int, op: Op) -> Iterator[Removable | None]:
        function = op.attrs.get("function")
        if function == "add" and len(op.inputs) == 2:
            yield from self._residual(k)
        elif function == "multiply" and len(op.inputs) == 2:
            yield from self._gate(k)
        elif op.rule == "concat":
            yield from self._branches(k)

    # --- what can go ------------------------------------------------------------------------------------------------

    def _residual(self, k: int) -> Iterator[Removable | None]:
        """A sum becomes one of its operands, if what made the other began at that operand, or where that operand's own branch began."""
        total = self.flow.writes[k][0]
        operands = [self.flow.at(v, k) for v in self.graph.ops[k].inputs]
        sides = [(stays, goes) for stays, goes in (operands, operands[::-1]) if stays is not None and goes is not None]
        dead = {goes: self.flow.dead({total: stays}) for stays, goes in sides}
        for stays, goes in sides:
            if stays == goes or self.flow.shape(stays) != self.flow.shape(total) or not self._is_worth(dead[goes]):
                continue
            begins = self.flow.entries(dead[goes])
            twin = begins == self.flow.entries(dead[stays]) and self._macs(dead[goes]) > self._macs(dead[stays])
            if stays in begins or twin:
                yield self._sum_without(k, stays, goes)

    def _sum_without(self, k: int, stays: int, goes: int) -> Removable | None:
        total = self.flow.writes[k][0]
        clipped = self._clipped_alike(total, stays)
        for target in (clipped, total):
            if target is not None and (edit := self._passing(target, stays, self.flow.dead({target: stays}))) is not None:
                return self._candidate({target: stays}, [edit], self._what(self.flow.dead({total: stays})))
        dead = self.flow.dead({total: stays})
        owner = next((call for call in self.calls if call.path == self.graph.ops[k].module), None)
        if owner is not None and (edit := self._chain(owner, {total: stays}, dead)) is not None:
            return self._candidate({total: stays}, [edit], self._what(dead), owner.path)
        if self.flow.value[total] == self.flow.value[goes]:
            return None  # the code adds in place: a zero that broadcasts can't hold the sum
        edit = self._constant(self._behind_products(goes), Constant.ZERO, dead)
        return None if edit is None else self._candidate({total: stays}, [edit], self._what(dead), self.graph.ops[k].module)

    def _clipped_alike(self, total: int, stays: int) -> int | None:
        """What an activation makes of ``total``, if nothing else reads that, and ``stays`` went through such a one before."""
        uses = self.flow.uses[total]
        if len(uses) != 1 or self.graph.ops[uses[0]].attrs.get("function") != "clip":
            return None
        return self.flow.writes[uses[0]][0] if self.is_clipped(stays, self.graph.ops[uses[0]].attrs["bounds"]) else None

    def is_clipped(self, version: int, bounds: tuple[Any, ...]) -> bool:
        """Whether clipping changes nothing: the values were so clipped, and at most picked or moved since."""
        made_by = self.flow.made_by[version]
        while made_by is not None:
            op = self.graph.ops[made_by]
            if op.attrs.get("function") == "clip":
                return bool(op.attrs["bounds"] == bounds)
            if op.rule not in ("view", "permute") and not op.attrs.get("picks"):
                return False
            made_by = self.flow.made_by[self.flow.reads[made_by][0]]
        return False

    def _what(self, dead: frozenset[int]) -> str:
        rules = {self.graph.ops[k].rule for k in dead if self.graph.ops[k].rule in PRODUCTS}
        return "attention" if rules & set(ATTENTION) else "mlp" if rules == {"mm"} else "residual"

    def _behind_products(self, version: int) -> int:
        """The version that is zero where ``version`` must be: back through products with a weight."""
        made_by = self.flow.made_by[version]
        while made_by is not None and self.graph.ops[made_by].attrs.get("function") == "multiply":
            inputs = self.graph.ops[made_by].inputs
            computed = [v for v in inputs if v is not None and self.graph.values[v].kind is Kind.INTERMEDIATE]
            before = self.flow.at(computed[0], made_by) if len(computed) == 1 else None
            if before is None:
                break
            version, made_by = before, self.flow.made_by[before]
        return version

    def _gate(self, k: int) -> Iterator[Removable | None]:
        """A product of a tensor with a sigmoid-like function of that tensor becomes the tensor."""
        total = self.flow.writes[k][0]
        operands = [self.flow.at(v, k) for v in self.graph.ops[k].inputs]
        for stays, gate in (operands, operands[::-1]):
            if stays is None or gate is None or self.flow.shape(stays) != self.flow.shape(total):
                continue
            made_by = self.flow.made_by[gate]
            dead = self.flow.dead({total: stays})
            is_gate = made_by is not None and self.graph.ops[made_by].attrs.get("function") == "gate"
            if is_gate and self._is_worth(dead) and stays in self.flow.entries(dead):
                edit = self._passing(total, stays, dead)
                if edit is not None:
                    yield self._candidate({total: stays}, [edit], "gate")
                elif (edit := self._constant(gate, Constant.ONE, dead)) is not None:
                    yield self._candidate({total: stays}, [edit], "gate", self.graph.ops[k].module)

    def _branches(self, k: int) -> Iterator[Removable | None]:
        """A part of a concat that nothing but concats read goes, with the columns of all that reads these."""
        op = self.graph.ops[k]
        for value in dict.fromkeys(op.inputs):
            version = self.flow.at(value, k)
            if version is None or self.flow.uses[version][0] != k or version in self.flow.outputs:
                continue
            readers = [self.graph.ops[j] for j in self.flow.uses[version]]
            dim = op.attrs["dim"]
            if any(r.rule != "concat" or r.attrs["dim"] != dim or len(set(r.inputs)) < 2 for r in readers):
                continue
            dead = self.flow.dead({version: Constant.NOTHING})
            emptied = tuple(dict.fromkeys(atoms(self.coupling.dims[self.flow.value[version]][dim])))
            if self._is_worth(dead) and self._can_empty(emptied, dead):
                edit = self._constant(self._before_code(version), Constant.NOTHING, dead)
                yield None if edit is None else self._candidate({version: Constant.NOTHING}, [edit], "branch", emptied=emptied)

    def _before_code(self, version: int) -> int:
        """What a module gives that ``version`` is made of by functions of one number each in the code, which leave nothing nothing."""
        while not any(call.bare and self.gives(call, version) for call in self.calls):
            k = self.flow.made_by[version]
            if k is None or self.graph.ops[k].rule != "pointwise" or len(self.flow.reads[k]) != 1:
                break
            if self.flow.only_use(self.flow.reads[k][0]) is None:
                break
            version = self.flow.reads[k][0]
        return version

    def _can_empty(self, emptied: tuple[Axis, ...], dead: frozenset[int]) -> bool:
        """Whether nothing else would be left without any index."""
        if any(axis.pinned or axis in self.tied for axis in emptied):
            return False
        return leaves_something(self.coupling, emptied, dead)

    def _layer(self, call: ModuleCall) -> Removable | None:
        """A module that gives a tensor of the shape of the one tensor that it is given."""
        if not call.bare or len(call.inputs) != 1 or call.first == call.last:
            return None
        before, after = self.flow.at(call.inputs[0], call.first), self.flow.at(call.outputs[0], call.last)
        if before is None or after is None or before == after or self.flow.shape(before) != self.flow.shape(after):
            return None
        dead = self.flow.dead({after: before})
        inside = all(call.first <= k < call.last for k in dead)
        edit = self._passing(after, before, dead) if inside and self._is_worth(dead) else None
        return None if edit is None else self._candidate({after: before}, [edit], "layer")

    # --- how the code does without it -------------------------------------------------------------------------------

    def _passing(self, target: int, source: int, dead: frozenset[int]) -> Edit | None:
        """The outermost module that gives ``target`` and is given ``source``, as one that passes that on."""
        for call in self.calls:
            if call.bare and self.gives(call, target) and self._is_dead(call, dead):
                given = [self.flow.at(v, call.first) for v in call.inputs]
                if source in given:
                    return _pass_on(call, given.index(source))
        return None

    def _constant(self, target: int, constant: Constant, dead: frozenset[int]) -> Edit | None:
        """The outermost module that gives ``target``, as one that answers a constant."""
        call = next((c for c in self.calls if c.bare and self.gives(c, target) and self._is_dead(c, dead)), None)
        return None if call is None else Edit(call.path, constant.value, {"dims": len(self.flow.shape(target))})

    def _chain(self, owner: ModuleCall, substitutes: Mapping[int, Source], dead: frozenset[int]) -> Edit | None:
        """``owner`` as those of its modules that still count, one after the other; None where they are no chain."""
        if not owner.bare or len(owner.inputs) != 1:
            return None
        steps: list[str] = []
        now, k = self.flow.at(owner.inputs[0], owner.first), owner.first
        inside = [c for c in self.graph.calls if c.path.startswith(owner.path + ".") and c.bare and len(c.inputs) == 1]
        while k < owner.last:
            if k in dead or self._writes_unread(k):
                k += 1
                continue
            within = [c for c in inside if c.first <= k < c.last and self._resolved(self.flow.at(c.inputs[0], c.first), substitutes) == now]
            if not within:
                return None
            step = max(within, key=lambda c: (c.last - c.first, -len(c.path)))
            steps.append(step.path[len(owner.path) + 1 :])
            now, k = self.flow.at(step.outputs[0], step.last), step.last
        ends = self._resolved(self.flow.at(owner.outputs[0], owner.last), substitutes)
        return Edit(owner.path, "chain", {"steps": steps}) if steps and ends == now else None

    @staticmethod
    def _resolved(version: int | None, substitutes: Mapping[int, Source]) -> Source | None:
        while version is not None and version in substitutes:
            source = substitutes[version]
            if not isinstance(source, int):
                return source
            version = source
        return version

    def gives(self, call: ModuleCall, version: int) -> bool:
        return self.flow.at(call.outputs[0], call.last) == version

    def _is_dead(self, call: ModuleCall, dead: frozenset[int]) -> bool:
        return all(k in dead or not self.flow.writes[k] or self._writes_unread(k) for k in range(call.first, call.last))

    def _writes_unread(self, k: int) -> bool:
        return not any(self.flow.uses[v] or v in self.flow.outputs for v in self.flow.writes[k])

    def _candidate(
        self, substitutes: dict[int, Source], edits: list[Edit], kind: str, owner: str | None = None, emptied: tuple[Axis, ...] = ()
    ) -> Removable | None:
        """The candidate, with all other modules that only the removed ones need out of the way; None where some product stays."""
        key = frozenset(substitutes.items())
        if key in self._seen:
            return None
        dead = self.flow.dead(substitutes)
        covered = {k for call in self.calls for e in edits if e.path == call.path for k in range(call.first, call.last)}
        reshaped = False
        for call in self.calls:
            inside = any(e.path == call.path or call.path.startswith(e.path + ".") for e in edits)
            around = any(e.path.startswith(call.path + ".") for e in edits)
            ops = range(call.first, call.last)
            if not inside and not around and call.inputs and self._is_dead(call, dead) and self._has_weights(ops):
                edits.append(_pass_on(call, 0))
                covered.update(ops)
                reshaped = reshaped or call.inputs[0] is None or self.graph.shape(call.inputs[0]) != self.graph.shape(call.outputs[0] or 0)
        in_the_code = [self.graph.ops[k].rule for k in dead - covered]
        if any(self.graph.ops[k].rule in PRODUCTS for k in dead - covered if self._has_weights([k])):
            return None
        if reshaped and any(rule not in ("pointwise", "spatial2d") for rule in in_the_code):
            return None  # code that reshapes what a module gave fails on what is passed on instead
        self._seen.add(key)
        name = edits[0].path if owner is None else f"{owner}:{kind}" if owner else kind
        macs, params = self._saved(dead, emptied)
        span = (min(dead | covered), max(dead | covered) + 1)
        return Removable(name, kind, substitutes, dead, tuple(edits), macs, params, min(dead), emptied, span=span)

    def _saved(self, dead: frozenset[int], emptied: tuple[Axis, ...]) -> tuple[int, int]:
        """MACs and parameters of the ops that go, and of the columns that go elsewhere."""
        without, gone = dict.fromkeys(emptied, 0), self.flow.weights_of(dead)
        columns = sum(t.evaluate({}) - t.evaluate(without) for k, info in enumerate(self.coupling.ops) if k not in dead for t in info.macs)
        params = 0
        for value in self.graph.weights():
            if value.kind is Kind.PARAMETER:
                stays = 0 if value.id in gone else math.prod(width(axis, without) for axis in self.coupling.dims[value.id])
                params += math.prod(value.shape) - stays
        return self._macs(dead) + columns, params

    def _has_weights(self, ops: Iterable[int]) -> bool:
        kinds = (Kind.PARAMETER, Kind.BUFFER)
        return any(self.graph.values[self.flow.value[v]].kind in kinds for k in ops for v in self.flow.reads[k])

    def _is_worth(self, dead: frozenset[int]) -> bool:
        """Whether a product with a weight goes."""
        return any(self.graph.ops[k].rule in PRODUCTS for k in dead)

    def _macs(self, dead: frozenset[int]) -> int:
        return sum(term.evaluate({}) for k in dead for term in self.coupling.ops[k].macs)


def _pass_on(call: ModuleCall, argument: int) -> Edit:
    """``call``'s module as one that passes on an argument, in what the module used to answer."""
    if call.bare and len(call.inputs) == 1:
        return Edit(call.path, "identity")
    returns = None if call.bare else [value is not None for value in call.outputs]
    return Edit(call.path, "pass", {"argument": argument, "returns": returns})


def _named(found: list[Removable]) -> list[Removable]:
    """The same with every name once: a second one of a name gets its kind, or a number."""
    used: set[str] = set()
    out = []
    for candidate in found:
        name = candidate.name
        stem = name if ":" in name else f"{name}:{candidate.kind}"
        choices = itertools.chain((name, stem), (f"{stem}.{k}" for k in itertools.count(2)))
        out.append(replace(candidate, name=next(choice for choice in choices if choice not in used)))
        used.add(out[-1].name)
    return out
