"""Plans that meet a latency: made against predicted milliseconds, measured before anything is trained, and corrected.

How long a model takes does not depend on what its weights are, so the promise is checked on the cut model as it is.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from coppice.allocate import plan as make_plan
from coppice.coupling import Coupling
from coppice.errors import UnreachableError
from coppice.frameworks import is_keras
from coppice.front_ends import apply
from coppice.latency import LatencyModel, latency_model
from coppice.microbench import check_tells
from coppice.planning import Plan
from coppice.runtimes import LITE, RUNTIMES
from coppice.saliency import Scores
from coppice.targets import humanise
from coppice.timing import Comparison, Measurement, Setting, check, measure

CLOSE = 0.02  # a plan within this part of the budget is not corrected
CORRECTIONS = 2
GUESSED = 4  # corrections where the prediction goes by MACs alone
SLACK = 0.05  # a measured latency that is over by no more than this part meets its target: it is about what two measurements differ by
DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Clock:
    """Times models in one setting, each beside the dense one; ``seconds`` is what the dense one took when it was timed first.

    A later measurement says how many times faster a model is than the dense one, then and there; times ``seconds``, all of them are
    comparable, however fast the machine was at the moment.
    """

    setting: Setting
    shape: tuple[int, ...]
    dense: Any  # a model, or the file that the runtime reads
    seconds: float

    def time(self, model: Any) -> TimedModel:
        found = measure(
            {DENSE: self.dense, PRUNED: model},
            self.shape,
            (self.setting.runtime,),
            (self.setting.threads,),
            (self.setting.batch,),
        )
        return TimedModel(self.seconds / found.comparisons[0].ratio, found)


@dataclass(frozen=True)
class TimedModel:
    """What a model takes, in seconds of its clock, and the measurement that says so."""

    seconds: float
    measurement: Measurement

    @property
    def comparison(self) -> Comparison:
        return self.measurement.comparisons[0]


def start_clock(setting: Setting, shape: tuple[int, ...], dense: Any, folder: Path, seconds: float | None = None) -> Clock:
    """A clock for models beside ``dense``, of which files may be kept in ``folder``; it is timed unless ``seconds`` are known.

    CoppiceError where the runtime is missing, does not tell what ops take or can't run the model, and where the machine is too busy.
    """
    if not is_keras(dense):
        check_tells(setting.runtime)
    check([setting])
    reference = dense
    if RUNTIMES[setting.runtime].reads is not None:
        reference = folder / f"dense{LITE if setting.runtime == 'litert' else '.onnx'}"
        if not reference.exists():
            _write(dense, shape, reference)
    if seconds is None:
        found = measure({DENSE: reference}, shape, (setting.runtime,), (setting.threads,), (setting.batch,))
        seconds = found.timings[0].p50
    return Clock(setting, shape, reference, seconds)


def _write(dense: Any, shape: tuple[int, ...], path: Path) -> None:
    if is_keras(dense):
        from coppice.keras.export import write

        write(dense, path, "lite" if path.suffix == LITE else "onnx")
    else:
        import torch

        from coppice.exporting import write_onnx

        write_onnx(dense, torch.zeros(2, *shape), path)


@dataclass(frozen=True)
class OnTime:
    """A plan, the model it gives, and what was promised (``predicted``) and found (``timed``); ``tried`` are all such pairs, in order."""

    plan: Plan
    model: Any
    predicted: float
    timed: TimedModel
    tried: tuple[tuple[float, float], ...]

    def said(self, asked: float) -> str:
        """What was predicted and found on the way to the seconds that were asked for, in words."""
        steps = ", ".join(f"{humanise(said, 'latency')} predicted, {humanise(took, 'latency')} measured" for said, took in self.tried)
        return f"{steps} ({self.timed.comparison.setting}; asked for {humanise(asked, 'latency')})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the journal."""
        plain = self.timed.measurement.to_dict()
        return {
            "predicted": self.predicted, "measured": self.timed.seconds, "tried": [list(pair) for pair in self.tried],
            "speedup": self.timed.comparison.ratio, "interval": list(self.timed.comparison.interval),
            "setting": asdict(self.timed.comparison.setting),
            "timings": {timing["model"]: timing for timing in plain["timings"]}, "machine": plain["machine"], "versions": plain["versions"],
        }  # fmt: skip


def plan_on_time(
    model: Any,
    coupling: Coupling,
    scores: Scores,
    budgets: Mapping[str, float],
    clock: Clock,
    predictor: LatencyModel,
    *,
    allocation: str = "global",
    round_to: int = 8,
    min_width: int = 8,
    spare: bool = False,
) -> OnTime:
    """The plan for ``budgets`` (with ``latency`` in seconds of the clock) that keeps most of the model: planned, timed, corrected.

    What the first plan takes beyond its prediction, or less, is expected of the next one too. Where the first takes longer, widths halfway
    between the multiples of the grid are timed as well: with whole blocks of channels a runtime may choose a layout that it then converts
    to and fro, which no single op shows (ConvNeXt in OpenVINO); the faster of the two goes on.
    """
    grid = math.lcm(round_to, predictor.grid)
    asked = budgets["latency"]
    tries: list[OnTime] = []

    def attempt(allowed: float, offset: int) -> OnTime:
        wanted = {**budgets, "latency": allowed}
        plan = make_plan(coupling, scores, wanted, allocation, grid, min_width, spare=spare, prices=predictor.prices, offset=offset)
        if tries and plan == tries[-1].plan:
            return tries[-1]
        pruned = apply(model, plan)
        tries.append(OnTime(plan, pruned, predictor.predict_plan(plan), clock.time(pruned), ()))
        return tries[-1]

    now, offset = attempt(asked, 0), 0
    if now.timed.seconds > asked and grid % (2 * round_to) == 0:
        with suppress(UnreachableError):
            between = attempt(asked, grid // 2)
            if between.timed.seconds < (1 - CLOSE) * now.timed.seconds:
                now, offset = between, grid // 2
    for _ in range(GUESSED if predictor.table is None else CORRECTIONS):
        if (1 - CLOSE) * asked <= now.timed.seconds <= asked:
            break
        count = len(tries)
        with suppress(UnreachableError):  # no narrower than the last one
            now = attempt(asked * now.predicted / now.timed.seconds * (1 - CLOSE / 2), offset)
        if len(tries) == count:
            break
    held = [t for t in tries if t.timed.seconds <= asked]
    best = max(held, key=lambda t: t.timed.seconds) if held else min(tries, key=lambda t: t.timed.seconds)
    return replace(best, tried=tuple((t.predicted, t.timed.seconds) for t in tries))


def feasible_prices(dense: Any, coupling: Coupling, setting: Setting, shape: tuple[int, ...], min_width: int) -> tuple[float, LatencyModel]:
    """What the dense model takes, and its latency model: enough to say before a run whether its target can be met."""
    with tempfile.TemporaryDirectory(prefix="coppice-") as folder:
        seconds = start_clock(setting, shape, dense, Path(folder)).seconds
    return seconds, latency_model(coupling, setting, seconds, min_width)
