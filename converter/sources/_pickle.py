"""A pickle reader that executes nothing: a small machine over the opcodes of `pickletools`.

The standard Unpickler imports and calls what a file names, and even a subclass that forbids this can be made to take
gigabytes (its memo is an array indexed by a number in the file) or exponential time (hashes of nested tuples). Here

1. a global is a name, and is refused when it belongs to what can run code (`_constructors.refuse_dangerous`);
2. only the functions of `_constructors.CONSTRUCTORS` are called, and these are our own;
3. an instance of any other class becomes a `Record`;
4. time and memory are charged to a budget before they are taken, numbers are short, and what is nested too deep is let go
   without recursion (`_records`).

Semantics of the opcodes: the documentation in CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import io
import itertools
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gkp.converter.budget import Budget
from gkp.errors import GkpError, UnsafeFileError
from gkp.text import clean

from ._constructors import CONSTRUCTORS, UNSAFE_HINT, NumpyDtype, UnfilledArray, array_of_state, refuse_dangerous
from ._records import Global, Record, corrupt, walk
from ._records import key as hashable

PersistentLoad = Callable[[Any], Any]

_DECIMAL = frozenset({"INT", "LONG", "FLOAT", "PUT", "GET"})
_MAX_DIGITS = 700
_MAX_BITS = 2048
_CLOCK = 1024  # operations between two looks at the time
_NOTHING = object()


def load_pickle(data: bytes, persistent_load: PersistentLoad | None = None, budget: Budget | None = None) -> Any:
    """The object that `data` (protocols 0 to 5) describes, as inert data.

    Result: Python scalars, list, tuple, dict (also for OrderedDict, defaultdict, Counter), set, frozenset, bytes,
    numpy arrays (tensors, parameters and arrays of numbers or text; native byte order, C-contiguous), `ObjectArray`,
    `Global` for a class or function, `Record` for any other instance. It may be cyclic, and is at most
    `_records.MAX_DEPTH` deep.
    persistent_load: called with each persistent id, gives a `Storage`, a `Global` or plain data. budget: without one, that
    of a file with these bytes.
    Raises UnsafeFileError naming what the pickle calls or refers to, or when it costs more than its budget; FileError if it
    is damaged.
    """
    return load_stream(io.BytesIO(data), budget or Budget(len(data)), persistent_load)


def load_stream(stream: io.BytesIO, budget: Budget, persistent_load: PersistentLoad | None = None) -> Any:
    """`load_pickle` from the current position; leaves the stream just behind the pickle."""
    try:
        root = _Machine(budget, persistent_load).run(stream)
    except GkpError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, MemoryError) as error:
        raise corrupt(f"{type(error).__name__} while reading it") from error
    for value in walk(root):  # refuses what is nested too deep
        if isinstance(value, UnfilledArray):
            raise corrupt("an array has no content")
    return root


class _Machine:
    def __init__(self, budget: Budget, persistent_load: PersistentLoad | None) -> None:
        self.budget = budget
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: list[Any] = []
        self.remembered = 0

    def run(self, stream: io.BytesIO) -> Any:
        for count in itertools.count():
            code = stream.read(1)
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise corrupt("it has no end" if not code else "it has an unknown opcode")
            argument = opcode.read(stream) if opcode.read else None
            if isinstance(argument, int):
                self.check_integer(opcode, argument, count)
            if opcode.handle is None:
                raise UnsafeFileError(f"pickle uses the opcode {opcode.name}", UNSAFE_HINT)
            self.budget.objects()
            if not count % _CLOCK:
                self.budget.steps(_CLOCK)
            opcode.handle(self, argument)
            if opcode is _STOP:
                break
        if len(self.stack) != 1 or self.below:
            raise corrupt("it ends with the wrong number of objects")
        return self.stack.pop()

    def check_integer(self, opcode: _Opcode, argument: int, count: int) -> None:
        if argument.bit_length() > _MAX_BITS:
            raise corrupt("an integer in it is too large")
        if opcode.handle is _put and argument > count:
            raise corrupt(f"it remembers an object under the number {argument} after {count} operations")

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise corrupt("its stack runs empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def refer(self, name: str) -> Global:
        refuse_dangerous(name)
        return Global(name)

    def call(self, function: Any, args: Any) -> Any:
        """REDUCE: only what is in the table."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise corrupt("it calls something that is not a function")
        constructor = CONSTRUCTORS.get(function.name)
        if constructor is None:
            raise UnsafeFileError(f"pickle calls {clean(function.name, 120)}", UNSAFE_HINT)
        return constructor(args, self.budget)

    def instantiate(self, cls: Any, args: Any) -> Any:
        """NEWOBJ: `cls.__new__(cls, *args)`, which for a class we do not know is a Record."""
        if isinstance(cls, Global) and cls.name not in CONSTRUCTORS and isinstance(args, tuple):
            self.budget.objects(4)
            return Record(cls.name, args)
        return self.call(cls, args)

    def set_items(self, target: Any, flat: list[Any]) -> None:
        if isinstance(target, Record):
            target = target.items
        if not isinstance(target, dict) or len(flat) % 2:
            raise corrupt("it sets items of something that is not a dict")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[hashable(key, self.budget)] = value

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Record):
            target = target.elements
        if not isinstance(target, list):
            raise corrupt("it appends to something that is not a list")
        target.extend(values)

    def build(self, target: Any, state: Any) -> Any:
        """BUILD: stores the state of a record or array; the attributes of a dict (torch's _metadata) are dropped."""
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, NumpyDtype):
            target.set_state(state)
        elif isinstance(target, UnfilledArray):
            array = array_of_state(state, self.budget)
            for place in target.places:
                if self.memo[place] is target:
                    self.memo[place] = array
            return array
        elif not isinstance(target, dict):
            raise corrupt(f"it gives a state to a {type(target).__name__}")
        return target

    def remember(self, index: int) -> None:
        value = self.stack[-1]
        while len(self.memo) < index:
            self.memo.append(_NOTHING)
        if index == len(self.memo):
            self.memo.append(value)
            self.remembered += 1
        else:
            self.remembered += self.memo[index] is _NOTHING
            self.memo[index] = value
        if isinstance(value, UnfilledArray):
            value.places.append(index)

    def recall(self, index: int) -> Any:
        value = self.memo[index] if 0 <= index < len(self.memo) else _NOTHING
        if value is _NOTHING:
            raise corrupt("it refers to an object that it does not remember")
        return value


