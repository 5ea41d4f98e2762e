"""What a model will take at any widths: the sum of its ops, each timed at widths on the runtime's grid, calibrated against the whole model.

What no op of the table explains (pooling, norms that are not fused, memory traffic between ops) is the rest; it grows and shrinks with what
those ops write. Where a front-end's ops are not timed one by one (Keras), the whole goes by the MACs of its ops: a first guess, which
`coppice.deadline` measures and corrects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coppice.axes import Axis, atoms, find
from coppice.cost import Term, width
from coppice.coupling import Coupling
from coppice.errors import CoppiceError
from coppice.microbench import OpShape
from coppice.optable import OpTable, Surface, surfaces
from coppice.planning import Plan, kept_widths
from coppice.timing import Setting

if TYPE_CHECKING:
    from coppice.torch.timed import TimedOp

Progress = Callable[[int, int], None]
FUSING = ("onnxruntime", "openvino")  # runtimes that make norms and activations part of the convolution before them
REST = "the rest"
COARSE = 5e-6  # seconds by which a runtime's own clock may overstate an op
IMPLAUSIBLE = 0.3  # the ops alone can't take longer than the model by more than this part


@dataclass(frozen=True, eq=False)
class OpPrice:
    """The seconds of one op at given widths, as a term of the cost ``latency``; the model it is of is calibrated by ``scale``."""

    op: TimedOp
    batch: int
    surface: Surface
    scale: float = 1.0
    kind: str = "latency"

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(axis for some in self.op.axes for axis in some)

    def within(self, moving: Collection[Axis]) -> OpPrice:
        del moving  # what stands still is the same level of the surface every time
        return self

    def sizes(self, widths: Mapping[Axis, int]) -> tuple[int, ...]:
        first, *others = (math.prod(width(axis, widths) for axis in some) for some in self.op.axes)
        return (first * self.batch, *others)

    def evaluate(self, widths: Mapping[Axis, int]) -> float:
        return self.scale * self.surface.at(self.sizes(widths))


@dataclass(frozen=True, eq=False)
class WorkPrice:
    """The seconds of one op in proportion to its MACs."""

    name: str
    term: Term
    seconds: float  # a MAC
    kind: str = "latency"

    @property
    def axes(self) -> tuple[Axis, ...]:
        return self.term.axes

    def within(self, moving: Collection[Axis]) -> WorkPrice:
        return replace(self, term=self.term.within(moving))

    def evaluate(self, widths: Mapping[Axis, int]) -> float:
        return self.seconds * self.term.evaluate(widths)


@dataclass(frozen=True, eq=False)
class RestPrice:
    """A part of the rest: ``seconds`` at full widths, in proportion to what one op writes."""

    axes: tuple[Axis, ...]
    seconds: float
    kind: str = "latency"
    name: str = REST

    def within(self, moving: Collection[Axis]) -> RestPrice:
        del moving
        return self

    def evaluate(self, widths: Mapping[Axis, int]) -> float:
        return self.seconds * math.prod(width(a, widths) / find(a).size for a in self.axes)


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicts seconds of a model in one setting at widths of its axes.

    ``dense``: what the whole model was measured to take; ``table``: what its ops take by the table, alone (None: they were not timed);
    ``grid``: the runtime's.
    """

    coupling: Coupling
    setting: Setting
    dense: float
    table: float | None
    grid: int
    ops: tuple[OpPrice, ...]
    rest: tuple[RestPrice | WorkPrice, ...]

    @property
    def prices(self) -> tuple[OpPrice | WorkPrice | RestPrice, ...]:
        return (*self.ops, *self.rest)

    def predict(self, kept: Mapping[int, int] | None = None) -> float:
        """Seconds at the given widths (axis id -> width; missing: full)."""
        widths = self.coupling.widths(kept)
        return sum(price.evaluate(widths) for price in self.prices)

    def predict_plan(self, plan: Plan) -> float:
        """Seconds of what ``plan``, made for this coupling, leaves."""
        return self.predict(kept_widths(self.coupling, plan))

    def layers(self, kept: Mapping[int, int] | None = None) -> dict[str, float]:
        """The same by module, and what is left as the rest."""
        widths = self.coupling.widths(kept)
        found: dict[str, float] = {}
        for price in self.prices:
            found[price.name] = found.get(price.name, 0.0) + price.evaluate(widths)
        return found

    @property
    def unexplained(self) -> float | None:
        """The part of the whole that the sum of the ops leaves open (negative: the sum is more than the whole). None: it is not known."""
        return None if self.table is None else 1 - self.table / self.dense


