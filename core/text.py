"""Text of strangers (names in models, errors of libraries, answers of other machines) made safe to print."""

from __future__ import annotations

from collections.abc import Sequence


def clean(text: object, limit: int = 400, *, middle: bool = False) -> str:
    """One line of printable text, at most `limit` characters long (a message may hold four of them).

    Line breaks, tabs and spaces of any width become spaces; control, format (bidirectional overrides too), surrogate and
    unassigned characters become "?", so that it shows that something was there. A longer text ends in "…"; middle: both its
    ends stay, which tell names of layers apart. However long the text is, only 4 * limit characters of it are looked at."""
    whole = str(text)
    ends = middle and len(whole) > 4 * limit
    line = printable(whole[: 2 * limit] + whole[-2 * limit:] if ends else whole[: 4 * limit]).strip()
    if len(line) <= limit:
        return line
    head = (limit - 1) // 2 if middle else limit - 1
    return f"{line[:head]}…{line[len(line) - (limit - 1 - head):]}"


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of an error's text that holds something, else the name of its class; as `clean` makes it."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return clean(next(lines, type(error).__name__), limit)


def last_line(error: BaseException | str, limit: int = 300) -> str:
    """The same of the last line: where a library puts the reason below the places in its own source."""
    lines = (line for line in reversed(str(error).splitlines()) if line.strip())
    return clean(next(lines, type(error).__name__), limit)


def one_line(text: object, limit: int = 300) -> str:
    """All lines of a text in one, runs of spaces in it as one space; as `clean` makes it."""
    return clean(" ".join(str(text)[: 4 * limit].split()), limit)


def printable(text: str) -> str:
    """As many characters as came in, each as `clean` shows it: for text that must stay whole."""
    return "".join(" " if c.isspace() else c if c.isprintable() else "?" for c in text)


def plural(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`, `1,000 layers`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def folded(names: Sequence[str]) -> str:
    """`conv_3`; of several, how many, and the first: `72 steps, such as conv_3`."""
    return names[0] if len(names) == 1 else f"{len(names):,} steps, such as {names[0]}"
