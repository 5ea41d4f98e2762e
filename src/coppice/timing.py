"""How long models take where they will run: models and settings take turns in many short rounds, so that what slows one slows all.

``measure`` answers percentiles, throughput and memory for every model in every setting, and how models compare with a reference, with an
interval; a difference that the noise could have made is called none.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coppice.errors import CoppiceError
from coppice.frameworks import is_keras
from coppice.machine import growth, interruptions, machine, pinning, usable_cores, versions
from coppice.noise import Interval, bootstrap, speedup
from coppice.progress import Advance
from coppice.runtimes import RUNTIMES, Run, Subject, one_sentence, runtime

ROUNDS = 15
TURN = 0.06  # seconds of timed runs in a turn: long enough to average, short enough that a burst of other work meets all models alike
MOST_RUNS = 40  # in a turn
WARM_UP = 0.2  # seconds, and at least three runs
FEWEST_ROUNDS = 5  # with an undisturbed run: fewer say nothing about noise
BUSY = 0.9  # a run alone on its core spends more than this part of its time computing
TOO_NOISY = 0.3  # relative width of the interval of the median beyond which no time is quoted


@dataclass(frozen=True)
class Setting:
    """Where and how a model runs."""

    runtime: str
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.runtime}, {self.threads} thread{'s' if self.threads > 1 else ''}, batch {self.batch}"


@dataclass(frozen=True)
class Timing:
    """One model in one setting, in seconds a run.

    ``rounds`` are the medians of the rounds (None: all of it was disturbed), ``interval`` is that of the median over them. ``runs`` were
    counted; ``disturbed`` more were not: the system took the core away while they ran. ``throughput``: samples a second. ``memory``: bytes
    by which the process grew while it loaded and first ran the model (None where the system does not tell).
    """

    model: str
    setting: Setting
    p50: float
    p90: float
    p99: float
    interval: Interval
    throughput: float
    memory: int | None
    runs: int
    disturbed: int
    rounds: tuple[float | None, ...]


@dataclass(frozen=True)
class Comparison:
    """``model`` is ``ratio`` times as fast as ``reference``, surely between the two numbers of ``interval``."""

    model: str
    reference: str
    setting: Setting
    ratio: float
    interval: Interval

    @property
    def differs(self) -> bool:
        return not self.interval[0] <= 1 <= self.interval[1]

    def __str__(self) -> str:
        low, high = self.interval
        if not self.differs:
            return f"no difference beyond the noise ({low:.3f} to {high:.3f} × as fast as {self.reference})"
        return f"{self.ratio:.3f} × as fast as {self.reference} ({low:.3f} to {high:.3f})"


@dataclass(frozen=True)
class Measurement:
    timings: tuple[Timing, ...]
    comparisons: tuple[Comparison, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        for entry, comparison in zip(plain["comparisons"], self.comparisons, strict=True):
            entry["differs"] = comparison.differs
        return plain


def measure(
    models: Mapping[str, Any],
    shape: Sequence[int],
    runtimes: Sequence[str] = ("torch",),
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    *,
    against: str | None = None,
    rounds: int = ROUNDS,
    progress: Advance = lambda done, total: None,
) -> Measurement:
    """Time every model (a module, a Keras model, or the path of an .onnx or .tflite file) in every setting.

    ``shape``: that of one input, without its batch dim. ``against``: the model that the others are compared with (the first).
    CoppiceError where a runtime is missing or can't run a model, and where the machine is too busy or too noisy to say anything.
    """
    against = next(iter(models)) if against is None else against
    settings = [Setting(r, t, b) for r in runtimes for t in threads for b in batches]
    check(settings, rounds)
    with tempfile.TemporaryDirectory(prefix="coppice-") as folder, _torch_threads_kept(), pinning() as pin:
        subjects = [Subject(name, tuple(shape), Path(folder), **{_kind(model): model}) for name, model in models.items()]
        lanes = [_Lane(subject, setting, pin) for setting in settings for subject in subjects]
        for done in range(rounds):
            progress(done, rounds)
            for lane in lanes if done % 2 else lanes[::-1]:
                lane.take_turn()
        progress(rounds, rounds)
    timings = {(lane.subject.name, lane.setting): lane.timing() for lane in lanes}
    comparisons = [
        _compare(timings[name, setting], timings[against, setting]) for setting in settings for name in models if name != against
    ]
    return Measurement(tuple(timings.values()), tuple(comparisons), machine(usable_cores()), versions())


def _kind(model: Any) -> str:
    return "file" if isinstance(model, Path) else "network" if is_keras(model) else "module"


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """PyTorch has one number of threads for the whole process."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)


