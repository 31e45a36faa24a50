import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.converter.trt.capability import engine_file, engine_groups
from gkp.errors import UsageError
from gkp.options.trt import parse_capabilities

OFFERED = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))


@pytest.mark.parametrize(("text", "expected"), [
    ("86,89,120", ((8, 6), (8, 9), (12, 0))), ("8.6", ((8, 6),)), ("12.0, 89 ,8.9", ((8, 9), (12, 0))), ("75", ((7, 5),))])
def test_both_spellings_are_read_sorted_and_without_repeats(text: str, expected: tuple[tuple[int, int], ...]) -> None:
    assert parse_capabilities(text) == expected


@pytest.mark.parametrize("text", ["", "8", "sm86", "8.6.1", "86,", "8,6", "-86", "1234", "8.66", "٨٦", "8 6"])
def test_anything_else_is_a_usage_error_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="compute capability") as caught:
        parse_capabilities(text)
    assert "86,89,120" in caught.value.hint


@given(st.sets(st.tuples(st.integers(1, 99), st.integers(0, 9)), min_size=1))
def test_dotted_and_compact_spelling_mean_the_same(capabilities: set[tuple[int, int]]) -> None:
    compact = ",".join(f"{a}{b}" for a, b in capabilities)
    dotted = ",".join(f"{a}.{b}" for a, b in capabilities)
    assert parse_capabilities(compact) == parse_capabilities(dotted) == tuple(sorted(capabilities))


def test_turing_is_an_engine_of_its_own() -> None:
    assert engine_groups(((8, 9), (7, 5), (8, 6)), OFFERED) == [((7, 5),), ((8, 6), (8, 9))]
    assert engine_groups(((7, 5),), OFFERED) == [((7, 5),)]


def test_nothing_asked_is_one_engine_from_ampere_on() -> None:
    assert engine_groups((), OFFERED) == [((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))]


def test_a_capability_that_is_not_offered_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"capability 9\.0") as caught:
        engine_groups(((8, 6), (9, 0)), OFFERED)
    assert "7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in caught.value.hint
    assert caught.value.exit_code == 2


def test_the_file_name_lists_the_capabilities() -> None:
    assert engine_file(((8, 6), (8, 9), (12, 0))) == "engine.sm86+sm89+sm120.trt"
