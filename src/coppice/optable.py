"""What single ops take on this machine, remembered: a table on disk for each runtime, version, number of threads and processor.

From it: the runtime's channel grid, found by measurement, and for every op of a model its seconds at any widths on that grid.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coppice.machine import cpu_model
from coppice.microbench import OpShape, time_ops
from coppice.run import replacing
from coppice.runtimes import runtime

FORMAT = 1
COARSEST, RANGE = 32, (64, 128)  # the grid is looked for among its divisors, at widths between these
WASTE = 0.04  # what widths off a grid may cost beyond the line between their neighbours on it
LEVELS = {1: 8, 2: 5}  # widths at which an op is timed, by how many of its sizes move; with more: three each


@dataclass
class OpTable:
    """Seconds of ops on one runtime with some number of threads; what is not known is timed, and kept in ``path``."""

    runtime: str
    threads: int
    path: Path
    known: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of_this_machine(cls, name: str, threads: int) -> OpTable:
        """The table that is on disk for this machine, or an empty one."""
        place = f"{cpu_model()} {os.cpu_count()} {sys.platform} {name} {runtime(name).version()} {threads}"
        digest = hashlib.sha256(place.encode()).hexdigest()[:12]
        table = cls(name, threads, cache_folder() / f"latency-{name}-{threads}-{digest}.json")
        try:
            found = json.loads(table.path.read_text(encoding="utf-8"))
            if found["format"] == FORMAT:
                table.known = {str(key): float(seconds) for key, seconds in found["seconds"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or not as it was written: everything is timed again
            pass
        return table

    def learn(self, ops: Sequence[OpShape], progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Time the ops that the table does not have."""
        new = list({key: op for op in ops if (key := op.key()) not in self.known}.values())
        if new:
            self.known.update(zip((op.key() for op in new), time_ops(self.runtime, self.threads, new, progress), strict=True))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "seconds": self.known}, indent=0), encoding="utf-8")

    def seconds(self, ops: Sequence[OpShape]) -> list[float]:
        self.learn(ops)
        return [self.known[op.key()] for op in ops]

    def grid(self) -> int:
        """The widths that the runtime's kernels are made for are multiples of this."""
        grid = COARSEST
        while grid > 1 and self._waste(grid // 2, grid) <= WASTE:
            grid //= 2
        return grid

    def _waste(self, finer: int, grid: int) -> float:
        """How much more the widths between those of ``grid`` cost than the line through their neighbours, on average over some ops."""
        widths = range(RANGE[0], RANGE[1] + 1, finer)
        wasted = []
        for make in _PROBES:
            cost = dict(zip(widths, self.seconds([make(w) for w in widths]), strict=True))
            between = [w for w in widths if w % grid]
            wasted += [2 * cost[w] / (cost[w - finer] + cost[w + finer]) - 1 for w in between]
        return float(np.mean(wasted))


def _conv(size: int, kernel: int, *sizes: int) -> OpShape:
    return OpShape("conv", (1, *sizes), (size, size), (kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1))


_PROBES: tuple[Callable[[int], OpShape], ...] = (
    lambda w: _conv(14, 1, 1, 128, w),
    lambda w: _conv(14, 1, 1, w, 128),
    lambda w: _conv(14, 3, 1, 64, w),
    lambda w: _conv(14, 3, 1, w, 64),
    lambda w: _conv(28, 3, w, 1, 1),
    lambda w: OpShape("linear", (196, 256, w)),
    lambda w: OpShape("linear", (196, w, 256)),
)


def cache_folder() -> Path:
    """Where programs keep what they can find out again."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "coppice"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "coppice"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice"


@dataclass(frozen=True)
class Surface:
    """Seconds of one op: ``levels[k]`` are rising values of its size ``k`` (one where it stays), ``seconds`` the grid over them."""

    levels: tuple[tuple[int, ...], ...]
    seconds: NDArray[np.float64]

    def at(self, sizes: Sequence[int]) -> float:
        """Between the levels on straight lines; below the lowest, as there."""
        table = self.seconds
        for levels, size in zip(self.levels, sizes, strict=True):
            if len(levels) == 1:
                table = table[0]
                continue
            k = min(max(int(np.searchsorted(levels, size)), 1), len(levels) - 1)
            part = min(max((size - levels[k - 1]) / (levels[k] - levels[k - 1]), 0.0), 1.0)
            table = (1 - part) * table[k - 1] + part * table[k]
        return float(table)


def levels_of(least: int, full: int, grid: int, moving: int) -> tuple[int, ...]:
    """Widths on the grid from ``least`` to the full one, evenly spread; ``moving``: how many sizes of the op move."""
    count = LEVELS.get(moving, 3)
    if full <= grid or least >= full:
        return (full,)
    spread = {round(least + (full - least) * k / (count - 1)) for k in range(count)}
    return tuple(sorted({min(full, max(grid, round(w / grid) * grid)) for w in spread} | {full}))


def surfaces(
    table: OpTable, ops: Mapping[OpShape, Sequence[int]], grid: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[OpShape, Surface]:
    """A surface for each op (its shape at full widths -> the least that each size may become), all timed together."""
    levels, shapes = {}, {}
    for op, least in ops.items():
        moving = sum(small < full for small, full in zip(least, op.sizes, strict=True))
        levels[op] = tuple(levels_of(s, f, grid, moving) for s, f in zip(least, op.sizes, strict=True))
        shapes[op] = [op.at(sizes) for sizes in itertools.product(*levels[op])]
    table.learn([shape for some in shapes.values() for shape in some], progress)
    found = {}
    for op, some in shapes.items():
        seconds = np.array(table.seconds(some)).reshape([len(own) for own in levels[op]])
        for axis in range(seconds.ndim):  # noise must not make a wider op look cheaper
            seconds = np.maximum.accumulate(seconds, axis=axis)
        found[op] = Surface(levels[op], seconds)
    return found
