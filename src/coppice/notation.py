"""The notation of the rule table: one line says what an op does to every dim.

``"n (g i) ~..., (g o) i ~..., (g o) -> n (g o) ~..."``: operands left of the arrow, results right of it, dims separated by spaces.

=========  ====================================================================================================
``c``      an axis; the same letter is the same axis wherever it stands in the line
``(g i)``  a product of axes, major first
``...``    any number of leading or inner dims, aligned from the right and broadcast as in NumPy
``~``      a dim that the op computes anew and that can't be cut (a kernel size, a pooled height); in a product, such a factor
``~...``   any number of such dims
``c!``     the op mixes along ``c``: a result at one index depends on which other indices exist (a softmax, a norm)
=========  ====================================================================================================

>>> rule = parse("... c!, c, c -> ... c")
>>> len(rule.operands), sorted(rule.mixed)
(3, ['c'])
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache

_LETTER = "[a-z][a-z0-9]*!?"
_TOKEN = re.compile(rf"\(((?:{_LETTER}|~)(?: (?:{_LETTER}|~))*)\)|(~\.\.\.)|(~)|(\.\.\.)|({_LETTER})")


class Special(Enum):
    ELLIPSIS = "..."
    FRESH = "~"
    FRESH_MANY = "~..."


Dim = tuple[str, ...] | Special  # letters of a product (one letter: a plain axis), or a special dim
Pattern = tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A parsed line: one pattern an operand, one a result, and the letters that the op mixes."""

    operands: tuple[Pattern, ...]
    results: tuple[Pattern, ...]
    mixed: frozenset[str]
    contracted: frozenset[str]  # summed away: these letters stand in an operand but in no result

    @staticmethod
    def letters(patterns: tuple[Pattern, ...]) -> set[str]:
        return {letter for p in patterns for dim in p if not isinstance(dim, Special) for letter in dim if letter != "~"}


@cache
def parse(text: str) -> Line:
    """Parse one line of the notation. ValueError with the offending text where it is malformed."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise ValueError(f"no '->' in {text!r}")
    operands = tuple(_pattern(p) for p in left.split(","))
    results = tuple(_pattern(p) for p in right.split(","))
    summed = frozenset(Line.letters(operands) - Line.letters(results))
    return Line(operands, results, frozenset(re.findall(r"([a-z][a-z0-9]*)!", text)), summed)


def _pattern(text: str) -> Pattern:
    text = text.strip()
    dims: list[Dim] = []
    while text:
        match = _TOKEN.match(text)
        if match is None or (match.end() < len(text) and text[match.end()] != " "):
            raise ValueError(f"can't read {text!r}")
        group, fresh_many, fresh, ellipsis, letter = match.groups()
        if fresh_many:
            dims.append(Special.FRESH_MANY)
        elif fresh:
            dims.append(Special.FRESH)
        elif ellipsis:
            dims.append(Special.ELLIPSIS)
        else:
            dims.append(tuple((group or letter).replace("!", "").split()))
        text = text[match.end() :].lstrip()
    if sum(d in (Special.ELLIPSIS, Special.FRESH_MANY) for d in dims) > 1:
        raise ValueError("a pattern can hold one ellipsis")
    return tuple(dims)


def spread(pattern: Pattern, rank: int) -> list[Dim]:
    """``pattern`` with its ellipsis opened to fit ``rank`` dims; ValueError where it can't."""
    many = next((d for d in pattern if d in (Special.ELLIPSIS, Special.FRESH_MANY)), None)
    missing = rank - len(pattern) + (many is not None)
    if missing < 0 or (many is None and missing):
        raise ValueError(f"a pattern of {len(pattern)} dims does not fit a tensor of {rank}")
    one = Special.FRESH if many is Special.FRESH_MANY else Special.ELLIPSIS
    return [d for dim in pattern for d in ([one] * missing if dim is many and many is not None else [dim])]