_Handler = Callable[[_Machine, Any], None]


@dataclass(frozen=True, slots=True)
class _Opcode:
    """read: its argument, as pickletools does, where it has one; handle: None where it is refused."""

    name: str
    read: Callable[[io.BytesIO], Any] | None
    handle: _Handler | None


def _push(m: _Machine, argument: Any) -> None:
    m.stack.append(argument)


def _push_new(make: Callable[[], Any], cost: int) -> _Handler:
    def handle(m: _Machine, argument: Any) -> None:
        m.budget.objects(cost)
        m.stack.append(make())

    return handle


def _stop(m: _Machine, argument: Any) -> None:
    """PROTO, FRAME and STOP change nothing."""


def _mark(m: _Machine, argument: Any) -> None:
    m.below.append(m.stack)
    m.stack = []


def _pop(m: _Machine, argument: Any) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.pop_mark()


def _pop_mark(m: _Machine, argument: Any) -> None:
    m.pop_mark()


def _dup(m: _Machine, argument: Any) -> None:
    m.stack.append(m.stack[-1])


def _list(m: _Machine, argument: Any) -> None:
    items = m.pop_mark()
    m.stack.append(items)


def _tuple(m: _Machine, argument: Any) -> None:
    items = m.pop_mark()
    m.stack.append(tuple(items))


def _short_tuple(count: int) -> _Handler:
    def handle(m: _Machine, argument: Any) -> None:
        m.stack.append(tuple(m.pop(count)))

    return handle


def _dict(m: _Machine, argument: Any) -> None:
    flat = m.pop_mark()
    made: dict[Any, Any] = {}
    m.set_items(made, flat)
    m.stack.append(made)


def _frozenset(m: _Machine, argument: Any) -> None:
    values = m.pop_mark()
    m.stack.append(frozenset(hashable(value, m.budget) for value in values))


def _append(m: _Machine, argument: Any) -> None:
    value = m.stack.pop()
    m.extend(m.stack[-1], [value])


def _appends(m: _Machine, argument: Any) -> None:
    values = m.pop_mark()
    m.extend(m.stack[-1], values)


