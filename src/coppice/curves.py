"""Sensitivity: what each axis, alone, loses as it gets narrower, and what that saves.

Every point is a model that was really cut, so that norms, attention and whatever else mixes an axis count as they are. What is tied to
an axis narrows with it. Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.2, with the distance from the dense outputs
beside the accuracy: it needs no labels, and tells losses apart that a few hundred images of accuracy don't.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from coppice.allocate import Bundle, bundles_on_grid
from coppice.coupling import Coupling, Mask
from coppice.elimination import Refitter
from coppice.errors import CoppiceError
from coppice.forward import training_mode
from coppice.planning import make_plan
from coppice.progress import Advance
from coppice.saliency import Scores
from coppice.stepwise import is_held_out
from coppice.torch.apply import apply
from coppice.torch.elimination import divergence, refitter
from coppice.torch.linear import write
from coppice.torch.trees import named_tensors

PARTS = (0.75, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Point:
    """An axis cut to ``width``: the MACs saved (a share of the dense model's), the divergence, and the change of top-1 in points."""

    width: int
    saved: float
    loss: float
    top1: float | None


@dataclass(frozen=True, slots=True)
class Curve:
    """An axis, the names of those that narrow with it, and its points, the widest first."""

    axis: str
    width: int
    tied: tuple[str, ...]
    points: tuple[Point, ...]

    def gives(self, limit: float) -> float:
        """The most MACs that a measured width saves at a divergence of at most ``limit``."""
        return max((point.saved for point in self.points if point.loss <= limit), default=0.0)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """``curves``, those first that give most MACs within ``limit``: the median divergence of all points, if no other was given."""

    curves: tuple[Curve, ...]
    limit: float
    images: int
    top1: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"curves": [asdict(curve) | {"gives": curve.gives(self.limit)} for curve in self.curves]}


def sensitivity(
    model: nn.Module,
    coupling: Coupling,
    scores: Scores,
    batches: Iterable[Any],
    judge: Iterable[Any] | None = None,
    *,
    parts: Sequence[float] = PARTS,
    round_to: int = 8,
    min_width: int = 8,
    repair: bool = True,
    limit: float | None = None,
    seed: int = 0,
    progress: Advance | None = None,
) -> Sensitivity:
    """Cut each axis alone to ``parts`` of its width (on the grid of ``round_to``), and compare the outputs with the dense model's.

    ``scores`` say which indices stay. ``batches`` are ``(inputs, labels)`` or ``(inputs,)``; the divergence is taken on ``judge``,
    and top-1 where it has labels: on every fourth of ``batches`` if it is not given. ``repair``: what reads the axis is refitted first, on
    the others; no labels are used for that. ``model`` is left as it is.
    CoppiceError where there are no batches, or the grid lets no axis move.
    """
    if not parts or not all(0 < part < 1 for part in parts):
        raise CoppiceError(f"parts of an axis lie between 0 and 1, not {', '.join(f'{part:g}' for part in parts) or 'none'}")
    if limit is not None and not 0 <= limit < math.inf:
        raise CoppiceError(f"the limit of the divergence is {limit:g}; it must be 0 or more, and finite")
    bundles = bundles_on_grid(coupling, round_to, min_width)
    if not bundles:
        raise CoppiceError("no axis can be cut on this grid; lower --round-to or --min-width")
    given = list(batches)
    judges = list(judge) if judge is not None else [batch for k, batch in enumerate(given) if is_held_out(k)] or given
    fitted = given if judge is not None else [batch for k, batch in enumerate(given) if not is_held_out(k)]
    trial = _Trial(model, coupling, scores, judges)
    if repair:
        trial.refitter = refitter(model, coupling, (batch[0] for batch in fitted), seed)
    steps = [(bundle, _levels(bundle, parts)) for bundle in bundles]
    done, total = 0, sum(len(levels) for _, levels in steps)
    curves = []
    for bundle, levels in steps:
        points = []
        for level in levels:
            points.append(trial.point(bundle, level))
            done += 1
            if progress is not None:
                progress(done, total)
        first, *others = bundle.axes
        curves.append(Curve(first.name, first.width, tuple(axis.name for axis in others), tuple(points)))
    within = median(point.loss for curve in curves for point in curve.points) if limit is None else limit
    curves.sort(key=lambda curve: (-curve.gives(within), curve.points[0].loss))
    return Sensitivity(tuple(curves), within, trial.images, trial.top1)


def _levels(bundle: Bundle, parts: Sequence[float]) -> list[int]:
    """The levels of the grid nearest to ``parts``, the widest first; never the whole."""
    below = range(len(bundle.levels) - 1)
    return sorted({min(below, key=lambda k: abs(bundle.levels[k] / bundle.whole - part)) for part in parts}, reverse=True)


class _Trial:
    """Cuts of one model, and what they do to its outputs on ``judges``."""

    def __init__(self, model: nn.Module, coupling: Coupling, scores: Scores, judges: Sequence[Any]) -> None:
        if not judges:
            raise CoppiceError("there are no images to judge the cuts on; give at least one")
        self.model, self.coupling, self.judges = model, coupling, judges
        self.order = {axis.id: np.argsort(scores[axis.id], kind="stable") for axis in coupling.prunable}
        self.refitter: Refitter | None = None
        self.images = sum(len(batch[0]) for batch in judges)
        self.macs = coupling.cost().macs
        self.dense = _outputs(model, judges)
        self.top1 = _top1(self.dense, judges)

    def point(self, bundle: Bundle, level: int) -> Point:
        keep = {axis.id: self._mask(axis.id, bundle.kept(axis, level)) for axis in bundle.axes}
        plan = make_plan(self.coupling, keep)
        source = self.model
        if self.refitter is not None:
            source = copy.deepcopy(self.model)
            write(named_tensors(source), self.refitter.refitted({axis.name: keep[axis.id] for axis in bundle.axes}))
        outputs = _outputs(apply(source, plan), self.judges)
        loss = divergence(outputs, self.dense)
        if not np.isfinite(loss):
            raise CoppiceError(
                f"the outputs with {bundle.axes[0].name} narrowed are not finite; look for NaN or infinite weights or inputs"
            )
        top1 = _top1(outputs, self.judges)
        saved = 1 - self.coupling.cost({axis.id: bundle.kept(axis, level) for axis in bundle.axes}).macs / max(self.macs, 1)
        change = None if top1 is None or self.top1 is None else top1 - self.top1
        return Point(bundle.kept(bundle.axes[0], level), saved, max(loss, 0.0), change)

    def _mask(self, axis: int, width: int) -> Mask:
        order = self.order[axis]
        mask = np.ones(len(order), bool)
        mask[order[: len(order) - width]] = False
        return mask


def _outputs(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """The first tensor that the model answers, for all batches."""
    with torch.no_grad(), training_mode(model, False):
        found = [next(t for t in tree_flatten(model(batch[0]))[0] if isinstance(t, Tensor)) for batch in batches]
    return torch.cat(found)


def _top1(outputs: Tensor, batches: Sequence[Any]) -> float | None:
    """Percent; None where the outputs are no rows of class scores, or there are no labels."""
    if outputs.dim() != 2 or any(len(batch) < 2 or not isinstance(batch[1], Tensor) for batch in batches):
        return None
    labels = torch.cat([batch[1] for batch in batches])
    return 100 * float((outputs.argmax(1) == labels).double().mean())
