"""What a cut must reach: `macs=0.5`, `params=2.0M`, `bytes=5MB`, `latency=4ms@openvino:threads=2:batch=1`, or any mix.

A bare number is a fraction of the dense model and lies between 0 and 1; a number with a unit is absolute.
Units are decimal (`k`, `M`, `G`, `T` = 10^3 ... 10^12), or binary for bytes when written `KiB`, `MiB`, `GiB`. A latency says where: a
runtime, and the threads and the batch if they are not 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coppice.errors import CoppiceError
from coppice.runtimes import RUNTIMES
from coppice.timing import Setting

if TYPE_CHECKING:
    from coppice.cost import Cost

KEYS = ("macs", "params", "bytes", "latency")
_DECIMAL: dict[str, float] = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY: dict[str, float] = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS: dict[str, dict[str, float]] = {
    "macs": _DECIMAL | {f"{u}mac{s}": n for u, n in _DECIMAL.items() for s in ("", "s")},
    "params": _DECIMAL,
    "bytes": {"b": 1, **_DECIMAL, **{f"{u}b": n for u, n in _DECIMAL.items()}, **_BINARY},
    "latency": {"s": 1, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
}
_VALUE = re.compile(r"\s*([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([a-zµ]*)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """One entry of a target: `amount` is a fraction of the dense model's cost, or a count when `absolute`. `setting`: of a latency."""

    key: str
    amount: float
    absolute: bool
    text: str
    setting: Setting | None = None

    def resolve(self, dense: float) -> float:
        """The budget in MACs, parameters, bytes or seconds, for a dense model that costs `dense`. CoppiceError if it is met already."""
        if not self.absolute:
            return self.amount * dense
        if self.amount >= dense:
            raise CoppiceError(f"target {self.key}={self.text}: the dense model costs {humanise(dense, self.key)} and meets it already")
        return self.amount


@dataclass(frozen=True)
class Target:
    """A set of budgets, at most one a key, in the order given. Empty when only a floor on accuracy is asked for."""

    budgets: tuple[Budget, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.budgets)

    def resolve(self, dense: Cost) -> dict[str, float]:
        """Absolute budgets by key. Raises CoppiceError if the dense model meets one already."""
        return {b.key: b.resolve(getattr(dense, b.key)) for b in self.budgets}  # of a dense model that was timed, if a latency is asked for

    @property
    def setting(self) -> Setting | None:
        """Where the latency is measured, if there is one in the target."""
        return next((b.setting for b in self.budgets if b.setting is not None), None)

    def to_dict(self) -> dict[str, str]:
        return {b.key: b.text for b in self.budgets}

    def __str__(self) -> str:
        return ", ".join(f"{b.key}={b.text}" for b in self.budgets)


def parse_target(given: str | Iterable[str] | Mapping[str, str | float] | Target) -> Target:
    """A target from `"macs=0.5,params=2.0M"`, several such strings, or a mapping. Raises CoppiceError naming the entry that is wrong."""
    if isinstance(given, Target):
        return given
    if isinstance(given, Mapping):
        entries = [f"{key}={value}" for key, value in given.items()]
    else:
        texts = [given] if isinstance(given, str) else list(given)
        entries = [entry.strip() for text in texts for entry in text.split(",")]
    budgets = tuple(_parse_entry(entry) for entry in entries)
    for key in KEYS:
        if sum(b.key == key for b in budgets) > 1:
            raise CoppiceError(f"target: {key} is given twice, give it once")
    return Target(budgets)


def _parse_entry(entry: str) -> Budget:
    key, equals, text = entry.partition("=")
    key, text = key.strip().lower(), text.strip()
    if not equals or key not in KEYS:
        raise CoppiceError(f"target {entry!r}: write KEY=VALUE with a key of {', '.join(KEYS)}, for example macs=0.5 or bytes=5MB")
    size, _, place = text.partition("@")
    setting = _setting(entry, place) if key == "latency" else None
    match = _VALUE.fullmatch(size if key == "latency" else text)
    unit = match[2].lower() if match else ""
    if match is None or (unit and unit not in _UNITS[key]):
        raise CoppiceError(f"target {entry!r}: {text!r} is no size, write a fraction such as 0.5 or an absolute such as {_example(key)}")
    number = float(match[1])
    if number <= 0:
        raise CoppiceError(
            f"target {entry!r}: nothing can be cut to zero, write a fraction between 0 and 1 or an absolute such as {_example(key)}"
        )
    if unit:
        return Budget(key, number * _UNITS[key][unit], True, text, setting)
    if number >= 1:
        raise CoppiceError(
            f"target {entry!r}: a fraction of the dense model lies between 0 and 1, and an absolute needs a unit, as in {_example(key)}"
        )
    return Budget(key, number, False, text, setting)


def _setting(entry: str, place: str) -> Setting:
    """`onnxruntime:threads=2:batch=8`; both are 1 where they are not given."""
    name, *options = place.split(":")
    given = dict(option.partition("=")[::2] for option in options)
    if not name or set(given) - {"threads", "batch"} or not all(value.isdigit() and int(value) for value in given.values()):
        raise CoppiceError(f"target {entry!r}: say where the latency is measured, as in latency=0.5@onnxruntime:threads=1:batch=1")
    if name not in RUNTIMES:
        raise CoppiceError(f"target {entry!r}: there is no runtime {name!r}, choose one of {', '.join(RUNTIMES)}")
    return Setting(name, int(given.get("threads", 1)), int(given.get("batch", 1)))


def _example(key: str) -> str:
    return {"macs": "2.0G", "params": "2.0M", "bytes": "5MB", "latency": "4ms@onnxruntime"}[key]


def humanise(count: float, key: str) -> str:
    """`40.8 M`, `1.08 MB`, `4.31 ms`: three figures and a unit."""
    if key == "latency":
        return f"{count * 1e3:.3g} ms"
    suffix = "B" if key == "bytes" else ""
    for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= power * 0.9995:
            return f"{count / power:.3g} {unit}{suffix}"
    return f"{count:.0f} {suffix}".rstrip()


def interpolate(budgets: Mapping[str, float], dense: Cost, part: float) -> dict[str, float]:
    """Budgets `part` of the way (0 to 1) from the dense cost to `budgets`, geometrically: every cut takes the same share."""
    return {key: getattr(dense, key) * (budget / getattr(dense, key)) ** part for key, budget in budgets.items()}
