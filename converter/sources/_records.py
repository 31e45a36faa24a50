"""The inert objects that files from strangers are read into.

Nothing here imports, calls or instantiates what a file names: a name stays a name (`Global`), an instance stays a name
with its arguments and state (`Record`), a block of numbers stays bytes (`Storage`) until a checked view copies it out, an
array of objects stays a list (`ObjectArray`): numpy frees arrays within arrays by recursion, CPython all other containers
here without it, so that what is nested too deep can be let go.
"""

from __future__ import annotations

import math
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from gkp.converter.budget import Budget
from gkp.errors import FileError
from gkp.text import clean
from gkp.types import Array

MAX_DEPTH = 200  # containers within containers; a module costs three levels, so this is 60 modules deep
_MAX_DIMS = 32


def corrupt(what: str) -> FileError:
    """The error for a stream that no honest writer produces."""
    return FileError(f"corrupt pickle: {what}", "The file is damaged or not a checkpoint; save or download it again.")


@dataclass(frozen=True, slots=True)
class Global:
    """A name ("module.attribute") that a pickle refers to. It is never imported."""

    name: str


@dataclass(eq=False, slots=True)
class Record:
    """An instance that a pickle describes: class name, constructor arguments, and the state given to it afterwards.

    items and elements hold what a subclass of dict or list was filled with. Records compare by identity.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Record({clean(self.name, 120)})"

    @property
    def fields(self) -> Mapping[str, Any]:
        """Instance attributes: the state dict, or both dicts of a (dict, slots) pair, or nothing. Nothing is copied: many
        records can share one state."""
        if isinstance(self.state, dict):
            return self.state
        parts: tuple[Any, ...] = self.state if isinstance(self.state, tuple) and len(self.state) == 2 else ()
        return ChainMap(*(part for part in reversed(parts) if isinstance(part, dict)))


@dataclass(eq=False, slots=True)
class ObjectArray:
    """A numpy array of objects; items: in C order."""

    shape: tuple[int, ...]
    items: list[Any]


@dataclass(eq=False, frozen=True, slots=True)
class TensorKey:
    """A tensor as a dict key: torch's optimizers keep what they remember by parameter. Compares by identity, as those do."""

    tensor: Array


def key(value: Any, budget: Budget) -> Any:
    """`value` as a dict key or set member: scalars, flat tuples of scalars, globals, records; a tensor as a TensorKey.

    Hashing and comparing it takes time in proportion to its length, which is charged. Strings and bytes have salted hashes
    and small integers distinct ones; of anything else a file can make colliding ones, so their number is limited.
    """
    if isinstance(value, np.ndarray):
        budget.keys()
        budget.objects()
        return TensorKey(value)
    if isinstance(value, (str, bytes)):
        budget.steps(1 + len(value))
    elif value is not None and not (isinstance(value, int) and _small(value)):
        flat = value if isinstance(value, tuple) else (value,)
        if len(flat) > 64 or not all(_scalar(part) for part in flat):
            raise corrupt(f"a {type(value).__name__} is used as a dict key or set member")
        budget.keys()
        budget.steps(sum(len(part) if isinstance(part, (str, bytes)) else 1 for part in flat))
    return value


def _small(value: int) -> bool:
    return abs(value) < sys.hash_info.modulus


def _scalar(value: Any) -> bool:
    if isinstance(value, int):
        return _small(value)
    return value is None or isinstance(value, (str, bytes, float, complex, np.generic, Global, Record))


# Torch storage class -> (dtype in the file without byte order, dtype of the array made from it).
_BFLOAT16 = "bfloat16"
STORAGE_DTYPES = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": _BFLOAT16,
    "CharStorage": "i1",
    "ShortStorage": "i2",
    "IntStorage": "i4",
    "LongStorage": "i8",
    "ByteStorage": "u1",
    "BoolStorage": "b1",
}


