"""Verification: proof that the pruned model computes what the plan promises. Always on; a mismatch is an error, never a saved file.

Checked, in this order: every tensor is the kept part of the dense one, bit for bit; every op of the pruned model's forward gives the
planned shapes, in lockstep with the dense recording; the pruned model equals the oracle (``coppice.torch.replay``: the dense program
with the removed indices out of effect) in double precision.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.axes import Axis, atoms
from coppice.coupling import Coupling, Mask
from coppice.errors import VerificationError
from coppice.graph import Op
from coppice.masking import places_in_dense
from coppice.planning import Plan, masks_by_atom
from coppice.torch.apply import sliced
from coppice.torch.capture import OnOp, Recorder, decisions_of, in_double, record
from coppice.torch.decisions import Decision
from coppice.torch.lockstep import Step, first_difference, planned, step
from coppice.torch.replay import Replay
from coppice.torch.trees import named_tensors
from coppice.verification import Verification, largest_error

TOLERANCE = 1e-7  # of the largest output; double precision leaves nine more orders for a real mistake to show


def verify(model: nn.Module, pruned: nn.Module, coupling: Coupling, plan: Plan) -> Verification:
    """Compare ``pruned`` with what ``plan`` makes of ``model``, before any fine-tuning. VerificationError names the op, module and axes.

    The two run twice: with their own weights, and with the same random weights put in both, since trained (or zero-initialised) weights can
    hide a mistake. A plan that removes modules is verified cut by cut, each first without its modules, then at its widths.
    """
    start = time.perf_counter()
    if plan.removed is not None or plan.then is not None:
        from coppice.torch.depth import verify_cuts

        error, checked_cuts, detour = verify_cuts(model, pruned, coupling, plan)
        return Verification(error, checked_cuts, time.perf_counter() - start, detour)
    if plan.weight_masks:
        model, plan = _masked(model, plan)
    checked = [check_tensors(model, pruned, plan)]
    keep = masks_by_atom(coupling, plan)
    worst, detour = 0.0, None
    for weights in ("its own", "random"):
        error, detour = _compare(model, pruned, coupling, keep, plan if weights == "random" else None)
        worst = max(worst, error)
        checked.append(f"with {weights} weights, sliced equals the oracle in fp64 (relative error {error:.1e})")
    if decisions_of(coupling.graph):
        _check_own_decisions(pruned, coupling)
        checked.append("the code also runs through where it decides by its own values")
    if detour is None:
        checked.insert(1, f"{len(coupling.graph.ops)} recorded ops, each with the planned shapes")
    else:
        checked.insert(1, f"recorded ops up to {detour}, each with the planned shapes; from there the code takes another way")
    return Verification(worst, tuple(checked), time.perf_counter() - start, detour)


def _masked(model: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    """The dense model with the plan's zeros at the places that they have in it, and the plan without its masks."""
    dense = copy.deepcopy(model)
    tensors = named_tensors(dense)
    for name in plan.weight_masks:
        stays = places_in_dense(plan, name, tuple(tensors[name].shape))
        tensors[name].data.masked_fill_(torch.from_numpy(~stays), 0)
    return dense, replace(plan, weight_masks={})


def _compare(
    model: nn.Module, pruned: nn.Module, coupling: Coupling, keep: dict[Axis, Mask], randomised: Plan | None
) -> tuple[float, str | None]:
    """The largest error, and where the code took another way; in a function of its own, so that one pair of copies is alive at a time."""
    dense, small = copy.deepcopy(model).double(), copy.deepcopy(pruned).double()
    if randomised is not None:
        _randomise(dense, small, randomised)
    comparison = _Comparison(dense, small, coupling, keep)
    return comparison.error(), comparison.detour


def _check_own_decisions(pruned: nn.Module, coupling: Coupling) -> None:
    error = record(pruned, coupling.graph.origin.inputs)[2]
    if error is not None:
        raise VerificationError(f"the pruned model fails where it decides by its own values: {error}") from error


