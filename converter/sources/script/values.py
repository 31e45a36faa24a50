"""What the check knows about a value while it goes through TorchScript code without running it.

A module is known exactly, for a method is looked up in its class. Of the rest only sizes are known, upper bounds: of
integers, because loops run that often; of lists and text, because a few lines that double them would fill any memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._records import Record

RANK = 64  # axes that a tensor of torch's can have


@dataclass(frozen=True)
class Module:
    """A submodule, as the file holds it. Equal is only the same one."""

    record: Record


@dataclass(frozen=True)
class Function:
    """A function of the archive, by its dotted name."""

    name: str


@dataclass(frozen=True)
class Number:
    """A number, truth value or device; least, most: bounds where it is an integer and they are known; truth: whether it is
    true, where it says that something is None, or is not."""

    least: int | None = None
    most: int | None = None
    truth: bool | None = None


@dataclass(frozen=True)
class Null:
    """None, and nothing else."""


@dataclass(frozen=True)
class Text:
    """Printable text of at most `most` characters. final: it was put together, and only an error or warning may say it."""

    most: int
    final: bool = False


@dataclass(eq=False)
class Listed:
    """One list, wherever it is used: it may grow. most: of its elements, None: nothing bounds it but its tensor; text: may
    there be text in it?"""

    most: int | None
    text: bool = False


@dataclass(frozen=True)
class Lists:
    """A value that is one of these lists."""

    any_of: frozenset[Listed]

    @property
    def most(self) -> int | None:
        sizes = [one.most for one in self.any_of]
        return None if None in sizes else max((n for n in sizes if n is not None), default=0)

    @property
    def element(self) -> Data:
        return Data(any(one.text for one in self.any_of))


@dataclass(frozen=True)
class Items:
    """A tuple."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Data:
    """A tensor, a dict, or something of which it does not matter what it is. No list. text: may there be text in it? tensor:
    is it known to be one?"""

    text: bool = False
    tensor: bool = False


@dataclass(frozen=True)
class Given:
    """A dtype, layout or device that torch gave."""


@dataclass(frozen=True)
class Nothing:
    """`uninitialized(...)`: the other branch has the value."""


Value = Module | Function | Number | Null | Text | Lists | Items | Data | Given | Nothing
DATA, TENSOR = Data(), Data(tensor=True)


def new_list(most: int | None, text: bool = False) -> Lists:
    return Lists(frozenset([Listed(most, text)]))


def holds_text(value: Value) -> bool:
    """May there be text in it?"""
    match value:
        case Text():
            return True
        case Lists():
            return value.element.text
        case Items():
            return any(holds_text(part) for part in value.parts)
        case Data():
            return value.text
    return False


def is_flat(value: Value) -> bool:
    """May it be an element of a list or dict: is there neither a list nor a module in it?"""
    if isinstance(value, Items):
        return all(is_flat(part) for part in value.parts)
    return isinstance(value, (Number, Null, Data, Given, Nothing)) or (isinstance(value, Text) and not value.final)


def join(a: Value, b: Value) -> Value | None:
    """What is one or the other; None where that is not known well enough."""
    if a == b or isinstance(b, Nothing):
        return a
    if isinstance(a, Nothing):
        return b
    if isinstance(a, Number) and isinstance(b, Number):
        least = None if a.least is None or b.least is None else min(a.least, b.least)
        most = None if a.most is None or b.most is None else max(a.most, b.most)
        return Number(least, most)
    if isinstance(a, Text) and isinstance(b, Text):
        return Text(max(a.most, b.most), a.final or b.final)
    if isinstance(a, Lists) and isinstance(b, Lists):
        return Lists(a.any_of | b.any_of)
    if isinstance(a, Items) and isinstance(b, Items) and len(a.parts) == len(b.parts):
        parts = [join(x, y) for x, y in zip(a.parts, b.parts, strict=True)]
        known = [part for part in parts if part is not None]
        return Items(tuple(known)) if len(known) == len(parts) else None
    return _mixed(a, b)


def _mixed(a: Value, b: Value) -> Value | None:
    """Of two kinds: an Optional of the one that says more."""
    for one, other in ((a, b), (b, a)):
        if isinstance(other, Null) and not isinstance(one, (Module, Function)):
            return Number() if isinstance(one, Number) else one
        if isinstance(one, Data) and is_flat(other):
            return Data(one.text or holds_text(other), one.tensor and other == TENSOR)
    return None


def widened(value: Value) -> Value:
    """What a variable holds that a loop gives new values: of its numbers, nothing is known."""
    if isinstance(value, Number):
        return Number()
    return Items(tuple(map(widened, value.parts))) if isinstance(value, Items) else value


# ---- what is known before ---------------------------------------------------------------------------------------------
def has_text(value: object) -> bool:
    """Is it text, or a tuple with text in it?"""
    return isinstance(value, str) or (isinstance(value, tuple) and any(map(has_text, value)))


def literal(value: object) -> Value:
    """What is known of a constant in the code."""
    match value:
        case None:
            return Null()
        case bool():
            return Number()
        case int():
            return Number(value, value)
        case str():
            return Text(len(value))
        case list():
            return new_list(len(value), any(map(has_text, value)))
        case tuple():
            return Items(tuple(literal(part) for part in value))
        case float() | complex():
            return Number()
    return DATA


def loaded(value: Any) -> Value:
    """What is known of an attribute's value."""
    if isinstance(value, Record):
        return Module(value)
    if isinstance(value, np.ndarray):
        return TENSOR
    if isinstance(value, dict):
        return Data(any(map(has_text, value.values())))
    return literal(value)
