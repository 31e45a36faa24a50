"""Which input channels a group keeps: counts, a hand-worked case, and agreement with plain loops."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.pruning.methods.kernel_selection import costs, grown, kept_count, select_channels


@pytest.mark.parametrize(("channels", "kept"), [(16, 9), (32, 18), (64, 36), (512, 288), (2048, 1152)])
def test_nine_sixteenths_are_kept_at_the_published_rate(channels: int, kept: int) -> None:
    assert kept_count(channels, 0.4375) == kept


# Four channels of a single 1x1 kernel at 0, 1, 3, 7. Similarity is 1 - distance.
POINTS = np.array([0.0, 1.0, 3.0, 7.0])
SIMILARITY = 1 - np.abs(POINTS[:, None] - POINTS)


def test_lists_grow_by_the_least_similar_channel() -> None:
    # From 0: 7 (-6), then 1 and 3 add up to 0 - 5 = -5 and -2 - 3 = -5: the first. From 1: 7, then 0 (0 - 6 = -6) before 3.
    # From 3: 7 (-3), then 0 (-2 - 6). From 7: 0, then 1 and 3 with -5 each: the first.
    expected = [[0, 1, 3], [0, 1, 3], [0, 2, 3], [0, 1, 3]]
    assert [np.flatnonzero(row).tolist() for row in grown(SIMILARITY, 3)] == expected


def test_cost_of_a_list_worked_out_by_hand() -> None:
    # Pairs of {0, 1, 7}: 0 - 6 - 5 = -11. The one channel outside, 3, is similar to 1 (-1), 0 (-2), 7 (-3).
    # "auto" with two near ones: 3 pairs / (1 x 2) = 1.5, so -11 - 1.5 x -3.
    lists = np.array([[True, True, False, True]])
    assert costs(SIMILARITY, lists, 2).tolist() == [-6.5]
    assert costs(SIMILARITY, lists, 1, 2.0).tolist() == [-11 + 2]
    assert costs(SIMILARITY, lists, 0).tolist() == [-11]
    assert costs(SIMILARITY, np.ones((1, 4), bool), 2).tolist() == [0 - 2 - 6 - 1 - 5 - 3]  # nothing is pruned


def test_the_cheapest_list_wins() -> None:
    # {0, 1, 7} costs -11 - 3 x -1 (one near channel); {0, 3, 7} -2 - 6 - 3 = -11 and its outside, 1, is 0 near 0: -11.
    kernels = POINTS.reshape(1, 4, 1, 1)
    assert select_channels(kernels, 3, 0.4).tolist() == [0, 2, 3]
    assert select_channels(kernels, 3, weigh_pruned=False).tolist() == [0, 1, 3]  # -11 twice: the first


def naive(kernels: np.ndarray, keep: int, ratio: float | str, balance: float | str) -> list[int]:
    channels = range(kernels.shape[1])
    s = [[1 - float(np.linalg.norm(kernels[:, a] - kernels[:, b])) for b in channels] for a in channels]
    best: tuple[float, list[int]] | None = None
    for start in channels:
        chosen = [start]
        while len(chosen) < keep:
            rest = [c for c in channels if c not in chosen]
            chosen.append(min(rest, key=lambda c: sum(s[c][k] for k in chosen)))
        pruned = [c for c in channels if c not in chosen]
        near = keep if ratio == "all" else int(float(ratio) * keep)
        pairs = [s[a][b] for i, a in enumerate(chosen) for b in chosen[:i]]
        weight = (len(pairs) / (len(pruned) * near) if pruned and near else 0.0) if balance == "auto" else float(balance)
        cost = sum(pairs) - weight * sum(sum(sorted((s[c][k] for k in chosen), reverse=True)[:near]) for c in pruned)
        if best is None or cost < best[0] - 1e-9:
            best = cost, sorted(chosen)
    assert best is not None
    return best[1]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(2, 8), st.data(),
    st.sampled_from(["all", 0.01, 0.2, 0.5, 1.0]), st.sampled_from(["auto", 0.0, 1.0, 2.5]),
)
def test_selection_agrees_with_plain_loops(
    seed: int, channels: int, data: st.DataObject, ratio: float | Literal["all"], balance: float | Literal["auto"]
) -> None:
    kernels = np.random.default_rng(seed).standard_normal((3, channels, 2, 2))
    keep = data.draw(st.integers(1, channels))
    assert select_channels(kernels, keep, ratio, balance).tolist() == naive(kernels, keep, ratio, balance)
