"""What cutting a model will buy in milliseconds, before anything is trained: the cut model is made, timed, and thrown away.

How long it takes does not depend on which indices stay, nor on what training makes of the weights. So the verdict is a measurement of a
model of the size that the run will end with; only its accuracy is open.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coppice.allocate import Bundle, bundles_on_grid
from coppice.coupling import Coupling, couple
from coppice.criteria import score
from coppice.deadline import SLACK, Clock, OnTime, plan_on_time, start_clock
from coppice.errors import CoppiceError, UnreachableError
from coppice.latency import LatencyModel, latency_model
from coppice.targets import Target, humanise
from coppice.timing import Setting
from coppice.torch.capture import capture

NOTHING = 0.002  # of the model's time: what saves less buys nothing


@dataclass(frozen=True)
class Buys:
    """Axes that move together, halved: seconds saved, and the shares of the model's time and MACs."""

    axes: tuple[str, ...]
    width: int
    halved: int
    seconds: float
    time: float
    macs: float

    @property
    def anything(self) -> bool:
        return self.time >= NOTHING


@dataclass(frozen=True)
class Verdict:
    """``met``: whether the target can be; ``reached``: what a model within it was measured to take (None: there is no such model).

    ``least``: what the smallest model on the grid is predicted to take. ``layers``: the dense model's time by module, the slowest first.
    ``buys``: what halving each axis saves, most first.
    """

    setting: Setting
    dense: float
    asked: float
    least: float
    grid: int
    unexplained: float | None
    layers: tuple[tuple[str, float], ...]
    buys: tuple[Buys, ...]
    reached: OnTime | None

    @property
    def met(self) -> bool:
        return self.reached is not None and self.reached.timed.seconds <= self.asked * (1 + SLACK)

    def __str__(self) -> str:
        asked, dense, least = (humanise(seconds, "latency") for seconds in (self.asked, self.dense, self.least))
        if self.reached is None:
            return f"{asked} can't be met ({self.setting}): of {dense}, the smallest model on the grid of {self.grid} takes about {least}."
        found = self.reached.timed.comparison
        measured = humanise(self.reached.timed.seconds, "latency")
        said = f"{dense} → {measured}, {found.ratio:.2f} × as fast ({found.interval[0]:.2f} to {found.interval[1]:.2f}; {self.setting})"
        return f"{said}: {asked} can be met." if self.met else f"{said}: {asked} can't be met."

    def to_dict(self) -> dict[str, Any]:
        reached = self.reached.to_dict() if self.reached else None
        plain = {key: getattr(self, key) for key in ("dense", "asked", "least", "grid", "unexplained", "layers", "met")}
        buys = [asdict(entry) | {"anything": entry.anything} for entry in self.buys]
        return {"setting": asdict(self.setting), **plain, "buys": buys, "reached": reached, "verdict": str(self)}


def predict(
    model: nn.Module,
    shape: Sequence[int],
    target: Target,
    *,
    round_to: int = 8,
    min_width: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Whether ``target``, which asks for a latency, can be met, and what buys time; ``shape`` is that of one input without its batch.

    CoppiceError where the target asks for no latency, is met already, or the model can't be timed.
    """
    setting = target.setting
    if setting is None:
        raise CoppiceError("predict needs a target in milliseconds, such as latency=0.5@onnxruntime")
    coupling = couple(capture(model.eval(), torch.zeros(1, *shape)))
    with tempfile.TemporaryDirectory(prefix="coppice-") as folder:
        clock = start_clock(setting, tuple(shape), model, Path(folder))
        predictor = latency_model(coupling, setting, clock.seconds, min_width, progress=progress)
        bundles = bundles_on_grid(coupling, math.lcm(round_to, predictor.grid), min_width)
        least = predictor.predict({axis.id: bundle.kept(axis, 0) for bundle in bundles for axis in bundle.axes})
        budgets = _budgets(target, coupling, clock)
        reached = _reached(model, coupling, budgets, clock, predictor, round_to, min_width)
    dense = sorted(predictor.layers().items(), key=lambda layer: -layer[1])
    buys = sorted((_halved(bundle, coupling, predictor) for bundle in bundles), key=lambda entry: -entry.seconds)
    return Verdict(
        setting, clock.seconds, budgets["latency"], least, predictor.grid, predictor.unexplained, tuple(dense), tuple(buys), reached
    )


def _budgets(target: Target, coupling: Coupling, clock: Clock) -> dict[str, float]:
    return target.resolve(replace(coupling.cost(), latency=clock.seconds))


def _reached(
    model: nn.Module, coupling: Coupling, budgets: dict[str, float], clock: Clock, predictor: LatencyModel, round_to: int, min_width: int
) -> OnTime | None:
    scores = score(model, coupling, "l2")  # which indices stay makes no difference here
    try:
        return plan_on_time(model, coupling, scores, budgets, clock, predictor, round_to=round_to, min_width=min_width)
    except UnreachableError:
        return None


def _halved(bundle: Bundle, coupling: Coupling, predictor: LatencyModel) -> Buys:
    half = bundle.whole / 2
    level = min(range(len(bundle.levels) - 1), key=lambda k: abs(bundle.levels[k] - half))
    kept = {axis.id: bundle.kept(axis, level) for axis in bundle.axes}
    whole = coupling.cost().macs
    seconds = predictor.predict() - predictor.predict(kept)
    first = bundle.axes[0]
    return Buys(
        tuple(axis.name for axis in bundle.axes), first.width, kept[first.id], seconds,
        seconds / predictor.dense, 1 - coupling.cost(kept).macs / whole,
    )  # fmt: skip
