"""Channels in the order in which they are written: everything that belongs to a channel goes with it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from conv_kit import random_conv

from gkp.converter.native.planning.reorder import contiguous_outputs
from gkp.converter.native.program import Conv, Program, Value


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
    steps = contiguous_outputs(Program(values, (Conv(0, 1, made), Conv(1, 2, second)), (), ())).steps
    moved = steps[0]
    assert isinstance(moved, Conv)
    order = np.concatenate([b.out_index for b in moved.conv.branches])
    assert (order == np.arange(order.size)).all()
    assert moved.conv.scale is not None
    assert all((b.weight % moved.conv.scale[b.out_index].reshape(-1, 1, 1, 1) == 0).all() for b in moved.conv.branches)
    assert not (moved.conv.scale == powers).all()
