"""GRPS, the matching and its refinement: by hand, against plain loops, and on planted blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.errors import UsageError
from gkp.pruning.methods.grps import (
    find_groups,
    group_sort,
    norm_criterion,
    refined,
    taylor_criterion,
)

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def planted(rng: np.random.Generator, n: int, groups: int, draw: Draw) -> np.ndarray:
    """Diagonal blocks, rows and columns shuffled, zeros elsewhere."""
    size = n // groups
    matrix = np.zeros((n, n))
    for g in range(groups):
        block = slice(g * size, (g + 1) * size)
        matrix[block, block] = draw(rng, (size, size))
    return matrix[rng.permutation(n)][:, rng.permutation(n)]


def half_normal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.abs(rng.standard_normal(shape))


def as_published(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """U + 10 U', both uniform: how the public program draws the blocks of its figure."""
    return rng.random(shape) + 10 * rng.random(shape)


def recovered(draw: Draw, sweeps: int, refine: bool) -> float:
    rng = np.random.default_rng(20)
    runs = (find_groups(planted(rng, 128, 16, draw), 16, sweeps=sweeps, refine=refine) for _ in range(300))
    return float(np.mean([run.preserved for run in runs]))


@pytest.mark.parametrize(("sweeps", "share"), [(1, 0.65), (2, 0.88), (10, 0.98)])
def test_published_procedure_recovers_the_published_share_of_planted_blocks(sweeps: int, share: float) -> None:
    # Published for 128 rows and columns in 16 blocks: 0.654, 0.880, 0.983.
    assert recovered(as_published, sweeps, refine=False) >= share


@pytest.mark.parametrize(("sweeps", "share"), [(1, 0.65), (2, 0.88), (10, 0.98)])
def test_half_normal_blocks_are_recovered_with_refinement(sweeps: int, share: float) -> None:
    assert recovered(half_normal, sweeps, refine=True) >= share


def test_more_sweeps_recover_more_of_half_normal_blocks_without_refinement() -> None:
    one, two, ten = (recovered(half_normal, sweeps, refine=False) for sweeps in (1, 2, 10))
    assert 0.55 < one < two < ten
    assert ten > 0.95


def sorted_with_loops(criterion: np.ndarray, groups: int, sweeps: int) -> tuple[list[int], list[int]]:
    """group_sort, written out with lists."""
    f, c = criterion.shape
    rows, columns, height, width = list(range(f)), list(range(c)), f // groups, c // groups
    for g in reversed(range(groups)):
        bottom, right = (g + 1) * height, (g + 1) * width
        for _ in range(sweeps):
            last = rows[bottom - height : bottom]
            columns[:right] = sorted(columns[:right], key=lambda j: sum(criterion[i][j] for i in last))
            last = columns[right - width : right]
            rows[:bottom] = sorted(rows[:bottom], key=lambda i: sum(criterion[i][j] for j in last))
    return rows, columns


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(((6, 4, 2), (8, 8, 4), (3, 9, 3), (4, 4, 1))), st.integers(1, 4))
def test_group_sort_is_what_plain_loops_give(seed: int, shape: tuple[int, int, int], sweeps: int) -> None:
    f, c, groups = shape
    criterion = np.random.default_rng(seed).integers(0, 5, (f, c)).astype(float)  # integers: equal sums are equal
    rows, columns = group_sort(criterion, groups, sweeps)
    assert (rows.tolist(), columns.tolist()) == sorted_with_loops(criterion, groups, sweeps)


def test_two_planted_blocks_by_hand() -> None:
    # Filters 0 and 2 read channels 1 and 3, filters 1 and 3 read 0 and 2.
    criterion = np.array([[0, 5, 0, 1], [2, 0, 3, 0], [0, 4, 0, 2], [1, 0, 1, 0]], float)
    grouping = find_groups(criterion, 2)
    assert grouping.channels.tolist() == [[0, 2], [1, 3]]
    assert grouping.filters.tolist() == [[1, 3], [0, 2]]
    assert grouping.preserved == 1
    np.testing.assert_array_equal(grouping.mask(), criterion > 0)


