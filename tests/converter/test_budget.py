"""One budget per opening: charged before anything is made, in proportion to the file, for memory, names, nodes and time."""

from __future__ import annotations

import time

import pytest

from gkp.converter.budget import RATES, Budget
from gkp.errors import UnsafeFileError

COUNTED = [kind for kind in RATES if kind != "seconds"]


@pytest.mark.parametrize("kind", COUNTED)
def test_what_is_free_and_what_a_byte_brings_can_be_spent_and_no_more(kind: str) -> None:
    budget, charge = Budget(1000), RATES[kind].of(1000)
    spend = getattr(budget, kind)
    spend(charge)
    with pytest.raises(UnsafeFileError, match=f"1,000 bytes asks for over .* {kind}") as caught:
        spend(1)
    assert caught.value.hint


@pytest.mark.parametrize("kind", COUNTED)
def test_parts_add_up(kind: str) -> None:
    budget = Budget(0)
    for _ in range(4):
        getattr(budget, kind)(RATES[kind].of(0) // 4)
    with pytest.raises(UnsafeFileError):
        getattr(budget, kind)(4)


def test_files_that_belong_to_it_bring_more() -> None:
    budget = Budget(0)
    budget.grow(1 << 20)
    budget.bytes(RATES["bytes"].of(1 << 20))
    with pytest.raises(UnsafeFileError, match="1,048,576 bytes"):
        budget.bytes(1)


def test_memory_that_is_given_back_can_be_taken_again() -> None:
    budget, size = Budget(0), RATES["bytes"].of(0)
    for _ in range(3):
        budget.bytes(size)
        budget.release(size)


def test_large_activations_bring_memory() -> None:
    budget = Budget(0)
    budget.activation(1 << 30)
    budget.bytes(1 << 32)
    with pytest.raises(UnsafeFileError):
        budget.bytes(1 << 33)


def test_time_counts_within_running_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    budget = Budget(1_000_000)  # 10 s, and 2 for its megabyte
    now[0] = 100.0  # an import
    with budget.running():
        now[0] += 7
        with budget.running():  # a reader within a reader
            budget.steps()
    now[0] += 100.0
    with budget.running():
        now[0] += 4
        budget.steps()
        now[0] += 2
        with pytest.raises(UnsafeFileError, match="takes over 12 s"):
            budget.steps()
