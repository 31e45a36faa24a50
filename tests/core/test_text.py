"""Text of strangers: on one line, printable, bounded, and telling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.text import clean, first_line, last_line, one_line, plural, printable

EVIL = "\x00\x1b\x07\x7f\x9b\u200b\u202e\u2066\ufeff\U000e0001\ud800\uffff\u0378"
SPACES = "\t\n\r\v\f\x1c\x1f\x85\xa0\u2028\u2029\u3000"


@pytest.mark.parametrize("character", EVIL)
def test_what_a_terminal_would_obey_is_shown_as_a_question_mark(character: str) -> None:
    assert clean(f"a{character}b") == "a?b"


@pytest.mark.parametrize("character", SPACES)
def test_line_breaks_and_spaces_of_any_width_become_spaces(character: str) -> None:
    assert clean(f"a{character}b{character}") == "a b"


def test_letters_of_any_language_stay() -> None:
    assert clean("größe 层 → [red]") == "größe 层 → [red]"
    assert clean("a\x1b[31mb\n", 40) == "a?[31mb"


@given(st.text(st.characters() | st.sampled_from(EVIL + SPACES)), st.integers(1, 20), st.booleans())
def test_the_result_is_one_printable_line_within_the_limit(text: str, limit: int, middle: bool) -> None:
    for shown in (clean(text, limit, middle=middle), one_line(text, limit), first_line(text, limit),
                  last_line(text, limit)):
        assert shown.isprintable()
        assert len(shown) <= limit
        assert clean(shown, limit, middle=middle) == shown, "cleaned twice is cleaned once"
    assert len(printable(text)) == len(text)
    assert printable(text).isprintable()


def test_a_long_text_is_cut_at_its_end_or_in_its_middle() -> None:
    name = "layer1." + "x" * 50 + ".conv2"
    assert clean(name, 12) == "layer1.xxxx…"
    assert clean(name, 12, middle=True) == "layer….conv2"
    assert clean(name, 11, middle=True) == "layer…conv2"
    assert clean(name, 40, middle=True) == "layer1.xxxxxxxxxxxx…xxxxxxxxxxxxxx.conv2"
    assert clean(name, len(name), middle=True) == name


def test_a_huge_text_is_not_looked_at_whole() -> None:
    class Huge(str):
        """A string that notices how much of it is taken."""

        __slots__ = ()

        def __str__(self) -> str:
            return self

        def __getitem__(self, key: object) -> str:
            assert key == slice(None, 40)
            return "x" * 40

    assert clean(Huge(), 10) == one_line(Huge(), 10) == "x" * 9 + "…"


def test_the_first_line_that_says_something_is_taken_of_an_error() -> None:
    assert first_line(ValueError("\n \n  no \x1bgood\nmore")) == "no ?good"
    assert first_line(ValueError()) == "ValueError"
    assert one_line(ValueError("a  b\n\n c")) == "a b c"


def test_nouns_are_counted() -> None:
    assert [plural(n, "layer") for n in (0, 1, 2, 1000)] == ["0 layers", "1 layer", "2 layers", "1,000 layers"]


def test_a_message_with_four_long_names_in_it_stays_readable() -> None:
    assert len(", ".join([clean("x" * 5000)] * 4)) < 2000


def test_the_last_line_that_holds_something_is_found() -> None:
    assert last_line("place:1\n\nthe reason\n \n") == "the reason"
    assert last_line(ValueError(" ")) == "ValueError"
