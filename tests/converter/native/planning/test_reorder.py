"""Channels in the order in which they are written: everything that belongs to a channel goes with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from conv_kit import random_conv

from gkp.branched import Branch
from gkp.converter.native.planning.reorder import contiguous_channels
from gkp.converter.native.program import Conv, Port, Program, Value


def test_the_scales_of_integers_go_with_their_channels() -> None:
    rng = np.random.default_rng(0)
    first, second = (random_conv(rng, (1, 1), (1, 1), ins=i, outs=o) for i, o in ((6, 24), (24, 5)))
    first = replace(first, branches=first.merge([range(len(first.branches))]).branches)
    backwards = replace(first, branches=tuple(replace(b, out_index=b.out_index[::-1], weight=b.weight[::-1])
                                              for b in first.split(3).branches[::-1]))
    powers = np.exp2(rng.integers(-8, 8, 24)).astype(np.float32)
    whole = tuple(replace(b, weight=np.rint(20 * b.weight) * powers[b.out_index].reshape(-1, 1, 1, 1)) for b in backwards.branches)
    made = replace(backwards, branches=whole, scale=powers)
    values = Value(6, 3, 3), Value(24, 3, 3), Value(5, 3, 3)
    steps = contiguous_channels(Program(values, (Conv(0, 1, made), Conv(1, 2, second)), (), ())).steps
    moved = steps[0]
    assert isinstance(moved, Conv)
    order = np.concatenate([b.out_index for b in moved.conv.branches])
    assert (order == np.arange(order.size)).all()
    assert moved.conv.scale is not None
    assert all((b.weight % moved.conv.scale[b.out_index].reshape(-1, 1, 1, 1) == 0).all() for b in moved.conv.branches)
    assert not (moved.conv.scale == powers).all()


def test_what_a_branch_reads_lies_side_by_side() -> None:
    """Where the one that writes it has a single branch; the function stays."""
    rng = np.random.default_rng(1)
    first = random_conv(rng, (1, 1), (1, 1), ins=6, outs=24)
    dense = replace(first, branches=(Branch(np.arange(6), np.arange(24), rng.standard_normal((24, 6, 1, 1))),))
    ins, outs = (np.array_split(rng.permutation(24), 3) for _ in range(2))
    parts = tuple(Branch(np.sort(i), np.sort(o), rng.standard_normal((8, 8, 1, 1))) for i, o in zip(ins, outs, strict=True))
    grouped = replace(dense, in_channels=24, branches=parts)
    values = Value(6, 3, 3), Value(24, 3, 3), Value(24, 3, 3)
    before = Program(values, (Conv(0, 1, dense), Conv(1, 2, grouped)), (), (Port("y", 2, (24, 3, 3)),))
    one, two = (step for step in contiguous_channels(before).steps if isinstance(step, Conv))
    assert [b.in_index.tolist() for b in two.conv.branches] == [list(range(8 * k, 8 * k + 8)) for k in range(3)]
    x = rng.standard_normal((1, 6, 3, 3))
    np.testing.assert_allclose(two.conv(one.conv(x)), grouped(dense(x)), rtol=1e-5, atol=1e-5)


def test_channels_that_branches_share_stay_where_they_are() -> None:
    rng = np.random.default_rng(2)
    first, second = (random_conv(rng, (1, 1), (1, 1), ins=i, outs=o) for i, o in ((6, 24), (24, 5)))
    dense = replace(first, branches=(Branch(np.arange(6), np.arange(24), rng.standard_normal((24, 6, 1, 1))),))
    shared = replace(second, branches=tuple(Branch(np.sort(rng.permutation(24)[:20]), np.array([k]), rng.standard_normal((1, 20, 1, 1)))
                                            for k in range(2)))
    program = Program((Value(6, 3, 3), Value(24, 3, 3), Value(5, 3, 3)), (Conv(0, 1, dense), Conv(1, 2, shared)), (),
                      (Port("y", 2, (5, 3, 3)),))
    assert contiguous_channels(program).steps == program.steps
