"""Chunks hold every weight once, and groups have fewer of them."""

from __future__ import annotations

import numpy as np
import pytest
from conv_kit import random_conv

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.kernels.matrix.chunks import COLUMNS, Lines, best_words, chunks, count, lines
from gkp.converter.native.kernels.matrix.direct import BYTE_MATRICES


def whole(conv: BranchedConv) -> np.ndarray:
    return np.rint(conv.to_dense() * 20).astype(np.int8)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("seed", range(6))
def test_every_weight_is_in_one_chunk(seed: int, vectors: int, joined: bool) -> None:
    conv = random_conv(np.random.default_rng(seed))
    found = lines(conv, conv.in_channels + 3, whole, joined)
    words = best_words(found, vectors, BYTE_MATRICES)
    panels = chunks(found, vectors, words, BYTE_MATRICES)
    again = np.zeros((len(panels) * vectors * COLUMNS, *found.weights.shape[1:2], found.weights.shape[2] + 64), int)
    for panel in panels:
        for (line, start), weights in zip(panel.starts, panel.weights, strict=True):
            assert start >= 0
            flat = weights.transpose(0, 2, 1, 3).reshape(panel.vectors * COLUMNS, -1)
            again[panel.first:panel.first + len(flat), line, start:start + flat.shape[1]] += flat
    outputs, _, length = found.weights.shape
    assert (again[:outputs, :, :length] == found.weights).all()
    assert not again[outputs:].any()
    assert not again[..., length:].any()
    assert [(p.vectors, len(p.starts)) for p in panels] == count(found, vectors, words, BYTE_MATRICES)


def blocks(channels: int, groups: int) -> Lines:
    rng, parts = np.random.default_rng(0), np.array_split(np.arange(channels), groups)
    conv = BranchedConv(channels, channels, tuple(Branch(p, p, rng.uniform(1, 2, (len(p), len(p), 3, 3))) for p in parts),
                        np.zeros(channels), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    return lines(conv, channels, whole, False)


@pytest.mark.parametrize(("channels", "groups", "gain"), [(512, 1, 1), (512, 8, 8), (256, 4, 4), (128, 8, 2)])
def test_groups_that_fill_chunks_have_as_many_fewer_as_they_multiply_less(channels: int, groups: int, gain: int) -> None:
    dense, grouped = (sum(v * n for v, n in count(found, 1, 16, BYTE_MATRICES)) for found in (blocks(channels, 1), blocks(channels, groups)))
    assert dense == gain * grouped


def test_chunks_are_no_wider_than_they_need_to_be() -> None:
    """A row of 3 x 16 bytes is one chunk of 48, one of 3 x 32 two of 48."""
    for channels, words, items in ((16, 12, 3), (32, 12, 6), (64, 16, 9)):
        conv = random_conv(np.random.default_rng(0), (3, 3), (1, 1), ins=channels, outs=16)
        conv = BranchedConv(channels, 16, (Branch(np.arange(channels), np.arange(16), np.ones((16, channels, 3, 3))),), conv.bias,
                            (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
        found = lines(conv, channels, whole, True)
        assert best_words(found, 1, BYTE_MATRICES) == words
        assert count(found, 1, words, BYTE_MATRICES) == [(1, items)]
