"""Proof that a model without some modules computes what it should: the dense recording, with each removed value substituted.

The oracle is the dense program in double precision (``coppice.torch.replay``): ops that the removal makes dead are not run, a removed value
is the one that stays (the shortcut of a residual sum), or a constant, and where a branch of a concat is gone its columns are out of effect
in whatever sums over them. The pruned model's own code runs on the same weights.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.coupling import Coupling, couple
from coppice.errors import CoppiceError, VerificationError
from coppice.flow import Constant, Flow, Source, Strided
from coppice.graph import Op
from coppice.modules import removable
from coppice.planning import Plan
from coppice.removals import Removable
from coppice.torch.apply import apply, without_modules
from coppice.torch.capture import Replayable, capture, decisions_of, in_double, record
from coppice.torch.decisions import Decision
from coppice.torch.replay import Replay
from coppice.torch.verify import TOLERANCE, check_tensors, randomise, relative_error, same_draws, verify
from coppice.verification import largest_error


class _Shortened(Replay):
    """A replay in which versions are replaced as candidates say."""

    def __init__(self, coupling: Coupling, model: nn.Module, inputs: tuple[Any, ...], gone: Sequence[Removable]) -> None:
        keep = {axis: np.zeros(axis.size, bool) for candidate in gone for axis in candidate.emptied}
        super().__init__(coupling, model, inputs, keep)
        self.flow = Flow(coupling.graph)
        self.substitutes: dict[int, Source] = {v: s for candidate in gone for v, s in candidate.substitutes.items()}
        self.dead = self.flow.dead(self.substitutes)
        self._snapshots: dict[int, Tensor] = {}
        self._made: defaultdict[int, list[int]] = defaultdict(list)  # op -> the versions that it makes and something is replaced by
        self._strides = {k: stride for candidate in gone for k, stride in candidate.strides.items()}
        sources = (s.version if isinstance(s, Strided) else s for s in self.substitutes.values() if not isinstance(s, Constant))
        for version in dict.fromkeys(sources):
            made_by = self.flow.made_by[version]
            if made_by is None:
                self._snapshots[version] = self.env[self.flow.value[version]].clone()
            else:
                self._made[made_by].append(version)

    def _step(self, op: Op, index: int, call: Replayable) -> list[Tensor]:
        if index in self._strides:
            call = replace(call, args=(*call.args[:3], list(self._strides[index]), *call.args[4:]))
        outs = [] if index in self.dead else super()._step(op, index, call)
        for version in self.flow.writes[index]:
            if version in self.substitutes:
                self.env[self.flow.value[version]] = self._source(version, self.substitutes[version])
        for version in self._made[index]:
            self._snapshots[version] = self.env[self.flow.value[version]].clone()
        return outs or [self.env[v] for v in op.outputs if v in self.env]

    def _source(self, version: int, source: Source) -> Tensor:
        if isinstance(source, Constant):  # a branch that is gone is masked wherever it is read
            return torch.full(self.flow.shape(version), float(source is Constant.ONE), dtype=torch.float64)
        if isinstance(source, Strided):
            found = self._snapshots[source.version]
            for back, step in enumerate(reversed(source.steps), 1):
                places = torch.arange(0, found.shape[-back], step)
                found = found.index_select(found.dim() - back, places)
            return found
        return self._snapshots[source].clone()


def verify_cuts(model: nn.Module, pruned: nn.Module, coupling: Coupling, plan: Plan) -> tuple[float, tuple[str, ...], str | None]:
    """Largest error, what was checked, and a detour of the last cut. VerificationError where a cut is wrong."""
    worst, checked, detour = 0.0, [], None
    cuts = plan.cuts
    for k, cut in enumerate(cuts):
        here = couple(capture(model, coupling.graph.origin.inputs)) if k else coupling
        if cut.removed is not None:
            error = _compare(model, here, cut)
            names = list(cut.removed.names)
            said = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            checked.append(f"without {said}, the model equals the oracle in fp64 (relative error {error:.1e})")
            worst = max(worst, error)
            model = without_modules(model, cut.removed)
        widths = replace(cut, removed=None)
        after = pruned if k == len(cuts) - 1 else apply(model, widths)
        if not widths.changed() and not widths.weight_masks:
            checked.append(_same(model, after, coupling.graph.origin.inputs))
            continue
        if cut.removed is not None:
            here = couple(capture(model, coupling.graph.origin.inputs))
        found = verify(model, after, here, widths)
        worst, detour = max(worst, found.max_error), found.detour
        checked += found.checked
        model = after
    return worst, tuple(checked), detour


def _same(model: nn.Module, after: nn.Module, inputs: tuple[Any, ...]) -> str:
    """That nothing else was changed: the same tensors and, in the model's own precision, the same outputs."""
    said = check_tensors(model, after, Plan((), {}, {}))
    with same_draws():
        _, want, _ = record(model, inputs)
    with same_draws():
        _, have, error = record(after, inputs)
    if error is not None or not all(relative_error(a, b) == 0 for a, b in zip(*(_tensors(o) for o in (have, want)), strict=True)):
        raise VerificationError(
            "the pruned model is not the dense one without the plan's modules; give the model that the plan was applied to"
        )
    return said


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]


def _compare(model: nn.Module, coupling: Coupling, cut: Plan) -> float:
    """The largest error of ``model`` without the modules of ``cut``, with its own weights and with random ones."""
    assert cut.removed is not None
    known = {candidate.name: candidate for candidate in removable(coupling)}
    if missing := [name for name in cut.removed.names if name not in known]:
        raise CoppiceError(f"the plan removes {missing[0]}, which is no module that can go from this model; give the model it was made for")
    gone = [known[name] for name in cut.removed.names]
    worst = 0.0
    for own in (True, False):
        dense = copy.deepcopy(model).double()
        if not own:
            randomise(dense)
        shallow = without_modules(dense, cut.removed)
        worst = max(worst, _error(dense, shallow, coupling, gone))
    return worst


def _error(dense: nn.Module, shallow: nn.Module, coupling: Coupling, gone: Sequence[Removable]) -> float:
    inputs, names = in_double(coupling.graph.origin.inputs), ", ".join(c.name for c in gone)
    decisions = [Decision(d.op, in_double(d.answer)) for d in decisions_of(coupling.graph)]
    with same_draws():
        _, output, error = record(shallow, inputs, None, decisions, double=True)
    if error is not None:
        raise VerificationError(f"without {names} the model's code fails: {error}") from error
    have = {id(t): t for t in _tensors(output)}.values()
    try:
        with same_draws():
            want = _Shortened(coupling, dense, coupling.graph.origin.inputs, gone).run()
    except RuntimeError as problem:
        raise VerificationError(f"the oracle can't be computed without {names}, so nothing proves it right: {problem}") from problem
    if len(have) != len(want):
        raise VerificationError(f"without {names} the model gives {len(have)} outputs, not {len(want)}")
    worst = largest_error(relative_error(a, b) for a, b in zip(have, want, strict=True))
    if not worst <= TOLERANCE:
        raise VerificationError(f"without {names} the model's output is off by {worst:.1e} of its scale")
    return worst