def test_same_order_matches_the_blocks_as_they_stand() -> None:
    # Block sums: [[1, 9], [6, 4]]; the best matching takes 9 + 6 of 20.
    criterion = np.array([[1, 9], [6, 4]], float)
    grouping = find_groups(criterion, 2, "SAME", refine=False)
    assert (grouping.channels.tolist(), grouping.filters.tolist()) == ([[0], [1]], [[1], [0]])
    assert grouping.preserved == pytest.approx(15 / 20)


def test_sort_puts_rows_and_columns_in_order_of_their_sums() -> None:
    # Row sums 3, 40, 12, 21; column sums 22, 14, 24, 16: orders 0 2 3 1 and 1 3 0 2, blocks [[4, 11], [26, 35]].
    criterion = np.array([[0, 1, 2, 0], [10, 10, 10, 10], [8, 1, 1, 2], [4, 2, 11, 4]], float)
    assert criterion.sum(1).tolist() == [3, 40, 12, 21]
    assert criterion.sum(0).tolist() == [22, 14, 24, 16]
    grouping = find_groups(criterion, 2, "SORT", refine=False)
    assert grouping.preserved == pytest.approx((4 + 35) / 76)
    assert grouping.filters.tolist() == [[1, 3], [0, 2]]
    assert grouping.channels.tolist() == [[0, 2], [1, 3]]


def test_criteria_by_hand() -> None:
    weight = np.array([[[[3.0, 4.0]], [[0.0, -2.0]]]], np.float32)
    gradient = np.array([[[[-1.0, 0.5]], [[7.0, 0.25]]]], np.float32)
    assert norm_criterion(weight).tolist() == [[5, 2]]
    assert taylor_criterion(weight, gradient).tolist() == [[5, 0.5]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(((4, 4, 2), (6, 3, 3), (8, 12, 4), (5, 5, 1))),
       st.sampled_from(("GRPS", "SORT", "SAME")), st.booleans())
def test_groups_partition_filters_and_channels(seed: int, shape: tuple[int, int, int], order: str, refine: bool) -> None:
    f, c, groups = shape
    criterion = np.random.default_rng(seed).random((f, c))
    grouping = find_groups(criterion, groups, order, refine=refine)
    assert sorted(grouping.filters.ravel().tolist()) == list(range(f))
    assert sorted(grouping.channels.ravel().tolist()) == list(range(c))
    assert grouping.filters.shape == (groups, f // groups)
    mask = grouping.mask()
    assert (mask.sum(1) == c // groups).all()
    assert (mask.sum(0) == f // groups).all()
    assert grouping.preserved == pytest.approx(criterion[mask].sum() / criterion.sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_refinement_never_loses_and_never_beats_the_best(seed: int) -> None:
    criterion = np.random.default_rng(seed).random((4, 4))
    best = max(criterion[list(p[:2])][:, list(q[:2])].sum() + criterion[list(p[2:])][:, list(q[2:])].sum()
               for p in permutations(range(4)) for q in permutations(range(4)))
    start = find_groups(criterion, 2, "SAME", refine=False)
    filters, channels = refined(criterion, start.filters, start.channels)
    kept = sum(criterion[np.ix_(a, b)].sum() for a, b in zip(filters, channels, strict=True))
    assert start.preserved * criterion.sum() - 1e-9 <= kept <= best + 1e-9


def test_a_layer_of_zeros_preserves_all_of_nothing() -> None:
    assert find_groups(np.zeros((4, 4)), 2).preserved == 1


@pytest.mark.parametrize("groups", [0, -1, 3, 8])
def test_groups_that_do_not_divide_are_refused(groups: int) -> None:
    with pytest.raises(UsageError, match="cannot be divided"):
        find_groups(np.ones((4, 6)), groups)


def test_other_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="finite"):
        find_groups(np.array([[1, np.nan], [1, 1]]), 2)
    with pytest.raises(UsageError, match="BEST"):
        find_groups(np.ones((2, 2)), 2, "BEST")
    with pytest.raises(UsageError, match="sweeps"):
        find_groups(np.ones((2, 2)), 2, sweeps=0)