def check(settings: Sequence[Setting], rounds: int = ROUNDS) -> None:
    """CoppiceError where a runtime is not there, or a number is out of bounds."""
    for name in dict.fromkeys(s.runtime for s in settings):
        runtime(name)
    cores = usable_cores()
    for setting in settings:
        if not 1 <= setting.threads <= cores:
            raise CoppiceError(
                f"--threads {setting.threads}: this process may use {cores} core{'s' if cores > 1 else ''}, give 1 to {cores}"
            )
        if setting.batch < 1:
            raise CoppiceError(f"--batch {setting.batch}: it must be 1 or more")
    if rounds < FEWEST_ROUNDS:
        raise CoppiceError(f"--rounds {rounds}: fewer than {FEWEST_ROUNDS} say nothing about the noise")


class _Lane:
    """One model in one setting: loaded and warm, then timed turn by turn."""

    def __init__(self, subject: Subject, setting: Setting, pin: Callable[[int], None]) -> None:
        self.subject, self.setting, self._pin = subject, setting, pin
        self._turns: list[_Turn] = []
        reads = RUNTIMES[setting.runtime].reads
        if reads is not None:
            reads(subject)  # exported now: what that takes is not the runtime's memory
        pin(setting.threads)
        with growth() as self._memory:
            self._run = RUNTIMES[setting.runtime].start(subject, setting.batch, setting.threads)
            with one_sentence(f"{setting.runtime} can't run {subject.name} on a batch of {setting.batch}"):
                self._run()
        self._runs = min(MOST_RUNS, max(2, math.ceil(TURN / statistics.median(self._warm_up()))))

    def _warm_up(self) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < 3 or sum(seconds) < WARM_UP:
            began = time.perf_counter()
            self._run()
            seconds.append(time.perf_counter() - began)
        return seconds

    def take_turn(self) -> None:
        """Some timed runs, after one that is not: it brings back to the caches what the others drove out."""
        self._pin(self.setting.threads)
        self._run()
        turn = _Turn()
        collecting = gc.isenabled()
        gc.disable()
        for _ in range(self._runs):
            turn.time(self._run)
        if collecting:
            gc.enable()
        self._turns.append(turn)

    def timing(self) -> Timing:
        name, setting = self.subject.name, self.setting
        rounds = self._rounds()
        runs = np.concatenate([np.asarray(taken) for taken in rounds])
        medians = [statistics.median(taken) if taken else None for taken in rounds]
        interval = bootstrap([m for m in medians if m is not None])
        p50, p90, p99 = (float(p) for p in np.percentile(runs, (50, 90, 99)))
        if (interval[1] - interval[0]) / p50 > TOO_NOISY:
            spread = f"its median run takes {1e3 * interval[0]:.3g} to {1e3 * interval[1]:.3g} ms"
            raise CoppiceError(f"{name} is too noisy to time ({setting}): {spread}; stop other programs, or give more --rounds")
        disturbed = sum(len(turn.seconds) for turn in self._turns) - len(runs)
        return Timing(name, setting, p50, p90, p99, interval, setting.batch / p50, self._memory.bytes, len(runs), disturbed, tuple(medians))

    def _rounds(self) -> list[list[float]]:
        """The undisturbed runs of each round; all runs, where hardly any is but the core was the model's nearly all the time."""
        clean = [turn.undisturbed for turn in self._turns]
        if sum(map(bool, clean)) >= FEWEST_ROUNDS:
            return clean
        share = sum(turn.computing for turn in self._turns) / sum(sum(turn.seconds) for turn in self._turns)
        if share < BUSY:
            lost = f"other programs take {100 * (1 - share):.0f} % of its core's time"
            raise CoppiceError(f"the machine is too busy to time {self.subject.name} ({self.setting}): {lost}; stop them")
        return [turn.seconds for turn in self._turns]


class _Turn:
    """The runs of one turn, those during which the system took no core away among them, and how long the process computed."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.undisturbed: list[float] = []
        self.computing = 0.0

    def time(self, run: Run) -> None:
        interrupted, computed, began = interruptions(), time.process_time(), time.perf_counter()
        run()
        spent = time.perf_counter() - began
        self.computing += time.process_time() - computed
        self.seconds.append(spent)
        if interruptions() == interrupted:
            self.undisturbed.append(spent)


def _compare(timing: Timing, reference: Timing) -> Comparison:
    pairs = [(r, t) for r, t in zip(reference.rounds, timing.rounds, strict=True) if r is not None and t is not None]
    if len(pairs) < FEWEST_ROUNDS:
        raise CoppiceError(
            f"the machine is too busy to compare {timing.model} with {reference.model} ({timing.setting}); stop other programs"
        )
    ratio, interval = speedup(*zip(*pairs, strict=True))
    return Comparison(timing.model, reference.model, timing.setting, ratio, interval)