def _randomise(dense: nn.Module, small: nn.Module, plan: Plan) -> None:
    """The same random weights in both."""
    randomise(dense)
    changed = plan.changed()
    tensors = named_tensors(small)
    for name, tensor in named_tensors(dense).items():
        masks = changed.get(name)
        tensors[name].data.copy_(sliced(tensor, masks) if masks else tensor)


def randomise(dense: nn.Module) -> None:
    """Random weights: scaled by fan-in, positive where there is one a channel (a variance must be)."""
    generator = torch.Generator().manual_seed(0)
    done: set[int] = set()
    buffers = {name for name, _ in dense.named_buffers()}
    for name, tensor in named_tensors(dense).items():
        if id(tensor) in done or not tensor.is_floating_point() or (name in buffers and "running_" not in name):
            continue
        done.add(id(tensor))
        noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
        fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 0
        tensor.data.copy_((noise - 0.45) * (3.0 / fan_in) ** 0.5 if fan_in else 0.5 + noise)


def check_tensors(model: nn.Module, pruned: nn.Module, plan: Plan) -> str:
    """Every tensor is the dense one's kept part, bit for bit."""
    dense, small = named_tensors(model), named_tensors(pruned)
    changed = plan.changed()
    if dense.keys() != small.keys():
        raise VerificationError(f"the pruned model has other tensors than the dense one: {min(dense.keys() ^ small.keys())}")
    for name, tensor in dense.items():
        masks = changed.get(name)
        want = sliced(tensor, masks) if masks else tensor
        if tuple(small[name].shape) != tuple(want.shape):
            raise VerificationError(
                f"{name} has shape {tuple(small[name].shape)}, the plan says {tuple(want.shape)} (axes {plan.tensors.get(name)})"
            )
        if not torch.equal(small[name], want) and not torch.equal(torch.nan_to_num(small[name]), torch.nan_to_num(want)):
            raise VerificationError(f"{name} does not hold the dense model's kept values; verify right after apply, before any training")
    return f"{len(dense)} tensors hold the dense model's kept values"


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| over max |b|; equal infinities and NaN count as equal."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)
    gap = torch.where(same, torch.zeros_like(a), (a - b).abs()).max().item()
    return gap / max(b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0, 1e-300)


