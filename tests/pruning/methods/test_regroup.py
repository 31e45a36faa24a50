"""Regrouping: the partitioner, the columns of a block (corrected and as published), and the masks of blocks."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.errors import BackendMissingError, UsageError
from gkp.pruning.masks import branches_of_mask
from gkp.pruning.methods.hypergraph import partition
from gkp.pruning.methods.regroup import block_columns, find_blocks, mask_of_blocks, published_columns


def planted(rng: np.random.Generator, parts: int = 4, rows: int = 16, columns: int = 36) -> tuple[np.ndarray, np.ndarray]:
    """(mask: `parts` blocks of 60 % ones, 2 % elsewhere, rows shuffled; the block of each row)."""
    blocks = np.repeat(np.arange(parts), rows)
    chance = np.where(blocks[:, None] == np.repeat(np.arange(parts), columns), 0.6, 0.02)
    order = rng.permutation(parts * rows)
    return (rng.random(chance.shape) < chance)[order], blocks[order]


# ---- the partitioner -------------------------------------------------------------------------------------------------
def test_planted_parts_are_found() -> None:
    pytest.importorskip("mtkahypar")
    mask, blocks = planted(np.random.default_rng(0))
    labels = partition(mask, 4, 0.1, seed=0)
    assert np.bincount(labels).tolist() == [16] * 4
    assert all(len(set(labels[blocks == b])) == 1 for b in range(4))


def test_same_seed_gives_the_same_parts_within_the_imbalance() -> None:
    pytest.importorskip("mtkahypar")
    mask = np.random.default_rng(1).random((40, 90)) < 0.2
    first, again = (partition(mask, 5, 0.25, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.bincount(first).max() <= 10
    assert len(np.unique(first)) == 5


def test_few_vertices_and_lonely_edges() -> None:
    assert partition(np.ones((1, 5), bool), 8, 0.1, 0).tolist() == [0]
    pytest.importorskip("mtkahypar")
    assert sorted(partition(np.ones((3, 5), bool), 8, 0.1, 0).tolist()) == [0, 1, 2]
    assert len(partition(np.eye(6, dtype=bool), 2, 0.1, 0)) == 6  # no edge of two vertices


def test_missing_partitioner_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    with pytest.raises(BackendMissingError, match="mtkahypar") as error:
        partition(np.ones((4, 4), bool), 2, 0.1, 0)
    assert "prune" in error.value.hint


@pytest.mark.parametrize(("parts", "imbalance"), [(0, 0.1), (2, -0.1)])
def test_impossible_partitions_are_refused(parts: int, imbalance: float) -> None:
    with pytest.raises(UsageError, match="partition"):
        partition(np.ones((4, 4), bool), parts, imbalance, 0)


# ---- the columns of a block ------------------------------------------------------------------------------------------
def test_block_columns_by_hand() -> None:
    # Uses per column: 3 1 3 2 1 -> ranked 0 2 3 1 4. Outside the first i: i=1 (2,2,2): 1 > 3? no; i=2 (1,1,2): 2 > 3? no;
    # i=3 (1,0,1): 3 > 1.5 yes.
    part = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]], bool)
    part[0, 3], part[0, 1] = False, True
    assert part.sum(0).tolist() == [3, 1, 3, 2, 1]
    assert block_columns(part).tolist() == [0, 2, 3]
    assert block_columns(part, density=1.0).tolist() == [0, 2, 3]  # 2 > 2? no
    assert block_columns(part, density=0.9).tolist() == [0, 2]  # 2 > 1.8
    assert block_columns(part, density=10).tolist() == [0, 2, 3, 1, 4]  # 4 > 10? no; all of them


def test_dense_part_keeps_every_column() -> None:
    assert block_columns(np.ones((3, 5), bool)).tolist() == [0, 1, 2, 3]  # 4 > 1.5, one is left out
    assert block_columns(np.ones((3, 1), bool)).tolist() == [0]


def published_with_loops(part: np.ndarray, density: float) -> list[int] | None:
    """The public rule: count down by column number, stop looking at rows after the first that fails."""
    columns = sorted(range(part.shape[1]), key=lambda c: -int(part[:, c].sum()))
    left = [int(row.sum()) for row in part]
    for i in range(1, part.shape[1]):
        for r in range(len(part)):
            left[r] -= int(part[r, i])
            if i <= density * left[r]:
                break
        else:
            return columns[:i]
    return None


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 40), st.floats(0.05, 0.95), st.sampled_from((0.5, 1.5)))
def test_published_columns_are_what_plain_loops_give(seed: int, rows: int, columns: int, share: float, density: float) -> None:
    part = np.random.default_rng(seed).random((rows, columns)) < share
    found = published_columns(part, density)
    assert (None if found is None else found.tolist()) == published_with_loops(part, density)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 40), st.floats(0.05, 0.95))
def test_corrected_block_is_the_smallest_that_keeps_the_rule(seed: int, rows: int, columns: int, share: float) -> None:
    part = np.random.default_rng(seed).random((rows, columns)) < share
    found = block_columns(part)

    def outside(chosen: np.ndarray) -> int:
        return int(np.delete(part, chosen, axis=1).sum(1).max())

    assert len(found) > 1.5 * outside(found)
    assert len(found) == 1 or not len(found) - 1 > 1.5 * outside(found[:-1])


def test_published_blocks_are_half_as_large_again() -> None:
    # 576 random columns of density 0.2: 213 columns as published, 144 corrected, in the draw on record.
    draws = [np.random.default_rng(seed).random((64, 576)) < 0.2 for seed in range(10)]
    corrected = [len(block_columns(part)) for part in draws]
    published = [len(found) for part in draws if (found := published_columns(part)) is not None]
    assert len(published) == 10
    assert np.mean(corrected) == pytest.approx(144, rel=0.05)
    assert np.mean(published) == pytest.approx(213, rel=0.08)
    assert min(published) > 1.2 * max(corrected)


# ---- blocks and masks ------------------------------------------------------------------------------------------------
def by_row(labels: list[int]):  # type: ignore[no-untyped-def]
    """A partition that deals the non-empty rows out as told."""
    return lambda incidence: np.array(labels[: len(incidence)])


def test_blocks_by_hand_without_empty_rows_and_small_parts() -> None:
    mask = np.zeros((7, 6), bool)
    mask[[0, 2], :3] = True  # part 0
    mask[[3, 4, 5], 3:] = True  # part 1
    mask[6, 0] = True  # part 2: one row, dropped; row 1 is empty
    blocks = find_blocks(mask, by_row([0, 0, 1, 1, 1, 2]), min_rows=2)
    assert [b.rows.tolist() for b in blocks] == [[3, 4, 5], [0, 2]]
    # Three columns of three: 1 > 1.5 * 2? no; 2 > 1.5 yes.
    assert [b.columns.tolist() for b in blocks] == [[3, 4], [0, 1]]
    new = mask_of_blocks(mask.shape, blocks)
    assert new.sum() == 6 + 4
    assert not new[[1, 6]].any()


def test_no_block_where_all_parts_are_small_or_all_is_empty() -> None:
    mask = np.ones((4, 4), bool)
    assert find_blocks(mask, by_row([0, 0, 1, 1]), min_rows=3) == []
    assert find_blocks(np.zeros((4, 4), bool), by_row([]), min_rows=1) == []
    # The published program finds none in a full part: the second row's count is looked at when it is too late.
    assert find_blocks(mask, by_row([0, 0, 1, 1]), min_rows=2, extraction="published") == []
    assert len(find_blocks(mask, by_row([0, 0, 1, 1]), min_rows=2)) == 2


def test_one_branch_per_block_reads_every_channel_its_columns_touch() -> None:
    pytest.importorskip("mtkahypar")
    rng = np.random.default_rng(3)
    mask, _ = planted(rng)
    blocks = find_blocks(mask, lambda m: partition(m, 4, 0.1, 0), min_rows=8)
    new = mask_of_blocks(mask.shape, blocks).reshape(64, 16, 3, 3)
    weight = rng.standard_normal(new.shape).astype(np.float32)
    branches = branches_of_mask(weight, new)
    assert len(branches) == 4
    for ins, outs, part in branches:
        block = next(b for b in blocks if outs[0] in b.rows)
        assert outs.tolist() == block.rows.tolist()
        assert ins.tolist() == sorted({c // 9 for c in block.columns.tolist()})
        taps = np.zeros(144, bool)
        taps[block.columns] = True
        assert ((part != 0) == taps.reshape(16, 3, 3)[ins]).all()


def test_other_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="regrouping needs"):
        find_blocks(np.ones((2, 2, 1), bool), by_row([0, 1]), 1)
