"""What operators do to the sizes of lists, text and numbers. What is not here has a result whose size is of no interest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gkp.errors import UnsafeFileError

from .operators import LISTS
from .schemas import VALID, enumerations, gives_tensor
from .values import (
    DATA,
    RANK,
    TENSOR,
    Data,
    Given,
    Listed,
    Lists,
    Null,
    Number,
    Text,
    Value,
    holds_text,
    is_flat,
    new_list,
)

_MAX_LIST, _MAX_TEXT = 1_000_000, 1 << 16
TEXT = 4096
"""Characters of text in a pickle that is part of a network."""
_COPIES = frozenset({"list", "sorted", "slice", "clear"})
_TRUTHS = frozenset(("__contains__", "is_grad_enabled", "is_scripting"))
_COMPARISONS = frozenset(("eq", "ne", "lt", "gt", "le", "ge"))
_ONLY_OF_LISTS = frozenset(("append", "insert", "extend"))
_OF_TEXT_TOO = frozenset(("add", "add_", "mul", "mul_", "slice", "__getitem__", "select"))
_OF_LISTS_TOO = frozenset(("add", "add_", "mul", "mul_"))


class Growth:
    """How often things happen, and which lists must not grow because a loop runs as often as they are long."""

    def __init__(self) -> None:
        self.times = 1
        self._grown: set[Listed] = set()
        self._bounding: set[Listed] = set()

    @contextmanager
    def loop(self, turns: int) -> Iterator[None]:
        before = self.times
        self.times *= turns
        yield
        self.times = before

    def length(self, lists: Lists) -> Number:
        """Of one of the lists. Looked at in a loop, it must not grow in one: every turn would have another length."""
        if self.times > 1:
            self._bounding |= lists.any_of
            self._check()
        return Number(0, lists.most)

    def grow(self, lists: Lists, by: int | None, text: bool) -> None:
        """Each of them by `by` elements, with text among them or not, as often as this happens."""
        if by is None:
            raise _refuse("makes a list longer by an unknown number")
        for one in lists.any_of:
            one.text |= text
            if one.most is not None:
                one.most += by * self.times
                if one.most > _MAX_LIST:
                    raise _refuse(f"makes a list of over {_MAX_LIST:,} elements")
        if self.times > 1:
            self._grown |= lists.any_of
            self._check()

    def _check(self) -> None:
        if self._grown & self._bounding:
            raise _refuse("makes a list longer in a loop that looks at its length")


def _refuse(what: str) -> UnsafeFileError:
    return UnsafeFileError(what)


def check_enumerations(name: str, arguments: list[Value], named: Mapping[str, Value]) -> None:
    """UnsafeFileError if the operator gets a number as dtype, layout or memory format that is none."""
    kinds = enumerations(name)
    given: list[tuple[int | str, Value]] = [*enumerate(arguments), *named.items()]
    for place, value in given:
        kind = kinds.get(place)
        if kind is None or isinstance(value, (Null, Given, Lists, Text)) or (isinstance(value, Data) and value.tensor):
            continue
        if not isinstance(value, Number) or value.least != value.most or value.most not in VALID[kind]:
            raise _refuse(f"calls {name} with a {kind} that is not known to be one")


def result(name: str, arguments: list[Value], growth: Growth) -> Value:
    """What the operator gives. UnsafeFileError (its message says what the operator does) where that has no bound."""
    if name in ("RaiseException", "warn"):
        return _told(name, arguments)
    if name == "format":
        return _formatted(arguments)
    first = arguments[0] if arguments else DATA
    lists = [argument for argument in arguments if isinstance(argument, Lists)]
    if name in _ONLY_OF_LISTS or (lists and name in _OF_LISTS_TOO):
        return _longer(name, arguments, growth)
    if name == "len":
        return growth.length(first) if isinstance(first, Lists) else Number()
    if name == "_set_item" and (len(arguments) != 3 or not is_flat(arguments[2]) or holds_text(arguments[2])):
        raise _refuse("sets an element to a list or text")
    if name in _COPIES and isinstance(first, Lists):
        return new_list(growth.length(first).most, first.element.text)
    if name in _OF_TEXT_TOO and any(isinstance(argument, (Text, Data)) and holds_text(argument) for argument in arguments):
        raise _refuse(f"computes text by {name}")
    if name == "size" and len(arguments) == 1:
        return new_list(RANK)
    if name in LISTS and name != "size" and (name != "where" or len(arguments) == 1):
        return new_list(RANK if name == "stride" else None)
    return _number(name, arguments)


def _told(name: str, arguments: list[Value]) -> Value:
    """An exception or a warning: its text is made of printable parts."""
    if not all(isinstance(argument, (Text, Number, Null)) for argument in arguments):
        raise _refuse(f"calls {name} with what is no text")
    return Null()


def _formatted(arguments: list[Value]) -> Value:
    sizes = [argument.most if isinstance(argument, Text) else TEXT if holds_text(argument) else 0 for argument in arguments]
    again = any(isinstance(argument, Text) and argument.final for argument in arguments)
    if again or not arguments or not isinstance(arguments[0], Text) or sum(sizes) > _MAX_TEXT:
        raise _refuse("puts long text together")
    return Text(sum(sizes), final=True)


def _longer(name: str, arguments: list[Value], growth: Growth) -> Value:
    """What puts elements into a list, or makes a longer one."""
    first, second = (*arguments, DATA, DATA)[:2]
    if name in ("append", "insert"):
        if not isinstance(first, Lists) or not is_flat(arguments[-1]):
            raise _refuse(f"calls {name} on what is no list, or puts a list into one")
        growth.grow(first, 1, holds_text(arguments[-1]))
        return first
    if name in ("extend", "add_"):
        if not isinstance(first, Lists):
            raise _refuse(f"calls {name} on what is no list")
        growth.grow(first, growth.length(second).most if isinstance(second, Lists) else None, holds_text(second))
        return first
    if name == "mul_" or not isinstance(first, Lists):
        raise _refuse(f"calls {name} on a list")
    length = growth.length(first).most
    factor = second.most if isinstance(second, Number) else None
    if name == "mul":
        most = None if factor is None or length is None else length * max(0, factor)
    else:
        most = _sum(length, growth.length(second).most if isinstance(second, Lists) else None)
    if most is None or most > _MAX_LIST:
        raise _refuse(f"makes a list of unknown length by {name}")
    return new_list(most, holds_text(first) or holds_text(second))


def _number(name: str, arguments: list[Value]) -> Value:
    """Bounds of what is computed from bounded integers."""
    if name == "dim":
        return Number(0, RANK)
    if name in ("__is__", "__isnot__") and len(arguments) == 2:
        return Number(truth=(name == "__is__") if all(isinstance(argument, Null) for argument in arguments) else None)
    if name == "__not__":
        truth = getattr(arguments[0], "truth", None) if arguments else None
        return Number(truth=None if truth is None else not truth)
    if name == "__range_length" and len(arguments) == 3 and isinstance(arguments[2], Number):
        return _turns(arguments[0], arguments[1], arguments[2].least)
    if name in _TRUTHS or (name in _COMPARISONS and all(isinstance(argument, (Number, Text)) for argument in arguments)):
        return Number()
    if len(arguments) == 2 and all(isinstance(argument, Number) for argument in arguments):
        a, b = arguments
        assert isinstance(a, Number)
        assert isinstance(b, Number)
        return _arithmetic(name, a, b)
    first = arguments[0] if arguments else DATA
    return TENSOR if gives_tensor(name, isinstance(first, Data) and first.tensor) else DATA


def _turns(start: Value, end: Value, step: int | None) -> Number:
    """Of range(start, end, step)."""
    if isinstance(start, Number) and isinstance(end, Number) and step is not None and step >= 1:
        turns = _sum(end.most, None if start.least is None else -start.least)
        return Number(0, None if turns is None else max(0, turns))
    return Number()


def _arithmetic(name: str, a: Number, b: Number) -> Number:
    match name:
        case "add":
            return Number(_sum(a.least, b.least), _sum(a.most, b.most))
        case "sub":
            return Number(_sum(a.least, None if b.most is None else -b.most),
                          _sum(a.most, None if b.least is None else -b.least))
        case "mul" if a.least is not None and a.least >= 0 and b.least is not None and b.least >= 0:
            return Number(0, None if a.most is None or b.most is None else a.most * b.most)
        case "floordiv" if a.least is not None and a.least >= 0 and b.least is not None and b.least >= 1:
            return Number(0, a.most)
        case "min":
            known = [n for n in (a.most, b.most) if n is not None]
            return Number(None, min(known, default=None))
        case "max":
            return Number(None, None if a.most is None or b.most is None else max(a.most, b.most))
    return Number()


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b
