"""The search for the number of groups: candidates, budget, and the move it takes."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkp.errors import UsageError
from gkp.pruning.methods.gopt import Budget, Choice, group_candidates, search


def choices(*rows: tuple[int, float, int]) -> list[Choice]:
    """(groups, preserved, params); ten operations per parameter."""
    return [Choice(g, preserved, params, 10 * params) for g, preserved, params in rows]


@pytest.mark.parametrize(("f", "c", "factor", "most", "expected"), [
    (16, 16, 1, 64, [1, 2, 4, 8]),  # 16 is depthwise
    (32, 16, 1, 64, [1, 2, 4, 8, 16]),
    (64, 64, 8, 64, [1, 2, 4, 8]),
    (64, 64, 1, 16, [1, 2, 4, 8, 16]),
    (12, 18, 1, 64, [1, 2, 3, 6]),
    (16, 3, 1, 64, [1]),
    (64, 64, 100, 64, [1]),  # one always remains
])
def test_candidates(f: int, c: int, factor: int, most: int, expected: list[int]) -> None:
    assert group_candidates(f, c, factor, most) == expected


def test_the_move_that_preserves_most_is_taken_while_the_budget_lasts() -> None:
    layers = {"a": choices((1, 1.0, 40), (2, 0.6, 20), (4, 0.3, 10)), "b": choices((1, 1.0, 40), (2, 0.9, 20), (4, 0.4, 10))}
    # From (4, 4): 20 weights. b to 2 gains .5 (30 weights), then a to 2 gains .3 (40), then a to 1 gains .4 (60).
    assert search(layers, (0, 0), Budget(params=30)) == {"a": 4, "b": 2}
    assert search(layers, (0, 0), Budget(params=40)) == {"a": 2, "b": 2}
    assert search(layers, (0, 0), Budget(params=60)) == {"a": 1, "b": 2}
    assert search(layers, (0, 0), Budget(params=80)) == {"a": 1, "b": 1}


def test_rest_of_the_network_counts_and_operations_bind_too() -> None:
    layers = {"a": choices((1, 1.0, 40), (2, 0.6, 20))}
    assert search(layers, (5, 0), Budget(params=44)) == {"a": 2}
    assert search(layers, (5, 0), Budget(params=45)) == {"a": 1}
    assert search(layers, (0, 7), Budget(macs=406)) == {"a": 2}
    assert search(layers, (0, 7), Budget(macs=407)) == {"a": 1}


def test_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(UsageError, match=r"budget cannot be met.*0\.000M parameters"):
        search({"a": choices((1, 1.0, 40), (2, 0.6, 20))}, (0, 0), Budget(params=19))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_result_is_within_the_budget_and_no_move_is_left(data: st.DataObject) -> None:
    layers = {}
    for name in "abc":
        groups = [1, 2, 4][: data.draw(st.integers(1, 3))]
        shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=len(groups), max_size=len(groups))), reverse=True)
        layers[name] = choices(*((g, s, 40 // g) for g, s in zip(groups, shares, strict=True)))
    least = sum(c[-1].params for c in layers.values())
    limit = data.draw(st.integers(least, 120))
    found = search(layers, (0, 0), Budget(params=limit))
    place = {name: [c.groups for c in layers[name]].index(g) for name, g in found.items()}
    spent = sum(layers[name][at].params for name, at in place.items())
    assert spent <= limit
    assert all(spent - layers[n][at].params + layers[n][at - 1].params > limit for n, at in place.items() if at)
    if limit >= 120:
        assert set(found.values()) == {1}
    assert any(all(c.groups == found[n] for n, c in zip(layers, combo, strict=True)) for combo in product(*layers.values()))
