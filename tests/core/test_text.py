"""Text of strangers is shown as one line of printable characters."""

from gkp.text import clean, first_line, one_line


def test_text_from_a_model_is_safe_to_print() -> None:
    assert clean("a\x1b[31mb\n") == "a?[31mb"
    assert clean("a\tb\u202ec\x00") == "a b?c?"
    assert first_line(ValueError("first\nsecond")) == "first"
    assert first_line(ValueError(" ")) == "ValueError"
    assert one_line(" first\n  second") == "first second"


def test_long_text_is_cut() -> None:
    assert len(first_line("x" * 999, 200)) == len(clean("x" * 999, 200)) == len(one_line("x" * 999, 200)) == 200
    assert clean("abcdefgh", 5) == "abcd\u2026"
    assert clean("abcdefgh", 5, middle=True) == "ab\u2026gh"
