"""Text of strangers (names in models, errors of libraries, answers of other machines) made safe to print."""

from __future__ import annotations

import unicodedata

_SPACES = "\t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029"


def clean(text: object, limit: int = 1000, *, middle: bool = False) -> str:
    """One line of printable text, at most `limit` characters long.

    Line breaks and tabs become spaces; control, format (bidirectional overrides too), surrogate and unassigned characters
    become "?", so that it shows that something was there. A longer text ends in "…"; middle: both its ends stay, which
    tell names of layers apart. No more than 4 * limit characters are looked at, however long the text is."""
    line = "".join(_shown(c) for c in str(text)[: 4 * limit]).strip()
    if len(line) <= limit:
        return line
    head = (limit - 1) // 2 if middle else limit - 1
    return f"{line[:head]}…{line[len(line) - (limit - 1 - head):]}"


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of an error's text that holds something, else the name of its class; as `clean` makes it."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return clean(next(lines, type(error).__name__), limit)


def one_line(text: object, limit: int = 300) -> str:
    """All lines of a text in one, runs of spaces in it as one space; as `clean` makes it."""
    return clean(" ".join(str(text)[: 4 * limit].split()), limit)


def plural(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`, `1,000 layers`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _shown(character: str) -> str:
    if character in _SPACES:
        return " "
    return "?" if unicodedata.category(character)[0] == "C" else character
