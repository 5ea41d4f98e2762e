"""What a network loses with each of its modules, on calibration images: the order in which they should go.

``loss`` removes each module by itself, re-estimates BatchNorm, and compares the outputs: it holds for every kind, in the unit of the losses
that are measured for widths (``coppice.elimination``). The others look at one pass of the dense model: ``error`` at what the best
linear map of what stays can't make up for, ``cosine`` at the angle between what stays and what was there (Men et al., ShortGPT, 2024),
``taylor`` at the gradient of a gate on the branch (Molchanov et al., 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.evaluate import reestimate_batchnorm
from coppice.flow import Flow
from coppice.forward import logits, norms_with_statistics, training_mode
from coppice.graph import Kind, Op
from coppice.modules import removable
from coppice.planning import plan_without
from coppice.removals import Removable
from coppice.torch.apply import apply
from coppice.torch.capture import record
from coppice.torch.elimination import divergence
from coppice.torch.program import coupled_on, is_held_out, of_one_shape

Scores = dict[str, float | None]
Progress = Callable[[int, int], None]
ROWS = 2048  # places of a tensor that a linear map is fitted to, and as many that judge it
RIDGE = 1e-2  # of the mean of the Gram matrix's diagonal


def module_scores(
    model: nn.Module,
    coupling: Coupling,
    by: str,
    batches: Iterable[Any],
    candidates: Sequence[Removable] | None = None,
    loss: Callable[..., Tensor] | None = None,
    progress: Progress = lambda done, total: None,
) -> Scores:
    """A score for every candidate (of ``coppice.removable``), by name: the least first to go. None where the measure says nothing of it.

    ``batches``: model inputs, or ``(inputs, labels)`` for ``taylor``, which needs ``loss(outputs, labels)``.
    """
    chosen = removable(coupling) if candidates is None else list(candidates)
    if by not in MEASURES:
        raise CoppiceError(f"unknown score {by!r} of modules; choose one of {', '.join(MEASURES)}")
    if by == "taylor":
        return _taylor(model, coupling, chosen, batches, loss)
    images = of_one_shape(batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
    if by == "loss":
        return _losses(model, coupling, chosen, images, progress)
    return _compared(model, coupling, chosen, images, _angle if by == "cosine" else _left_by_the_best_map)


MEASURES = ("loss", "error", "cosine", "taylor")


def _losses(model: nn.Module, coupling: Coupling, chosen: Sequence[Removable], images: Sequence[Tensor], progress: Progress) -> Scores:
    fitted, judge = _split(images)
    goal = _outputs(model, judge)
    found: Scores = {}
    for k, candidate in enumerate(chosen):
        found[candidate.name] = loss_without(model, coupling, [candidate], fitted, judge, goal)
        progress(k + 1, len(chosen))
    return found


def loss_without(
    model: nn.Module, coupling: Coupling, gone: Sequence[Removable], fitted: Sequence[Tensor], judge: Sequence[Tensor], goal: Tensor
) -> float | None:
    """Divergence from the dense outputs ``goal`` without some modules, BatchNorm as it was or re-estimated; None: the code fails."""
    try:
        shallow = apply(model, plan_without(coupling, gone))
        found = divergence(_outputs(shallow, judge), goal)
        if norms_with_statistics(shallow):
            reestimate_batchnorm(shallow, [(x, x) for x in fitted], None, images=sum(map(len, fitted)))
            found = min(found, divergence(_outputs(shallow, judge), goal))
    except Exception:  # the user's code may raise anything where it does not run without them
        return None
    return found if math.isfinite(found) else None


def _split(images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    fitted = [x for k, x in enumerate(images) if not is_held_out(k)]
    return fitted, [x for k, x in enumerate(images) if is_held_out(k)] or fitted


def _outputs(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    with torch.no_grad(), training_mode(model, False):
        return torch.cat([logits(model(batch)) for batch in batches])


def _taylor(
    model: nn.Module, coupling: Coupling, chosen: Sequence[Removable], batches: Iterable[Any], loss: Callable[..., Tensor] | None
) -> Scores:
    """A gate on a branch scales what its last weights give, so its gradient is theirs times them."""
    flow = Flow(coupling.graph)
    ends = {candidate.name: _last_weights(flow, coupling.graph.ops, candidate) for candidate in chosen}
    sums: dict[str, list[float]] = {name: [] for name, weights in ends.items() if weights}
    for gradients in coupling.graph.origin.gradients(model, batches, loss):
        for name, found in sums.items():
            found.append(abs(sum(float((gradients[w][0] * gradients[w][1]).sum()) for w in ends[name] if w in gradients)))
    return {name: sum(sums[name]) / len(sums[name]) if sums.get(name) else None for name in ends}


def _last_weights(flow: Flow, ops: Sequence[Op], candidate: Removable) -> list[str]:
    for k in sorted(candidate.dead, reverse=True):
        values = [flow.graph.values[flow.value[v]] for v in flow.reads[k]]
        names = [value.names[0] for value in values if value.kind is Kind.PARAMETER]
        if names and ops[k].rule not in ("view", "permute"):
            return names
    return []


def _compared(
    model: nn.Module, coupling: Coupling, chosen: Sequence[Removable], images: Sequence[Tensor], compare: Callable[[Tensor, Tensor], float]
) -> Scores:
    """Compare what replaces a value with the value, at some places of some images."""
    here = coupled_on(model, coupling, images[0])
    flow = Flow(here.graph)
    there = {candidate.name: candidate.substitutes for candidate in removable(here)}
    pairs = {c.name: pair for c in chosen if (pair := _one_for_one(flow, there.get(c.name, {}))) is not None}
    wanted = {version for pair in pairs.values() for version in pair}
    rows: dict[int, list[Tensor]] = {version: [] for version in wanted}
    for batch in images:
        for version, tensor in _values(model, flow, batch, wanted).items():
            rows[version].append(_rows(tensor, len(images)))
    full = {version: torch.cat(some).double() for version, some in rows.items() if some}
    return {c.name: compare(full[pairs[c.name][0]], full[pairs[c.name][1]]) if c.name in pairs else None for c in chosen}


def _one_for_one(flow: Flow, substitutes: Mapping[int, Any]) -> tuple[int, int] | None:
    """What stays and what was there, where one version becomes another of its shape that an op made."""
    if len(substitutes) != 1:
        return None
    ((target, source),) = substitutes.items()
    if not isinstance(source, int) or flow.shape(source) != flow.shape(target) or flow.made_by[source] is None:
        return None
    return source, target


def _values(model: nn.Module, flow: Flow, batch: Tensor, wanted: set[int]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    at = iter(range(len(flow.graph.ops)))

    def note(_: Op, results: list[Tensor]) -> None:
        for version, tensor in zip(flow.writes[next(at)], results, strict=False):
            if version in wanted:
                found[version] = tensor.detach().clone()

    recorder, _, error = record(model, (batch,), note)
    if error is not None or len(recorder.ops) != len(flow.graph.ops):
        raise CoppiceError(f"the model's forward pass is another one on the calibration images ({error}); capture it with one of them")
    return found


def _rows(tensor: Tensor, batches: int) -> Tensor:
    """Features at some places, one row each; the places depend on the shape alone, so that two tensors' rows belong together."""
    features = tensor.movedim(1, -1) if tensor.dim() > 3 else tensor
    flat = features.reshape(-1, features.shape[-1])
    take = max(1, 2 * ROWS // batches)
    return flat[torch.linspace(0, len(flat) - 1, min(take, len(flat))).long()]


def _angle(stays: Tensor, was: Tensor) -> float:
    return float(1 - torch.nn.functional.cosine_similarity(stays, was, dim=1).mean())


def _left_by_the_best_map(stays: Tensor, was: Tensor) -> float:
    """Squared error of ridge regression on rows that it was not fitted to, relative to the variance."""
    half = len(stays) // 2
    x, y = stays[:half], was[:half]
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    solved = torch.linalg.solve(gram + (RIDGE * gram.diagonal().mean() + 1e-12) * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)
    left = was[half:] - mean_y - (stays[half:] - mean_x) @ solved
    return float(left.square().mean() / (was[half:] - was[half:].mean(0)).square().mean().clamp_min(1e-12))