class Storage:
    """A flat block of `numel` numbers that tensors are views of; `torch.FloatStorage` and its siblings.

    Its bytes may arrive after the views were asked for (the legacy format writes them last): arrays are then made
    first and filled by `provide`.
    """

    __slots__ = ("_data", "_made", "_start", "_waiting", "dtype", "numel", "root")

    def __init__(self, dtype: str, numel: int, root: Storage | None = None, start: int = 0) -> None:
        self.dtype = dtype
        self.numel = numel
        self.root = root if root is not None else self
        self._start = start
        self._data: Array | None = None
        self._waiting: list[tuple[Array, int, tuple[int, ...]]] = []
        self._made: dict[str, Array] = {}  # by text: of numbers a file could make keys that collide

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == _BFLOAT16 else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def window(self, offset: int, numel: int) -> Storage:
        """The part [offset, offset + numel) as a storage of its own (a legacy storage view). FileError if outside."""
        if offset < 0 or numel < 0 or offset + numel > self.numel:
            raise corrupt("a storage view leaves its storage")
        return Storage(self.dtype, numel, self.root, self._start + offset)

    def provide(self, data: bytes | memoryview, byteorder: str) -> None:
        """Give the bytes, `byteorder` "<" or ">", and fill the arrays that wait for them. FileError on a wrong size."""
        if len(data) != self.nbytes:
            raise corrupt(f"a storage holds {len(data)} bytes instead of {self.nbytes}")
        stored = {_BFLOAT16: "u2", "b1": "u1"}.get(self.dtype, self.dtype)
        self._data = np.frombuffer(data, np.dtype(stored).newbyteorder(byteorder))  # type: ignore[arg-type]
        for array, offset, stride in self._waiting:
            self._fill(array, offset, stride)
        self._waiting.clear()

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...], budget: Budget) -> Array:
        """A C-contiguous native array of shape `size`: element i is storage[offset + sum(i * stride)].

        bfloat16 becomes float32. The same view asked for twice is the same array, as tied weights are in torch.
        FileError if the view leaves the storage, has negative numbers or more elements than the storage (an expanded
        tensor); UnsafeFileError if all views together take too much.
        """
        if not (_counts(size) and _counts(stride) and _counts((offset,))) or len(size) != len(stride):
            raise corrupt("a tensor has an impossible shape, stride or offset")
        numel = math.prod(size)
        stride = tuple(s if n > 1 else 0 for n, s in zip(size, stride, strict=True))  # the others lead nowhere
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if numel and (numel > self.numel or last >= self.numel):
            raise corrupt("a tensor reaches outside its storage")
        view = repr((self._start + offset, size, stride))
        made = self.root._made.get(view)
        if made is None:
            dtype = np.dtype("f4" if self.dtype == _BFLOAT16 else self.dtype)
            budget.objects(8)
            budget.bytes(numel * dtype.itemsize)
            made = self.root._made[view] = np.zeros(size, dtype)
            if numel and self.root._data is None:
                self.root._waiting.append((made, self._start + offset, stride))
            elif numel:
                self.root._fill(made, self._start + offset, stride)
        return made

    def _fill(self, array: Array, offset: int, stride: tuple[int, ...]) -> None:
        assert self._data is not None
        view = np.lib.stride_tricks.as_strided(
            self._data[offset:], array.shape, [s * self._data.itemsize for s in stride], writeable=False
        )
        if self.dtype == _BFLOAT16:  # the upper half of a float32
            array.view(np.uint32)[...] = view.astype(np.uint32) << np.uint32(16)
        else:
            array[...] = view  # for bool any byte but 0 is True


def _counts(values: tuple[Any, ...]) -> bool:
    return len(values) <= _MAX_DIMS and all(isinstance(n, int) and 0 <= n < 2**62 for n in values)


def walk(root: Any) -> Iterator[Any]:
    """Every container and record reachable from `root`, each once, depth first, without recursion.

    FileError when they nest more than MAX_DEPTH deep, also where one of them was met before. Scalars and numeric arrays are
    not yielded.
    """
    heights: dict[int, int] = {}  # containers on the longest way down, by identity; those on the path are not in it yet
    path: list[tuple[int, Iterator[Any]]] = [(0, iter((root,)))]
    deepest, on_path = [0], {0}  # below each container on the path, as far as it is known
    while path:
        for child in path[-1][1]:
            inner = _children(child)
            if inner is None or id(child) in on_path:  # a cycle ends here
                continue
            if id(child) in heights:
                deepest[-1] = max(deepest[-1], heights[id(child)])
                continue
            yield child
            path.append((id(child), inner))
            on_path.add(id(child))
            deepest.append(0)
            break
        else:
            done = path.pop()[0]
            on_path.remove(done)
            height = heights[done] = deepest.pop() + 1
            if deepest:
                deepest[-1] = max(deepest[-1], height)
        if len(path) > MAX_DEPTH + 1 or (deepest and deepest[-1] > MAX_DEPTH):
            raise corrupt(f"nested more than {MAX_DEPTH} deep")


def _children(value: Any) -> Iterator[Any] | None:
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return iter(value)
    if isinstance(value, Record):
        return iter((value.args, value.state, value.items, value.elements))
    if isinstance(value, ObjectArray):
        return iter(value.items)
    return None
