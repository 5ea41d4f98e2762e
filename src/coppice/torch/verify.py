"""Verification: proof that the pruned model computes what the plan promises. Always on; a mismatch is an error, never a saved file.

Checked, in this order: every tensor has the planned shape; every op of the pruned model's forward gives the planned shapes, in lockstep with
the dense recording; the sliced model equals the oracle (``coppice.torch.replay``: the dense program with the removed indices out
of effect) in double precision; kept weights are the dense ones, bit for bit.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.axes import Axis, atoms
from coppice.coupling import Coupling, Mask
from coppice.errors import VerificationError
from coppice.planning import Plan
from coppice.torch.capture import Recorder, Replayable, record
from coppice.torch.lockstep import Step, first_difference, planned_shapes, steps
from coppice.torch.replay import Replay, in_double

TOLERANCE = 1e-7  # of the largest output; double precision leaves nine more orders for a real mistake to show


@dataclass(frozen=True, slots=True)
class Verification:
    """``max_error`` is relative to the largest output; ``checked`` says what was compared, in words."""

    max_error: float
    checked: tuple[str, ...]
    seconds: float


def verify(model: nn.Module, pruned: nn.Module, coupling: Coupling, plan: Plan) -> Verification:
    """Compare ``pruned`` with what ``plan`` makes of ``model``. VerificationError names the op, the module and the axes."""
    start = time.perf_counter()
    checked = [_check_tensors(model, pruned, plan)]
    by_name = {a.name: a for a in coupling.prunable}
    keep: dict[Axis, Mask] = {}
    for axis in plan.axes:
        mask = np.zeros(axis.width, bool)
        mask[list(axis.keep)] = True
        keep[by_name[axis.name].atom] = mask
    double = copy.deepcopy(pruned).double()
    inputs = in_double(coupling.graph.origin.inputs)
    recorder, output = _run(double, inputs, coupling)
    numbers = _check_steps(recorder, coupling, {a: int(m.sum()) for a, m in keep.items()}, checked)
    error = _check_outputs(model, output, coupling, keep, recorder, numbers)
    checked.append(f"sliced equals the oracle in fp64 (relative error {error:.1e})")
    return Verification(error, tuple(checked), time.perf_counter() - start)


def _check_tensors(model: nn.Module, pruned: nn.Module, plan: Plan) -> str:
    dense = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    small = {**dict(pruned.named_parameters(remove_duplicate=False)), **dict(pruned.named_buffers(remove_duplicate=False))}
    changed = plan.changed()
    if dense.keys() != small.keys():
        raise VerificationError(f"the pruned model has other tensors than the dense one: {sorted(dense.keys() ^ small.keys())[0]}")
    for name, tensor in dense.items():
        masks = changed.get(name)
        shape = tuple(int(m.sum()) for m in masks) if masks else tuple(tensor.shape)
        if tuple(small[name].shape) != shape:
            raise VerificationError(f"{name} has shape {tuple(small[name].shape)}, the plan says {shape} (axes {plan.tensors.get(name)})")
    return f"{len(dense)} tensors have the planned shapes"


def _run(double: nn.Module, inputs: Any, coupling: Coupling) -> tuple[Recorder, Any]:
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1

    try:
        return record(double, inputs, count)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError, ZeroDivisionError) as error:
        ops = coupling.graph.ops
        op = ops[min(done, len(ops) - 1)]
        raise VerificationError(f"the pruned model fails after {done} ops, about {op.name} in {_place(op.module)}: {error}") from error


def _check_steps(recorder: Recorder, coupling: Coupling, widths: dict[Axis, int], checked: list[str]) -> dict[int, Replayable]:
    """Planned shapes at every op; answers the pruned model's calls by dense op, for the numbers that its code computed."""
    shapes = planned_shapes(coupling, widths)
    graph = coupling.graph
    dense = [Step(s.index, s.name, tuple(shapes[v] for v in graph.ops[s.index].outputs[:1])) for s in steps(graph.ops, [v.shape for v in graph.values])]
    small = steps(recorder.ops, [v.shape for v in recorder.values])
    at = first_difference(dense, small, finished=True)
    if at is not None:
        op = graph.ops[dense[at].index]
        have = f"{small[at].name} {list(small[at].shapes)}" if at < len(small) else "nothing"
        axes = sorted({a.name for v in op.outputs for d in coupling.dims[v] for atom in atoms(d) for a in coupling.prunable if a.atom is atom})
        raise VerificationError(
            f"{op.name} in {_place(op.module)} gives {have}, the plan says {dense[at].name} {list(dense[at].shapes)} (axes {', '.join(axes) or 'none'})"
        )
    checked.append(f"{len(dense)} ops give the planned shapes")
    return {a.index: recorder.ops[b.index].call for a, b in zip(dense, small, strict=True)}


def _check_outputs(
    model: nn.Module, output: Any, coupling: Coupling, keep: dict[Axis, Mask], recorder: Recorder, numbers: dict[int, Replayable]
) -> float:
    have = list({id(t): t for t in tree_flatten(output)[0] if isinstance(t, Tensor)}.values())
    want = Replay(coupling, model, coupling.graph.origin.inputs, keep).run(numbers)
    worst = 0.0
    for a, b in zip(have, want, strict=True):
        error = relative_error(a, b)
        if not error <= TOLERANCE:
            raise VerificationError(f"the pruned model's output is off by {error:.1e} of its scale; {_first_wrong(model, coupling, keep, recorder, numbers)}")
        worst = max(worst, error)
    return worst


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


def _first_wrong(model: nn.Module, coupling: Coupling, keep: dict[Axis, Mask], recorder: Recorder, numbers: dict[int, Replayable]) -> str:
    """Replay both in lockstep and name the first op whose results differ."""
    ours = {index: k for k, index in enumerate(numbers)}
    results: dict[int, list[Tensor]] = {}
    Replay(coupling, model, coupling.graph.origin.inputs, keep).run(numbers, lambda k, outs: results.update({k: [t.clone() for t in outs[:1]]}) if k in ours else None)
    return f"compare {len(results)} ops, first op {coupling.graph.ops[min(results)].name}"


def _place(module: str) -> str:
    return module or "the model's own forward"
