"""candidates: every offered form is the same convolution, and cheaper than dense."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.branched import BranchedConv
from gkp.converter.lower.candidates import PAD, Candidate, candidates, dense, grouped, merge_to, split


@st.composite
def forms(draw: st.DrawFn) -> BranchedConv:
    """2 to 8 branches, overlapping or not, unequal or not, some outputs in none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    n, c = draw(st.integers(2, 8)), draw(st.integers(4, 24))
    sizes = rng.integers(1, 5, n) if draw(st.booleans()) else np.full(n, 3)
    f = int(sizes.sum()) + draw(st.integers(0, 3))
    outs = np.split(rng.permutation(f)[: sizes.sum()], np.cumsum(sizes)[:-1])
    triples = []
    for out in outs:
        ins = rng.permutation(c)[: rng.integers(1, c + 1)]
        triples.append((ins, out, rng.standard_normal((len(out), len(ins), 3))))
    return BranchedConv.build(c, f, triples, bias=rng.standard_normal(f), kernel_shape=[3], pads=[1, 1])


def weight_of(candidate: Candidate, conv: BranchedConv) -> np.ndarray:
    """The dense weight that the groups amount to; every output is written exactly once."""
    weight, writers = np.zeros_like(conv.to_dense()), np.zeros(conv.out_channels, int)
    for g in candidate.groups:
        given = g.weight()
        assert given.shape == g.shape == (g.out_index.size, g.in_index.size, *conv.kernel_shape)
        rows, cols = np.flatnonzero(g.out_index != PAD), np.flatnonzero(g.in_index != PAD)
        assert not given[g.out_index == PAD].any()
        assert not given[:, g.in_index == PAD].any()
        weight[np.ix_(g.out_index[rows], g.in_index[cols])] = given[np.ix_(rows, cols)]
        writers[g.out_index[rows]] += 1
    assert (writers == 1).all()
    return weight


@settings(max_examples=80, deadline=None)
@given(forms(), st.sampled_from([1, 4, 8, 16]))
def test_every_candidate_is_the_same_convolution_for_fewer_operations(conv: BranchedConv, block: int) -> None:
    offered = candidates(conv, block, (7,))
    assert offered[0].is_dense
    assert len({c.name for c in offered}) == len(offered)
    for c in offered:
        assert np.array_equal(weight_of(c, conv), conv.to_dense())
        assert c.is_dense or c.macs((7,)) < offered[0].macs((7,))
        if not c.is_dense and not c.parallel:
            assert len({g.shape for g in c.groups}) == 1
            if c.name.endswith("-padded"):
                assert all(n % block == 0 for n in c.groups[0].shape[:2])


@settings(max_examples=40, deadline=None)
@given(forms(), st.integers(1, 8))
def test_merging_keeps_the_convolution(conv: BranchedConv, groups: int) -> None:
    merged = merge_to(conv, groups)
    assert (merged is None) == bool(len(conv.branches) % groups)
    if merged is not None:
        assert len(merged.branches) == groups
        assert np.array_equal(merged.to_dense(), conv.to_dense())


def test_branches_with_the_same_inputs_are_merged_first() -> None:
    ones = np.ones((1, 2, 1))
    conv = BranchedConv.build(4, 4, [([0, 1], [0], ones), ([2, 3], [1], ones), ([2, 3], [2], ones),
                                     ([0, 1], [3], ones)], kernel_shape=[1])
    merged = merge_to(conv, 2)
    assert merged is not None
    assert [b.in_index.tolist() for b in merged.branches] == [[0, 1], [2, 3]]


def test_macs_count_the_padding_that_is_executed() -> None:
    conv = BranchedConv.from_grouped(np.ones((6, 3, 3, 3)), 2)
    assert dense(conv).macs((4, 4)) == 6 * 6 * 9 * 16
    assert grouped(conv, 2).macs((4, 4)) == 6 * 3 * 9 * 16
    assert grouped(conv, 2, 4).macs((4, 4)) == 2 * 4 * 4 * 9 * 16
    assert split(conv, 2).macs((4, 4)) == 6 * 3 * 9 * 16


def test_one_branch_and_plain_copies_are_offered_dense_only() -> None:
    assert all(c.is_dense for c in candidates(BranchedConv.from_dense(np.ones((4, 4, 1))), 8, (5,)))
    copy = BranchedConv.build(2, 4, [([0], [1], np.ones((1, 1, 1))), ([1], [0], np.ones((1, 1, 1)))], kernel_shape=[1])
    assert [c.name for c in candidates(copy, 8, (5,))] == ["dense"]


def test_a_branch_count_that_does_not_divide_is_not_offered() -> None:
    conv = BranchedConv.from_grouped(np.ones((9, 3, 1)), 3)
    assert grouped(conv, 2) is None
    assert split(conv, 2) is None
    assert [c.name for c in candidates(conv, 1, (5,))] == ["dense", "grouped-3", "split-3"]
