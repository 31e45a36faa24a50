"""The inert objects that files from strangers are read into, and the limits under which they are read.

Nothing here imports, calls or instantiates what a file names: a name stays a name (`Global`), an instance stays a name
with its arguments and state (`Record`), a block of numbers stays bytes (`Storage`) until a checked view copies it out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gkp.errors import FileError
from gkp.text import clean
from gkp.types import Array

MAX_DEPTH = 200  # containers within containers; a module costs three levels, so this is 60 modules deep
_COPY_FACTOR = 8  # elements and bytes that constructors may copy, per byte of input ...
_COPY_SLACK = 1 << 16  # ... and for free, so that tiny files work
_MAX_OPCODES = 4_000_000  # a one-byte opcode makes an object of up to 200 bytes, whatever the size of the file
_MAX_UNSALTED_KEYS = 4096  # keys whose hashes a file can choose: with n colliding keys a dict costs n^2
_VIEW_FACTOR = 4  # bytes of tensors that may be made per byte of storage (tied and overlapping weights)
_MAX_DIMS = 32


def corrupt(what: str) -> FileError:
    """The error for a stream that no honest writer produces."""
    return FileError(f"corrupt pickle: {what}", "The file is damaged or not a checkpoint; save or download it again.")


@dataclass(frozen=True)
class Global:
    """A name ("module.attribute") that a pickle refers to. It is never imported."""

    name: str


@dataclass(eq=False)
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
    def fields(self) -> dict[str, Any]:
        """Instance attributes: the state dict, or both dicts of a (dict, slots) pair, or nothing."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        return {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


class Limits:
    """What one pickle may still cost. Linear in the size of the input, so that a small file stays a small problem."""

    def __init__(self, size: int) -> None:
        self._opcodes = _MAX_OPCODES
        self._copies = _COPY_FACTOR * size + _COPY_SLACK
        self._unsalted_keys = _MAX_UNSALTED_KEYS
        self._storage_ids: set[int] = set()
        self._view_bytes = _COPY_SLACK

    def opcode(self, cost: int = 1) -> None:
        self._opcodes -= cost
        if self._opcodes < 0:
            raise corrupt(f"more than {_MAX_OPCODES} operations")

    def copy(self, count: int) -> None:
        """Charge `count` elements or bytes that are about to be copied."""
        self._copies -= count
        if self._copies < 0:
            raise corrupt("it copies far more than it holds")

    def view(self, storage: Storage, nbytes: int) -> None:
        """Charge a tensor of `nbytes`; every distinct storage pays for `_VIEW_FACTOR` times its own size."""
        if id(storage.root) not in self._storage_ids:
            self._storage_ids.add(id(storage.root))
            self._view_bytes += _VIEW_FACTOR * storage.root.nbytes
        self._view_bytes -= nbytes
        if self._view_bytes < 0:
            raise corrupt(f"its tensors take more than {_VIEW_FACTOR} times the stored data")

    def key(self, value: Any) -> Any:
        """`value` if it may be a dict key or set member: scalars, flat tuples of scalars, globals, records.

        Hashing and comparing it takes bounded time. Strings and bytes have salted hashes and small integers distinct
        ones; of anything else a file can make colliding ones, so their number is limited.
        """
        if value is None or isinstance(value, (str, bytes)) or (isinstance(value, int) and _small(value)):
            return value
        flat = value if isinstance(value, tuple) else (value,)
        if len(flat) > 64 or not all(_scalar(part) for part in flat):
            raise corrupt(f"a {type(value).__name__} is used as a dict key or set member")
        self._unsalted_keys -= 1
        if self._unsalted_keys < 0:
            raise corrupt(f"more than {_MAX_UNSALTED_KEYS} dict keys that are neither text nor small integers")
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

    def __init__(self, dtype: str, numel: int, root: Storage | None = None, start: int = 0) -> None:
        self.dtype = dtype
        self.numel = numel
        self.root = root if root is not None else self
        self._start = start
        self._data: Array | None = None
        self._waiting: list[tuple[Array, int, tuple[int, ...]]] = []
        self._made: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Array] = {}

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

    def provide(self, data: bytes, byteorder: str) -> None:
        """Give the bytes, `byteorder` "<" or ">", and fill the arrays that wait for them. FileError on a wrong size."""
        if len(data) != self.nbytes:
            raise corrupt(f"a storage holds {len(data)} bytes instead of {self.nbytes}")
        stored = {_BFLOAT16: "u2", "b1": "u1"}.get(self.dtype, self.dtype)
        self._data = np.frombuffer(data, np.dtype(stored).newbyteorder(byteorder))  # type: ignore[arg-type]
        for array, offset, stride in self._waiting:
            self._fill(array, offset, stride)
        self._waiting.clear()

    def tensor(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...], limits: Limits) -> Array:
        """A C-contiguous native array of shape `size`: element i is storage[offset + sum(i * stride)].

        bfloat16 becomes float32. The same view asked for twice is the same array, as tied weights are in torch.
        FileError if the view leaves the storage, has negative numbers or more elements than the storage (an
        expanded tensor), or if all views together take too much.
        """
        if not (_counts(size) and _counts(stride) and _counts((offset,))) or len(size) != len(stride):
            raise corrupt("a tensor has an impossible shape, stride or offset")
        numel = 1
        for n in size:
            numel *= n
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if numel and (numel > self.numel or last >= self.numel):
            raise corrupt("a tensor reaches outside its storage")
        key = (self._start + offset, size, stride)
        made = self.root._made.get(key)
        if made is None:
            dtype = np.dtype("f4" if self.dtype == _BFLOAT16 else self.dtype)
            limits.view(self, numel * dtype.itemsize)
            made = self.root._make(np.zeros(size, dtype), *key)
        return made

    def _make(self, array: Array, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Array:
        self._made[offset, size, stride] = array
        if array.size == 0:
            return array
        if self._data is None:
            self._waiting.append((array, offset, stride))
        else:
            self._fill(array, offset, stride)
        return array

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

    FileError when they nest more than MAX_DEPTH deep. Scalars and numeric arrays are not yielded.
    """
    seen: set[int] = set()
    path = [iter((root,))]
    while path:
        if len(path) > MAX_DEPTH:
            raise corrupt(f"nested more than {MAX_DEPTH} deep")
        for child in path[-1]:
            inner = _children(child)
            if inner is not None and id(child) not in seen:
                seen.add(id(child))
                yield child
                path.append(inner)
                break
        else:
            path.pop()


def _children(value: Any) -> Iterator[Any] | None:
    if isinstance(value, dict):
        return (part for item in list(value.items()) for part in item)
    if isinstance(value, (list, tuple, set, frozenset)):
        return iter(value)
    if isinstance(value, Record):
        return iter((value.args, value.state, value.items, value.elements))
    if isinstance(value, np.ndarray) and value.dtype == object:
        return iter(value.ravel())
    return None
