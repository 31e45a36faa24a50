"""Intervals of speedups hold what they claim: over openings of the models, not only over the rounds of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.runtime.measure import BLOCKS
from gkp.runtime.statistics import MOST_BLOCKS, block_interval, ratio_interval

TRUE = 1.1
Rounds = tuple[list[float], list[float]]


def drawn(rng: np.random.Generator, blocks: list[int], between: float, within: float, spikes: float = 0.0,
          run: float = 0.0) -> Rounds:
    """Times of two models of which the whole run shifts the ratio by `run`, each opening by `between` and each round by `within`
    (relative); in a share of the rounds something else runs beside one of them."""
    shift = np.repeat(rng.normal(0, between, len(blocks)), blocks) + rng.normal(0, run)
    n = sum(blocks)
    other = rng.lognormal(0, 0.1, n)
    noise = rng.normal(0, within, n) + (rng.random(n) < spikes) * rng.choice([-0.5, 0.5], n)
    return (TRUE * other * np.exp(shift + noise)).tolist(), other.tolist()


def held(blocks: list[int], between: float, within: float, spikes: float, run: float) -> float:
    """Share of 1000 intervals that hold the true ratio; it has a standard error of 0.7 percent."""
    rng = np.random.default_rng(1)
    ends = [block_interval(*drawn(rng, blocks, between, within, spikes, run), blocks)[1:] for _ in range(1000)]
    return float(np.mean([low <= TRUE <= high for low, high in ends]))


@pytest.mark.parametrize(("blocks", "between", "within", "spikes"), [
    ([12] * BLOCKS, 0.05, 0.01, 0.0), ([12] * BLOCKS, 0.02, 0.02, 0.1), ([30, 9, 2, 7, 14, 3, 3], 0.03, 0.01, 0.0), ([4] * 2 * BLOCKS, 0.03, 0.02, 0.05)])
def test_95_of_100_intervals_hold_the_true_ratio_where_whole_runs_differ_as_they_were_measured_to(
        blocks: list[int], between: float, within: float, spikes: float) -> None:
    assert 0.93 < held(blocks, between, within, spikes, run=between * 0.3 ** 0.5) < 0.98


@pytest.mark.parametrize(("blocks", "between", "within"), [
    ([12] * BLOCKS, 0.0, 0.05), ([1] * BLOCKS, 0.02, 0.02)])
def test_where_whole_runs_do_not_differ_more_are_held(blocks: list[int], between: float, within: float) -> None:
    assert 0.975 < held(blocks, between, within, 0.0, run=0.0) < 1, "and not all: they are not wide for nothing"


def test_a_bootstrap_over_the_rounds_of_all_openings_would_claim_far_too_much() -> None:
    """What block_interval is for."""
    rng = np.random.default_rng(2)
    ends = [ratio_interval(*drawn(rng, [12] * BLOCKS, 0.03, 0.01))[1:] for _ in range(60)]
    assert np.mean([low <= TRUE <= high for low, high in ends]) < 0.75


@given(st.integers(2, MOST_BLOCKS), st.floats(0.25, 4), st.integers(0, 99))
def test_a_slow_phase_cancels_and_the_ratio_lies_in_its_interval(count: int, speedup: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(1, 10, count).tolist()
    phases = rng.uniform(0.5, 2, sum(blocks))
    np.testing.assert_allclose(block_interval(speedup * phases, phases, blocks), speedup, rtol=1e-9)
    value, low, high = block_interval(speedup * phases, phases[::-1], blocks)
    assert low <= value <= high
    turned = block_interval(phases[::-1], speedup * phases, blocks)
    np.testing.assert_allclose(turned, (1 / value, 1 / high, 1 / low), rtol=1e-9)


def test_more_openings_narrow_the_interval() -> None:
    def width(count: int) -> float:
        rng = np.random.default_rng(3)
        found = [block_interval(*drawn(rng, [6] * count, 0.03, 0.01), [6] * count) for _ in range(200)]
        return float(np.mean([high - low for _, low, high in found]))

    assert width(2) > 3 * width(BLOCKS) > 3.6 * width(2 * BLOCKS)