@contextmanager
def same_draws() -> Iterator[None]:
    """Code that draws random numbers draws the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@dataclass(slots=True)
class _Comparison:
    """The pruned model ``small`` against the oracle of ``dense``, both in double precision."""

    dense: nn.Module
    small: nn.Module
    coupling: Coupling
    keep: dict[Axis, Mask]
    detour: str | None = None  # the first op at which the pruned model's code takes another way

    def error(self) -> float:
        """The largest relative error of any output; VerificationError where an op's shapes or an output's values disagree."""
        recorder, output = self._record()
        pairs = self._paired(recorder)
        have = {id(t): t for t in tree_flatten(output)[0] if isinstance(t, Tensor)}.values()
        try:
            with same_draws():
                want = self._replay(recorder).run({k: recorder.ops[j].call for k, j in pairs.items()})
        except RuntimeError as error:
            raise VerificationError(f"the oracle can't be computed, so nothing proves this plan right: {error}") from error
        worst = largest_error(relative_error(a, b) for a, b in zip(have, want, strict=True))
        if not worst <= TOLERANCE:
            raise VerificationError(
                f"the pruned model's output is off by {worst:.1e} of its scale; the first op that differs is {self._first_wrong(pairs)}"
            )
        return worst

    def _replay(self, recorder: Recorder) -> Replay:
        origin = self.coupling.graph.origin
        return Replay(self.coupling, self.dense, origin.inputs, self.keep, _numbers(origin.constants, recorder.constants))

    def _record(self, on_op: OnOp | None = None) -> tuple[Recorder, Any]:
        decisions = [Decision(d.op, in_double(d.answer)) for d in decisions_of(self.coupling.graph)]
        with same_draws():
            recorder, output, error = record(self.small, in_double(self.coupling.graph.origin.inputs), on_op, decisions, double=True)
        if error is not None:
            dense, small = self._steps(recorder)
            op = self.coupling.graph.ops[dense[first_difference(dense, small) or 0].index]
            raise VerificationError(
                f"the pruned model fails at {op.name} in {_place(op.module)} (axes {self._axes_of(op)}): {error}"
            ) from error
        return recorder, output

    def _steps(self, recorder: Recorder) -> tuple[list[Step], list[Step]]:
        """What the plan says and what ran."""
        runs = [step(k, op, [recorder.values[v].shape for v in op.outputs]) for k, op in enumerate(recorder.ops)]
        return planned(self.coupling, {a: int(m.sum()) for a, m in self.keep.items()}), [s for s in runs if s is not None]

    def _paired(self, recorder: Recorder) -> dict[int, int]:
        """Dense op -> op of the pruned model's run, after checking that each gives the planned shapes.

        Code may take another way at other widths (``einsum`` does where one is 1): then only those ops are paired that both ways share, and
        what the others compute is for the outputs to show.
        """
        graph = self.coupling.graph
        dense, small = self._steps(recorder)
        at = first_difference(dense, small)
        if at is None:
            return {a.index: b.index for a, b in zip(dense, small, strict=True)}
        op = graph.ops[dense[at].index]
        if at < len(small) and small[at].name == dense[at].name:
            raise VerificationError(
                f"{op.name} in {_place(op.module)} gives {_sizes(small[at])}, the plan says {_sizes(dense[at])} (axes {self._axes_of(op)})"
            )
        self.detour = f"{op.name} in {_place(op.module)}"
        ours = [(graph.ops[s.index].module, s.name, s.shapes) for s in dense]
        theirs = [(recorder.ops[s.index].module, s.name, s.shapes) for s in small]
        blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
        return {dense[b.a + k].index: small[b.b + k].index for b in blocks for k in range(b.size)}

    def _first_wrong(self, pairs: dict[int, int]) -> str:
        """Run both again in lockstep and name the first op whose results differ."""
        have: list[Tensor | None] = []
        recorder, _ = self._record(lambda op, outs: have.append(outs[0].clone() if outs else None))
        wrong: list[int] = []

        def watch(k: int, outs: list[Tensor]) -> None:
            ours = have[pairs[k]] if k in pairs else None
            if ours is not None and outs and not wrong and not relative_error(ours, outs[0]) <= TOLERANCE:
                wrong.append(k)

        with same_draws():
            self._replay(recorder).run({k: recorder.ops[j].call for k, j in pairs.items() if j < len(recorder.ops)}, watch)
        if not wrong:
            return "none: the outputs are put together differently"
        op = self.coupling.graph.ops[wrong[0]]
        return f"{op.name} in {_place(op.module)} (axes {self._axes_of(op)})"

    def _axes_of(self, op: Op) -> str:
        names = {a.atom: a.name for a in self.coupling.prunable}
        found = dict.fromkeys(names[atom] for v in op.outputs for d in self.coupling.dims[v] for atom in atoms(d) if atom in names)
        return ", ".join(found) or "none"


def _numbers(dense: dict[int, Tensor], small: dict[int, Tensor]) -> dict[int, Tensor]:
    """Tensors that the code made of one number (``torch.tensor(x.shape[1])``) as the pruned model has them, paired in order."""
    if [t.shape for t in dense.values()] != [t.shape for t in small.values()]:
        return {}
    return {k: new for (k, old), new in zip(dense.items(), small.values(), strict=True) if old.numel() == 1}


def _sizes(step: Step) -> str:
    return f"{list(step.shapes)}" + (f" told {list(step.told)}" if step.told else "")


def _place(module: str) -> str:
    return module or "the model's own forward"
