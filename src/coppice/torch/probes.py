"""Two trials that settle most models: where the code agrees with the plan at these widths, nothing needs a search.

At **prime** widths, all of one octave, no width is another's multiple, part, sum or difference: code that takes a size from the wrong
place, or works it out from others, can't agree by chance. At **low** widths, mostly one and the same, shows what the code does below some
size, or where two sizes happen to be equal. A disagreement says nothing about where and why: ``coppice.torch.sizes`` finds that out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from coppice.axes import Axis, find
from coppice.coupling import Coupling
from coppice.graph import Kind
from coppice.torch.lockstep import Sizes
from coppice.torch.trial import Trials

OCTAVE = 256  # the least prime is larger than most sizes that code has for other reasons
MOST, MOST_WITH_VALUES = 2**48, 2**24  # elements of a tensor
LOW = 8  # the width that a plan leaves at least, if it is not told otherwise


def agrees_at_once(trials: Trials, coupling: Coupling) -> bool:
    """Whether both trials agree, op by op."""
    if not coupling.prunable:
        return False
    prime = prime_widths(coupling)
    return fits(coupling, prime) and trials.agrees(prime) and trials.agrees(low_widths(coupling))


def fits(coupling: Coupling, widths: Mapping[Axis, int]) -> bool:
    """Whether a trial at ``widths`` can be had: an axis of many factors, each a prime, outgrows what a tensor may count.

    What the code makes of numbers alone has values in a trial, and so takes memory.
    """
    graph, sizes = coupling.graph, Sizes(widths)
    counts = [math.prod([sizes[find(axis)] for axis in dims]) for dims in coupling.dims]
    from_data = {v.id for v in graph.values if v.kind in (Kind.PARAMETER, Kind.INPUT)}
    for op in graph.ops:
        if any(v in from_data for v in (*op.inputs, *op.others)):
            from_data.update(op.outputs)
    return all(count <= (MOST if k in from_data else MOST_WITH_VALUES) for k, count in enumerate(counts))


def _units(coupling: Coupling) -> Iterator[tuple[tuple[Axis, ...], int]]:
    """Every bundle that may move, and the number of equal parts that its widths have."""
    for bundle in coupling.free_bundles():
        yield bundle, math.gcd(*(a.size for a in bundle))


def prime_widths(coupling: Coupling) -> dict[Axis, int]:
    """A prime for every bundle."""
    bundles = list(_units(coupling))
    return {a: a.size // unit * prime for (bundle, unit), prime in zip(bundles, _primes(len(bundles)), strict=True) for a in bundle}


def low_widths(coupling: Coupling) -> dict[Axis, int]:
    """About the least that a plan leaves; a short axis goes down to 1, where most code that can't take it fails."""
    chosen: dict[Axis, int] = {}
    for bundle, unit in _units(coupling):
        part = 1 if unit <= LOW else math.ceil(LOW / min(a.size // unit for a in bundle))
        chosen.update({a: a.size // unit * part for a in bundle})
    return chosen


def _primes(count: int) -> list[int]:
    """The first ``count`` primes of the lowest octave, from ``OCTAVE`` on, that has as many."""
    low = OCTAVE
    while True:
        sieve = bytearray([1]) * (2 * low)
        for n in range(2, math.isqrt(2 * low) + 1):
            sieve[n * n :: n] = bytes(len(range(n * n, 2 * low, n)))
        found = [n for n in range(low, 2 * low) if sieve[n]]
        if len(found) >= count:
            return found[:count]
        low *= 2
