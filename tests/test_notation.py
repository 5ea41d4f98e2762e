"""The notation of the rule table: what a line means, and that a malformed one is refused with its text."""

from __future__ import annotations

import doctest

import pytest

import coppice.notation
from coppice.notation import Special, parse, spread


def test_examples_in_the_docstring() -> None:
    assert doctest.testmod(coppice.notation).failed == 0


def test_a_convolution() -> None:
    line = parse("n (g i) ~..., (g o) i ~..., (g o) -> n (g o) ~...")
    assert line.operands[0] == (("n",), ("g", "i"), Special.FRESH_MANY)
    assert line.results == ((("n",), ("g", "o"), Special.FRESH_MANY),)
    assert line.contracted == {"i"}
    assert line.mixed == frozenset()


def test_mixed_letters_lose_their_mark() -> None:
    line = parse("n (g c!) ..., (g c), (g c) -> n (g c) ..., n g")
    assert line.mixed == {"c"}
    assert line.operands[0][1] == ("g", "c")
    assert len(line.results) == 2


def test_a_scalar_result() -> None:
    line = parse("a, a -> ")
    assert line.results == ((),)
    assert line.contracted == {"a"}


def test_a_product_with_a_fixed_factor() -> None:
    assert parse("... (c ~) ~ ~ -> ... c ~ ~").operands[0] == (Special.ELLIPSIS, ("c", "~"), Special.FRESH, Special.FRESH)


@pytest.mark.parametrize(
    "text", ["a b", "a B -> a", "(a b -> a", "a.. -> a", "... a ... -> a", "~... ... -> a", "a,b) -> a", "ab! !c -> a"]
)
def test_malformed_lines(text: str) -> None:
    with pytest.raises(ValueError, match=r"can't read|no '->'|one ellipsis"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "rank", "expected"),
    [
        ("... c -> c", 3, [Special.ELLIPSIS, Special.ELLIPSIS, ("c",)]),
        ("... c -> c", 1, [("c",)]),
        ("n c ~... -> c", 4, [("n",), ("c",), Special.FRESH, Special.FRESH]),
        ("a b -> a", 2, [("a",), ("b",)]),
    ],
)
def test_spread(text: str, rank: int, expected: list[object]) -> None:
    assert spread(parse(text).operands[0], rank) == expected


@pytest.mark.parametrize(("text", "rank"), [("a b -> a", 3), ("a b -> a", 1), ("n c ~... -> c", 1)])
def test_a_tensor_of_another_rank(text: str, rank: int) -> None:
    with pytest.raises(ValueError, match="does not fit a tensor"):
        spread(parse(text).operands[0], rank)