def _set_item(m: _Machine, argument: Any) -> None:
    target, key, value = m.pop(3)
    m.set_items(target, [key, value])
    m.stack.append(target)


def _set_items(m: _Machine, argument: Any) -> None:
    flat = m.pop_mark()
    m.set_items(m.stack[-1], flat)


def _add_items(m: _Machine, argument: Any) -> None:
    values = m.pop_mark()
    if not isinstance(m.stack[-1], set):
        raise corrupt("it adds members to something that is not a set")
    m.stack[-1].update(hashable(value, m.budget) for value in values)


def _get(m: _Machine, index: Any) -> None:
    m.stack.append(m.recall(index))


def _put(m: _Machine, index: Any) -> None:
    m.remember(index)


def _memoize(m: _Machine, argument: Any) -> None:
    m.remember(m.remembered)


def _global(m: _Machine, argument: str) -> None:
    m.budget.objects()
    m.stack.append(m.refer(argument.replace(" ", ".", 1)))


def _stack_global(m: _Machine, argument: Any) -> None:
    module, name = m.pop(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise corrupt("a name is not text")
    m.budget.bytes(len(module) + len(name))
    m.stack.append(m.refer(f"{module}.{name}"))


def _reduce(m: _Machine, argument: Any) -> None:
    function, args = m.pop(2)
    m.stack.append(m.call(function, args))


def _new_object(m: _Machine, argument: Any) -> None:
    cls, args = m.pop(2)
    m.stack.append(m.instantiate(cls, args))


def _new_object_ex(m: _Machine, argument: Any) -> None:
    cls, args, keywords = m.pop(3)
    if not isinstance(args, tuple) or not isinstance(keywords, dict):
        raise corrupt("an instance has impossible arguments")
    m.budget.bytes(8 * len(args))
    m.stack.append(m.instantiate(cls, (*args, keywords) if keywords else args))


def _old_style(m: _Machine, cls: Any, args: list[Any]) -> None:
    """INST and OBJ call the class, so with arguments it must be in the table."""
    m.stack.append(m.call(cls, tuple(args)) if args else m.instantiate(cls, ()))


def _inst(m: _Machine, argument: str) -> None:
    args = m.pop_mark()
    _old_style(m, m.refer(argument.replace(" ", ".", 1)), args)


def _obj(m: _Machine, argument: Any) -> None:
    cls, *args = m.pop_mark()
    _old_style(m, cls, args)


def _build(m: _Machine, argument: Any) -> None:
    target, state = m.pop(2)
    m.stack.append(m.build(target, state))


def _persistent(m: _Machine, pid: Any) -> None:
    if m.persistent_load is None:
        raise corrupt("it refers to data outside itself")
    m.budget.objects(8)
    m.stack.append(m.persistent_load(pid))


def _persistent_on_stack(m: _Machine, argument: Any) -> None:
    (pid,) = m.pop(1)
    _persistent(m, pid)


_LITERALS = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
"""
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _stop),
    **dict.fromkeys(_LITERALS.split(), _push),
    "NONE": _push,  # its argument is None
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": _push_new(list, 1),
    "EMPTY_TUPLE": _push_new(tuple, 0),
    "EMPTY_DICT": _push_new(dict, 1),
    "EMPTY_SET": _push_new(set, 3),
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "DUP": _dup,
    "LIST": _list,
    "TUPLE": _tuple,
    "TUPLE1": _short_tuple(1),
    "TUPLE2": _short_tuple(2),
    "TUPLE3": _short_tuple(3),
    "DICT": _dict,
    "FROZENSET": _frozenset,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "ADDITEMS": _add_items,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "INST": _inst,
    "OBJ": _obj,
    "BUILD": _build,
    "PERSID": _persistent,
    "BINPERSID": _persistent_on_stack,
}


def _reader(opcode: pickletools.OpcodeInfo) -> Callable[[io.BytesIO], Any] | None:
    """Numbers are as short as honest ones: in text their conversion takes quadratic time."""
    if opcode.arg is None:
        return None
    read = opcode.arg.reader
    return (lambda stream: read(io.BytesIO(stream.readline(_MAX_DIGITS)))) if opcode.name in _DECIMAL else read


_OPCODES = {opcode.code.encode("latin-1"): _Opcode(opcode.name, _reader(opcode), _HANDLERS.get(opcode.name))
            for opcode in pickletools.opcodes}
_STOP = _OPCODES[b"."]
