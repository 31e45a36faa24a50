"""The pickles of a TorchScript archive, read so that torch's own unpickler cannot read them in another way.

torch.jit.load has a pickle machine of its own (torch/csrc/jit/serialization/unpickler.cpp), which agrees with Python's on
what torch's pickler writes (pickler.cpp) and on little else: a class is a number there, and the object comes into being with
BUILD; OrderedDict() is None; a tag changes a list's type in place. So only the pickler's own language is read here: its
opcodes, containers that are filled once and before anything else refers to them, one state per object, every storage
described once. What is left is a tree with shared branches: no cycles, at most MAX_DEPTH deep, and as large as the budget
allows even for those who walk through shared branches again and again.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from gkp.archive import Archive
from gkp.converter.budget import Budget
from gkp.errors import GkpError, UnsafeFileError
from gkp.text import clean
from gkp.types import Array

from .._records import MAX_DEPTH, STORAGE_DTYPES, Record, Storage, corrupt
from .._records import key as hashable
from .._torchfile import read_byteorder

_HINT = "Export the model to ONNX where it was made, or pass --trust-code if you trust its author."
_GLOBAL = re.compile(r"([A-Za-z_][\w.]*) (\w+)", re.ASCII)
_MAX_TAG = 1000  # characters of a container's type
_MAX_TAG_DEPTH = 20
_PLAIN_TYPES = frozenset(
    {"Tensor", "int", "float", "bool", "str", "complex", "NoneType", "Any", "Device", "number"}
    | {"List", "Dict", "Tuple", "Optional", "Union"}
)


class ScriptList(list[Any]):
    """A list. tag: the type that torch gives it, such as "List[int]"; None: files before PyTorch 1.5 leave it open."""

    __slots__ = ("sealed", "tag")

    def __init__(self) -> None:
        super().__init__()
        self.tag: str | None = None
        self.sealed = False  # something else may refer to it: it stays as it is


class ScriptDict(dict[Any, Any]):
    """A dict, `tag` as for ScriptList: "Dict[str, int]"."""

    __slots__ = ("sealed", "tag")

    def __init__(self) -> None:
        super().__init__()
        self.tag: str | None = None
        self.sealed = False


@dataclass(frozen=True)
class Device:
    """A torch.device, which is not text for torch."""

    name: str


@dataclass(frozen=True)
class _Name:
    """A class or function on the stack."""

    name: str


@dataclass(frozen=True)
class _Unbuilt:
    """An instance that has no state yet: for torch it does not exist."""

    name: str


_Container = TypeVar("_Container", ScriptList, ScriptDict)
_LEAVES = (type(None), bool, int, float, complex, str, np.ndarray, Device)


def read_script_pickle(archive: Archive, member: str, names: Callable[[str], bool], budget: Budget) -> Any:
    """The value in `member` ("data.pkl", "constants.pkl"), its storages in the folder of the same name.

    Result: None, bool, int (64 bit), float, complex, str, Device, numpy arrays for tensors, tuple, ScriptList, ScriptDict
    with str, int, float or bool as keys, and Records whose state is a ScriptDict by attribute; nothing else, and no cycles.
    names: may an object be of this class of the archive ("__torch__.Net"), or a container's tag name it?
    UnsafeFileError: what torch's pickler does not write, a name that is not allowed; FileError: it is damaged.
    """
    if archive.packed(member):
        budget.bytes(archive.size(member))
    data = archive.read(member)
    machine = _Machine(archive, member, names, budget)
    try:
        return machine.run(data)
    except GkpError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        raise corrupt(f"{type(error).__name__} while reading {member}") from error


class _Machine:
    def __init__(self, archive: Archive, member: str, names: Callable[[str], bool], budget: Budget) -> None:
        self.archive = archive
        self.member = member
        self.names = names
        self.budget = budget
        self.stack: list[Any] = []
        self.order = read_byteorder(archive)
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.extents: dict[int, tuple[int, int]] = {}  # by identity of a container: (values in it, depth)
        self.containers: list[Any] = []  # alive as long as their identities are used

    def run(self, data: bytes) -> Any:
        end = -1
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            name, end = opcode.name, position or 0
            self.budget.objects()
            if not count % 1024:
                self.budget.steps(1024)
            if name not in _HANDLERS:
                raise self.refuse(f"uses the opcode {name}")
            if (name == "PROTO") != (count == 0) or (name == "PROTO" and argument != 2):
                raise self.refuse("is not of protocol 2")
            if name == "LONG1" and data[end + 1] != 8:
                raise self.refuse("holds an integer that is not of 64 bits")
            if "PUT" in name and int(argument or 0) > count:
                raise self.refuse(f"remembers a value as number {argument} after {count} operations")
            _HANDLERS[name](self, argument)
        if end != len(data) - 1:
            raise self.refuse("goes on after its end")
        if len(self.stack) != 1 or self.below:
            raise corrupt(f"{self.member} ends with the wrong number of values")
        self.check(self.stack[0])
        return self.stack[0]

    def refuse(self, what: str) -> UnsafeFileError:
        return UnsafeFileError(f"TorchScript {clean(self.member, 40)} {clean(what, 160)}", _HINT)

    def unusual(self, what: str) -> UnsafeFileError:
        return self.refuse(f"{what}, which torch.jit.save does not write")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise corrupt("its stack runs empty")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def made(self, container: Any, parts: Iterable[Any]) -> Any:
        """A container is complete: know how much is in it, and refuse it if it is too deep."""
        self.budget.objects(2)
        size, depth = 1, 0
        for part in parts:
            inner = self.extents.get(id(part), (1, 0))
            size, depth = size + inner[0], max(depth, inner[1])
        if depth >= MAX_DEPTH:
            raise corrupt(f"{self.member} is nested more than {MAX_DEPTH} deep")
        self.extents[id(container)] = size, depth + 1
        self.containers.append(container)
        return container

    def fresh(self, container: Any, kind: type[_Container]) -> _Container:
        """`container` if it may still be filled."""
        if not isinstance(container, kind) or container.sealed or container.tag is not None or len(container):
            raise self.unusual("fills something other than a new container")
        return container

    def check(self, root: Any) -> None:
        """The result holds values only: no class, no storage, no instance without state."""
        waiting, seen = [root], set()
        while waiting:
            value = waiting.pop()
            if type(value) in (tuple, ScriptList, ScriptDict, Record):
                if id(value) not in seen:
                    seen.add(id(value))
                    state = value.state if isinstance(value, Record) else value
                    waiting.extend(state.values() if isinstance(state, ScriptDict) else state)
            elif not isinstance(value, _LEAVES):
                raise self.unusual(f"holds a {type(value).__name__.strip('_').lower()} as a value")

    # ---- opcodes -----------------------------------------------------------------------------------------------------
    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def tuple(self, values: list[Any]) -> None:
        self.push(self.made(tuple(values), values))

    def appends(self, _: Any) -> None:
        values = self.pop_mark()
        target = self.fresh(self.stack[-1], ScriptList)
        target.extend(values)
        self.made(target, values)

    def set_items(self, _: Any) -> None:
        flat = self.pop_mark()
        target = self.fresh(self.stack[-1], ScriptDict)
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int, float, bool):
                raise self.unusual(f"has a {type(key).__name__.strip('_').lower()} as a key")
            if hashable(key, self.budget) in target or key != key:
                raise self.unusual("sets an item twice")
            target[key] = value
        self.made(target, flat)

    def put(self, index: int) -> None:
        value = self.stack[-1]
        if isinstance(value, _Unbuilt):
            raise self.unusual("refers to an object without state")
        if isinstance(value, (ScriptList, ScriptDict)):
            value.sealed = True
        self.memo[index] = value

    def get(self, index: int) -> None:
        value = self.memo[index]
        self.budget.objects(self.extents.get(id(value), (0, 0))[0])
        self.push(value)

    def name(self, argument: str) -> None:
        match = _GLOBAL.fullmatch(argument)
        if match is None:
            raise self.refuse(f"refers to {argument}")
        name = f"{match[1]}.{match[2]}"
        if name not in _FUNCTIONS and name not in _STORAGES and not self.allowed(name):
            raise self.refuse(f"refers to {name}")
        self.push(_Name(name))

    def allowed(self, name: str) -> bool:
        return name.startswith("__torch__.") and self.names(name)

    def reduce(self, _: Any) -> None:
        function, args = self.pop(2)
        make = _FUNCTIONS.get(function.name) if type(function) is _Name else None
        if make is None or type(args) is not tuple:
            raise self.unusual("calls something other than a function")
        self.push(make(self, args))

    def new_object(self, _: Any) -> None:
        cls, args = self.pop(2)
        if type(cls) is not _Name or cls.name in _FUNCTIONS or cls.name in _STORAGES or type(args) is not tuple or args:
            raise self.unusual("makes something other than an object")
        self.push(_Unbuilt(cls.name))

    def build(self, _: Any) -> None:
        target, state = self.pop(2)
        if type(target) is not _Unbuilt:
            raise self.unusual("gives a second state to an object")
        if type(state) is not ScriptDict or state.sealed or state.tag is not None:
            raise self.unusual("gives a state that is not a dict of its own")
        if not all(type(key) is str for key in state):
            raise self.unusual("names an attribute by something other than text")
        self.push(self.made(Record(target.name, (), state), state.values()))

    def persistent(self, _: Any) -> None:
        (pid,) = self.pop(1)
        kinds = (str, _Name, str, str, int)
        if type(pid) is not tuple or tuple(map(type, pid)) != kinds or pid[0] != "storage" or pid[1].name not in _STORAGES:
            raise self.unusual("refers to something other than a storage")
        key, numel = pid[2], pid[4]
        if not re.fullmatch(r"\w{1,40}", key, re.ASCII) or not 0 <= numel < 2**48 or len(pid[3]) > 40:
            raise corrupt("a storage has an impossible key or size")
        if key in self.storages:
            raise self.unusual(f"describes the storage {key} twice")
        self.storages[key] = storage = Storage(_STORAGES[pid[1].name], numel)
        record = f"{self.member.removesuffix('.pkl')}/{key}"
        if self.archive.size(record) != storage.nbytes:
            raise corrupt(f"storage {clean(key, 120)} has the wrong size")
        if self.archive.packed(record):
            self.budget.bytes(storage.nbytes)
        storage.provide(self.archive.read(record), self.order)
        self.push(storage)


# ---- what may be called --------------------------------------------------------------------------------------------------
def _tensor(m: _Machine, args: tuple[Any, ...]) -> Array:
    """(storage, offset, size, stride, requires_grad, hooks). Torch does not look where the numbers point."""
    if tuple(map(type, args)) != (Storage, int, tuple, tuple, bool, type(None)):
        raise m.unusual("makes a tensor in another way")
    storage, offset, size, stride = args[:4]
    if not all(type(n) is int for n in (*size, *stride)):
        raise m.unusual("makes a tensor in another way")
    array: Array = storage.tensor(offset, size, stride, m.budget)
    return array


def _ordered_dict(m: _Machine, args: tuple[Any, ...]) -> None:
    """A tensor's hooks: torch's reader makes None of them."""
    if args:
        raise m.unusual("makes an OrderedDict of something")


def _device(m: _Machine, args: tuple[Any, ...]) -> Device:
    if len(args) != 1 or type(args[0]) is not str or not re.fullmatch(r"[a-z]{1,20}(:\d{1,3})?", args[0], re.ASCII):
        raise m.unusual("makes a device in another way")
    return Device(args[0])


def _complex(m: _Machine, args: tuple[Any, ...]) -> complex:
    if tuple(map(type, args)) != (float, float):
        raise m.unusual("makes a complex number in another way")
    return complex(*args)


def _tagged(m: _Machine, container: Any, tag: str) -> Any:
    """`container` with its type, which torch sets without a look at what is in it."""
    if container.sealed or container.tag is not None:
        raise m.unusual("gives a second type to a container")
    if id(container) not in m.extents:  # empty, and without the opcode that fills it
        m.made(container, ())
    container.tag = tag
    return container


def _list_of(kind: type, name: str) -> Callable[[_Machine, tuple[Any, ...]], Any]:
    def make(m: _Machine, args: tuple[Any, ...]) -> Any:
        if len(args) != 1 or type(args[0]) is not ScriptList or not all(type(value) is kind for value in args[0]):
            raise m.unusual(f"makes a List[{name}] of something else")
        return _tagged(m, args[0], f"List[{name}]")

    return make


def _type_tag(m: _Machine, args: tuple[Any, ...]) -> Any:
    """(container, its type), a text that torch parses and looks names up from."""
    if len(args) != 2 or type(args[1]) is not str:
        raise m.unusual("gives a type in another way")
    container, tag = args
    kind = {ScriptList: "List[", ScriptDict: "Dict["}.get(type(container), "\n")
    if len(tag) > _MAX_TAG or not tag.startswith(kind) or not _balanced(tag):
        raise m.unusual(f"gives the type {tag[:100]}")
    for name in re.findall(r"[^\[\], ]+", tag):
        if name not in _PLAIN_TYPES and not m.allowed(name):
            raise m.refuse(f"uses the type {name}")
    return _tagged(m, container, tag)


def _balanced(tag: str) -> bool:
    depth = 0
    for character in tag:
        depth += (character == "[") - (character == "]")
        if not 0 <= depth <= _MAX_TAG_DEPTH:
            return False
    return depth == 0


_STORAGES = {f"torch.{name}": dtype for name, dtype in STORAGE_DTYPES.items()}
_FUNCTIONS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "collections.OrderedDict": _ordered_dict,
    "torch.device": _device,
    "builtins.complex": _complex,
    "torch.jit._pickle.restore_type_tag": _type_tag,
    "torch.jit._pickle.build_intlist": _list_of(int, "int"),
    "torch.jit._pickle.build_doublelist": _list_of(float, "float"),
    "torch.jit._pickle.build_boollist": _list_of(bool, "bool"),
    "torch.jit._pickle.build_tensorlist": _list_of(np.ndarray, "Tensor"),
}
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "NONE"), _Machine.push),
    **dict.fromkeys(("PROTO", "STOP"), lambda m, _: None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_LIST": lambda m, _: m.push(ScriptList()),
    "EMPTY_DICT": lambda m, _: m.push(ScriptDict()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.tuple(m.pop_mark()),
    "TUPLE1": lambda m, _: m.tuple(m.pop(1)),
    "TUPLE2": lambda m, _: m.tuple(m.pop(2)),
    "TUPLE3": lambda m, _: m.tuple(m.pop(3)),
    "APPENDS": _Machine.appends,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
