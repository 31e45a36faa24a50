"""Prefixes of tensor names: those that all names share, whole parts only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gkp.pruning.tensor_names import is_counter, prefixes

PARTS = st.lists(st.sampled_from(["", "a", "b", "ab", "model", "weight", "total_ops"]), min_size=1, max_size=6)
NAMES = st.sets(PARTS.map(".".join), max_size=6)


@given(NAMES)
def test_they_are_what_all_names_begin_with_up_to_a_dot(names: set[str]) -> None:
    own = {name for name in names if not is_counter(name)}
    cuts = {name[: at + 1] for name in own for at, letter in enumerate(name) if letter == "."}
    assert prefixes(names) == ("", *sorted(cut for cut in cuts if all(name.startswith(cut) for name in own)))


@given(NAMES, st.sampled_from(["module.", "model.net.", "a.b.c."]))
def test_one_that_was_added_stands_before_the_others(names: set[str], added: str) -> None:
    own = {name for name in names if not is_counter(name)}
    expected = (*prefixes({added})[:-1], *(added + prefix for prefix in prefixes(own)))
    assert prefixes({added + name for name in own}) == (expected[:9] if own else ("",))


def test_hostile_names_cost_little() -> None:
    assert len(prefixes({"." * 1_000_000, "." * 1_000_000 + "a"})) == 9
