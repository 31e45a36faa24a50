"""Buffers share memory only where nobody can notice."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.converter.native.planning.arena import ALIGN, Life, arrange


@st.composite
def lives(draw: st.DrawFn) -> list[Life]:
    """Of up to 25 buffers; the zeros of some look alike, and then they are of one size, as buffers of one layout are."""
    sizes = draw(st.lists(st.integers(1, 800), min_size=3, max_size=3))
    found = []
    for _ in range(draw(st.integers(0, 25))):
        zeros = draw(st.sampled_from([None, None, 0, 1, 2]))
        first = draw(st.integers(0, 30))
        size = draw(st.integers(1, 1200)) if zeros is None else sizes[zeros]
        found.append(Life(size, first, first + draw(st.integers(0, 8)), zeros))
    return found


def overlap(a: Life, b: Life, at: int, other: int) -> bool:
    return at < other + b.size and other < at + a.size


@settings(max_examples=300, deadline=None, derandomize=True)
@given(lives())
def test_what_is_alive_at_the_same_time_lies_apart_and_zeros_stay_zeros(found: list[Life]) -> None:
    at, total = arrange(found)
    assert len(at) == len(found)
    for k, (life, start) in enumerate(zip(found, at, strict=True)):
        assert start % ALIGN == 0
        assert 0 <= start <= start + life.size <= total
        for other, there in zip(found[:k], at[:k], strict=True):
            if not overlap(life, other, start, there):
                continue
            assert not life.meets(other)
            assert (life.zeros is None and other.zeros is None) or (life.zeros == other.zeros and start == there)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lives())
def test_a_run_of_the_network_finds_what_it_wrote(found: list[Life]) -> None:
    """Twice in the same memory: each buffer is filled when its life begins (but for its cells of zeros, here every third)
    and read until it ends; then others may have spoilt it."""
    at, total = arrange(found)
    memory = np.zeros(total)
    for run in range(2):
        for now in range(40):
            for k, (life, start) in enumerate(zip(found, at, strict=True)):
                cells = np.arange(life.size)
                zero = (cells % 3 == 0) if life.zeros is not None else np.zeros(life.size, bool)
                if life.first == now:
                    memory[start + cells[~zero]] = 1 + k + 100 * run
            for k, (life, start) in enumerate(zip(found, at, strict=True)):
                if life.first <= now <= life.last:
                    cells = np.arange(life.size)
                    zero = (cells % 3 == 0) if life.zeros is not None else np.zeros(life.size, bool)
                    assert (memory[start + cells[~zero]] == 1 + k + 100 * run).all()
                    assert (memory[start + cells[zero]] == 0).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lives())
def test_the_arena_is_no_larger_than_all_buffers_side_by_side(found: list[Life]) -> None:
    _, total = arrange(found)
    assert total <= sum(alone(life) for life in found)
    alive = [sum(life.size for life in found if life.first <= now <= life.last) for now in range(40)]
    assert total >= max(alive)


def test_a_chain_of_layers_takes_two_buffers() -> None:
    chain = [Life(20000, n, n + 1) for n in range(10)]
    assert arrange(chain)[1] == 2 * alone(chain[0])


def test_a_chain_with_equal_halos_takes_two_buffers_too() -> None:
    chain = [Life(20000, n, n + 1, "halo of one") for n in range(10)]
    assert arrange(chain)[1] == 2 * alone(chain[0])


def test_other_halos_take_memory_of_their_own() -> None:
    one = alone(Life(20000, 0, 1))
    assert arrange([Life(20000, 0, 1, "halo of one"), Life(20000, 4, 5, "halo of two")])[1] == 2 * one
    assert arrange([Life(20000, 0, 1, "halo of one"), Life(20000, 4, 5)])[1] == 2 * one
    assert arrange([Life(20000, 0, 1), Life(20000, 4, 5)])[1] == one


def test_source_and_target_do_not_begin_at_the_same_place_of_a_page() -> None:
    """Loads would wait for stores 4096 bytes away: planes of powers of two are the rule in networks."""
    for size in (4096, 16384, 64 * 1024 + 128, 4 * 64 * 56 * 56):
        at, _ = arrange([Life(size, 0, 1), Life(size, 1, 2), Life(size, 2, 3), Life(size, 0, 3)])
        assert abs(at[0] - at[1]) % 4096 >= ALIGN
        assert abs(at[1] - at[3]) % 4096 >= ALIGN


def test_nothing_takes_nothing() -> None:
    assert arrange([]) == ([], 0)


def alone(life: Life) -> int:
    """What the buffer takes when there is no other."""
    return arrange([life])[1]
