"""Axes: what a split, a factoring or a unification says must hold for the masks, whatever is refined afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coppice.axes import Axis, Form, atoms, factor, factors, find, mix, pin, product_of, split, sum_of, terms, unify
from coppice.cost import width
from coppice.coupling import Mask, keep_mask


def masks_of(axes: list[Axis], seed: int = 0) -> dict[Axis, Mask]:
    """A random subset of every atom that may be cut."""
    rng = np.random.default_rng(seed)
    return {a: np.ones(a.size, bool) if a.pinned or a.size == 1 else rng.random(a.size) < 0.6 for axis in axes for a in atoms(axis)}


def test_split_then_split_elsewhere() -> None:
    axis = Axis(10)
    left, right = split(axis, 4) or pytest.fail("no refinement")
    assert [t.size for t in terms(axis)] == [4, 6]
    assert split(axis, 7) is not None
    assert [t.size for t in terms(axis)] == [4, 3, 3]
    assert (find(left).size, find(right).size) == (4, 6)


def test_factor_refines_a_factor() -> None:
    axis = Axis(24)
    assert factor(axis, 2) is not None
    assert factor(axis, 6) is not None
    assert [f.size for f in factors(axis)] == [2, 3, 4]
    assert factor(axis, 5) is None


def test_factoring_a_sum_of_whole_rows_keeps_its_terms() -> None:
    """Two concatenated axes, each of heads of 4: the heads are a sum, their width is one axis."""
    a, b = Axis(8), Axis(12)
    rows, columns = factor(sum_of([a, b]), 5) or pytest.fail("no refinement")
    assert [t.size for t in terms(rows)] == [2, 3]
    assert find(columns).size == 4
    assert [f.size for f in factors(a)] == [2, 4]
    assert find(factors(a)[1]) is find(factors(b)[1])


def test_factoring_a_sum_across_its_terms_ties_the_rows() -> None:
    """8 + 16 in 2 rows of 12: 8 + 4 of each, index by index."""
    a, b = Axis(8), Axis(16)
    rows, columns = factor(sum_of([a, b]), 2) or pytest.fail("no refinement")
    assert [t.size for t in terms(columns)] == [8, 4]
    assert [t.size for t in terms(b)] == [4, 8, 4]
    assert find(terms(b)[0]) is find(terms(b)[2])
    assert find(a) is find(terms(b)[1])
    assert all(atom.pinned or atom.size == 1 for atom in atoms(rows))


def test_splitting_inside_a_row_cuts_that_row_alone() -> None:
    major, minor = Axis(9), Axis(2)
    left, right = split(product_of([major, minor]), 9) or pytest.fail("no refinement")
    assert [find(t).size for t in terms(major)] == [4, 1, 4]
    assert find(left).size == find(right).size == 9
    kept = masks_of([major, minor], 3)
    assert np.array_equal(
        np.logical_and.outer(keep_mask(major, kept), keep_mask(minor, kept)).ravel(),
        np.concatenate([keep_mask(left, kept), keep_mask(right, kept)]),
    )


def test_sizes_that_share_no_refinement_are_pinned() -> None:
    a, b = product_of([Axis(4), Axis(6)]), product_of([Axis(6), Axis(4)])
    assert not unify(a, b)
    assert "share no refinement" in str(find(a).pinned)
    assert all(atom.pinned for axis in (a, b) for atom in atoms(axis))


def test_different_sizes_are_pinned() -> None:
    a, b = Axis(4), Axis(5)
    assert not unify(a, b)
    assert find(a).pinned
    assert find(b).pinned


def test_a_pin_spreads_to_what_is_unified_and_keeps_its_first_reason() -> None:
    a, b = Axis(6), Axis(6)
    split(b, 2)
    pin(a, "first")
    assert unify(a, b)
    pin(a, "second")
    assert {atom.pinned for atom in atoms(b)} == {"first"}


def test_mixing_is_kept_by_refinement_and_union() -> None:
    a, b = Axis(6), Axis(6)
    mix(a)
    split(a, 2)
    assert all(atom.mixed for atom in atoms(a))
    unify(b, a)
    assert all(atom.mixed for atom in atoms(b))


def test_size_one_is_left_out_of_products() -> None:
    a = Axis(5)
    assert product_of([Axis(1), a, Axis(1)]) is a
    assert sum_of([Axis(0), a]) is a
    assert product_of([]).size == 1


def test_a_sum_with_a_part_twice_keeps_both_or_none() -> None:
    a = Axis(4)
    kept = {a: np.array([True, False, True, False])}
    assert keep_mask(sum_of([a, a]), kept).tolist() == [True, False, True, False] * 2


SIZES = st.sampled_from([2, 3, 4, 5, 6, 8, 9, 12, 16, 18, 24])
SLOTS = st.integers(0, 10**6)
STEPS = st.lists(st.tuples(st.sampled_from(["split", "factor", "sum", "product", "unify", "pin"]), SLOTS, SLOTS), min_size=4, max_size=24)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(SIZES, min_size=2, max_size=6), STEPS, st.integers(0, 1000))
def test_masks_agree_with_everything_that_was_said(sizes: list[int], steps: list[tuple[str, int, int]], seed: int) -> None:
    """Every answer is kept as a claim about masks; after all steps, random masks of the atoms must fulfil all of them."""
    axes = [Axis(n) for n in sizes]
    sums: list[tuple[Axis, list[Axis]]] = []
    products: list[tuple[Axis, list[Axis]]] = []
    same: list[tuple[Axis, Axis]] = []
    for name, i, j in steps:
        a, b = axes[i % len(axes)], axes[j % len(axes)]
        size = find(a).size
        if name == "split" and size > 1:
            halves = split(a, 1 + j % (size - 1))
            if halves:
                sums.append((a, list(halves)))
                axes += halves
        elif name == "factor":
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            parts = factor(a, divisors[j % len(divisors)])
            if parts:
                products.append((a, list(parts)))
                axes += parts
        elif name == "sum" and size + find(b).size <= 60:
            sums.append((sum_of([a, b]), [a, b]))
            axes.append(sums[-1][0])
        elif name == "product" and size * find(b).size <= 60 and find(a) is not find(b):
            products.append((product_of([a, b]), [a, b]))
            axes.append(products[-1][0])
        elif name == "unify":
            others = [x for x in axes if find(x).size == size]
            other = others[j % len(others)]
            if unify(a, other):
                same.append((a, other))
            else:
                assert find(a).pinned
                assert find(other).pinned
        elif name == "pin" and j % 5 == 0:
            pin(a, "pinned by the test")
    kept = masks_of(axes, seed)
    counts = {a: int(m.sum()) for a, m in kept.items()}
    for axis in axes:
        mask = keep_mask(axis, kept)
        assert mask.size == find(axis).size
        assert width(axis, counts) == mask.sum()
        assert mask.all() or not find(axis).pinned
    for whole, parts_ in sums:
        assert find(whole).pinned or np.array_equal(keep_mask(whole, kept), np.concatenate([keep_mask(p, kept) for p in parts_]))
    for whole, (rows, columns) in products:
        outer = np.logical_and.outer(keep_mask(rows, kept), keep_mask(columns, kept)).ravel()
        assert find(whole).pinned or np.array_equal(keep_mask(whole, kept), outer)
    for a, b in same:
        assert np.array_equal(keep_mask(a, kept), keep_mask(b, kept))


def test_forms_by_name() -> None:
    assert find(sum_of([Axis(2), Axis(3)])).form is Form.SUM
    assert find(product_of([Axis(2), Axis(3)])).form is Form.PRODUCT