def latency_model(
    coupling: Coupling,
    setting: Setting,
    dense: float,
    least: int = 8,
    table: OpTable | None = None,
    progress: Progress = lambda done, total: None,
) -> LatencyModel:
    """Time every op of the model at widths on the runtime's grid, and calibrate their sum to ``dense``, the whole model's seconds.

    ``least``: no axis gets narrower. CoppiceError where the runtime does not tell what single ops take.
    """
    found = coupling.graph.origin.timed(coupling)
    if not (coupling.cost().macs if found is None else found.ops):
        raise CoppiceError("the model has no convolution and no matrix product: there is nothing to predict its latency from")
    if found is None:
        return _by_work(coupling, setting, dense)
    table = table or OpTable.of_this_machine(setting.runtime, setting.threads)
    grid = table.grid()
    batch = setting.batch // math.gcd(setting.batch, coupling.graph.batch)
    if batch * coupling.graph.batch != setting.batch:
        raise CoppiceError(
            f"the model was captured with a batch of {coupling.graph.batch}: capture it with 1 to predict for {setting.batch}"
        )
    smallest = {axis.atom: min(axis.width, max(least, grid)) for axis in coupling.prunable}
    shapes = [_at_batch(op, batch) for op in found.ops]
    reach: dict[OpShape, tuple[int, ...]] = {}
    for shape, op in zip(shapes, found.ops, strict=True):  # ops of one shape share a surface, though not all of them may move alike
        least_sizes = _least_sizes(op, batch, smallest)
        reach[shape] = tuple(map(min, least_sizes, reach.get(shape, least_sizes)))
    known = surfaces(table, reach, grid, progress)
    ops = tuple(OpPrice(op, batch, known[shape]) for op, shape in zip(found.ops, shapes, strict=True))
    total = sum(price.evaluate({}) for price in ops)
    if total > (1 + IMPLAUSIBLE) * dense + COARSE * len(ops):
        raise CoppiceError(
            f"the ops of the model were timed to take {1e3 * total:.3g} ms and the whole model {1e3 * dense:.3g} ms, so the machine was "
            f"busy meanwhile: stop other programs, remove {table.path} and try again"
        )
    scale = min(1.0, dense / total)
    others = (*found.others, *(() if setting.runtime in FUSING else found.inside))
    return LatencyModel(
        coupling, setting, dense, total, grid, tuple(replace(price, scale=scale) for price in ops), _rest(others, dense - scale * total)
    )


def _by_work(coupling: Coupling, setting: Setting, dense: float) -> LatencyModel:
    rate = dense / coupling.cost().macs
    terms = [(op.module, term) for op, info in zip(coupling.graph.ops, coupling.ops, strict=True) for term in info.macs]
    return LatencyModel(coupling, setting, dense, None, 1, (), tuple(WorkPrice(name, term, rate) for name, term in terms))


def _at_batch(op: TimedOp, batch: int) -> OpShape:
    return op.shape.at((op.shape.sizes[0] * batch, *op.shape.sizes[1:]))


def _least_sizes(op: TimedOp, batch: int, smallest: Mapping[Axis, int]) -> tuple[int, ...]:
    first, *others = (math.prod(width(axis, smallest) for axis in some) for some in op.axes)
    return (first * batch, *others)


def _rest(others: tuple[tuple[Axis, ...], ...], seconds: float) -> tuple[RestPrice, ...]:
    written = [math.prod(find(axis).size for axis in axes) for axes in others]
    total = sum(written)
    moving = [tuple(a for a in axes if any(atom.pinned is None for atom in atoms(a))) for axes in others]
    if not total:
        return (RestPrice((), seconds),)
    return tuple(RestPrice(axes, seconds * own / total) for axes, own in zip(moving, written, strict=True))
