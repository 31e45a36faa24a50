"""Reads what PyTorch, pickle and numpy write, without PyTorch and without executing anything in the file.

Formats, by content and never by file name: torch.save (zip since 1.6, legacy before), plain pickles, safetensors, .npy.
Tensors become numpy arrays (bfloat16 as float32); modules become `Record`s, from which `state_dict_of`, `submodules`
and `attribute` read. Sizes are checked against the file before memory is taken.
"""

from __future__ import annotations

import ast
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gkp.archive import Archive
from gkp.converter.budget import Budget
from gkp.errors import FileError, UnsupportedModelError
from gkp.text import clean
from gkp.types import Array

from ._constructors import plain_array, plain_dtype
from ._pickle import load_pickle, load_stream
from ._records import STORAGE_DTYPES, Global, ObjectArray, Record, Storage, corrupt
from ._safetensors import is_safetensors, read_safetensors

Kind = Literal["torchscript", "torch-zip", "torch-legacy", "pickle", "safetensors", "pt2", "npy", "npz", "onnx", "zip",
               "unknown"]
CHECKPOINTS = ("torch-zip", "torch-legacy", "pickle", "safetensors")  # what `read_torch` reads

_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # LONG1 0x1950a86a20f9469cfc6c, STOP
_LEGACY_PROTOCOL = 1001
_NPY_MAGIC = b"\x93NUMPY"
_MAX_NPY_HEADER = 10_000
_MAX_KEY = 1000  # characters of a storage's name


def container_kind(path: Path) -> Kind:
    """What `path` is, from its first and last bytes and, for a zip, its member names.

    "pt2" is torch.export.save; "onnx" is a guess (a protobuf that begins with field 1); "zip" any other archive.
    FileError if it cannot be read, UnsafeFileError for a hostile archive.
    """
    head, last = _ends(path)
    if is_safetensors(head):  # the length it begins with can be the first bytes of any other format
        return "safetensors"
    if head.startswith(b"PK"):
        with Archive(path) as archive:
            return _archive_kind(archive.names)
    if head.startswith(_NPY_MAGIC):
        return "npy"
    if _LEGACY_MAGIC in head:
        return "torch-legacy"
    if (head[:1] == b"\x80" and head[1:2] <= b"\x05") or (last == b"." and head[0] in b"(]}cNIFVS"):
        return "pickle"
    return "onnx" if head[:1] == b"\x08" else "unknown"


def read_torch(path: Path, budget: Budget | None = None) -> Any:
    """The object that torch.save (zip or legacy), pickle.dump or safetensors wrote to `path`, as inert data.

    See `_pickle.load_pickle` for what the result consists of. budget: without one, that of the file. Raises UnsafeFileError
    naming what the file wants to call, or when it costs too much, FileError if it is damaged or another format,
    UnsupportedModelError for tensor types without a numpy twin, BackendMissingError where a package is needed to read it.
    """
    kind = container_kind(path)
    if kind == "torch-zip":
        with Archive(path) as archive:
            return _read_archive_pickle(archive, "data.pkl", "data", budget or Budget(path.stat().st_size))
    if kind == "torch-legacy":
        data = _bytes(path)
        return _read_legacy(data, budget or Budget(len(data)))
    if kind == "pickle":
        return load_pickle(_bytes(path), budget=budget)
    if kind == "safetensors":
        data = _bytes(path)
        return read_safetensors(data, budget or Budget(len(data)))
    raise FileError(f"{clean(path.name, 120)} is not a torch checkpoint but {kind}", "Give a file made by torch.save.")


def read_pickle_file(path: Path) -> Any:
    """The object in a plain pickle, such as Structure-LTH's .block: list of (row list, flattened-column list)."""
    return load_pickle(_bytes(path))


def read_object_npy(path: Path, budget: Budget | None = None) -> Array:
    """The array in a .npy file, also one of objects (GSparsity's masks: nested arrays of bool); C-contiguous, native.

    Format: NEP 1, versions 1.0 and 2.0. budget: without one, that of the file. FileError if its size contradicts its header.
    """
    data = _bytes(path)
    budget = budget or Budget(len(data))
    if not data.startswith(_NPY_MAGIC) or data[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise FileError(f"{clean(path.name, 120)} is not a .npy file", "Save the array again with numpy.save.")
    width = 2 if data[6] == 1 else 4
    start = 8 + width
    length = int.from_bytes(data[8:start], "little")
    if length > min(_MAX_NPY_HEADER, len(data) - start):
        raise corrupt("the header of a .npy file is too long")
    code, fortran, shape = _npy_header(data[start : start + length])
    body = data[start + length :]
    try:
        dtype = plain_dtype(code)
        if not dtype.hasobject:
            return plain_array(body, dtype, shape, fortran, budget)
    except (ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise corrupt("numpy cannot make the array of a .npy file") from error
    array = load_pickle(body, budget=budget)
    if not isinstance(array, ObjectArray) or array.shape != shape:
        raise corrupt("the objects of a .npy file do not fit its header")
    return _as_numpy(array, {})


def _as_numpy(array: ObjectArray, made: dict[int, Array]) -> Array:
    """A numpy array of the objects, arrays of objects among them too: they are at most MAX_DEPTH deep by now."""
    if id(array) not in made:
        flat = made[id(array)] = np.empty(len(array.items), object)
        for place, item in enumerate(array.items):
            flat[place] = _as_numpy(item, made) if isinstance(item, ObjectArray) else item
        made[id(array)] = flat.reshape(array.shape)
    return made[id(array)]


def state_dict_of(record: Record, budget: Budget | None = None) -> dict[str, Array]:
    """Parameters and persistent buffers of a module by dotted name, in the order of torch's state_dict()."""
    budget = budget or Budget(0)
    tensors: dict[str, Array] = {}
    for name, module in submodules(record, budget):
        fields = module.fields
        transient = fields.get("_non_persistent_buffers_set")
        skipped = transient if isinstance(transient, set) else set()
        for kind in ("_parameters", "_buffers"):
            entries = _dict(fields.get(kind))
            budget.steps(1 + len(entries))
            for key, value in entries.items():
                if isinstance(key, str) and isinstance(value, np.ndarray) and not (kind == "_buffers" and key in skipped):
                    tensors[_dotted(name, key, budget)] = value
    return tensors


def submodules(record: Record, budget: Budget | None = None) -> Iterator[tuple[str, Record]]:
    """(dotted name, module) for the module itself (name "") and all below it, parents first, in torch's order.

    A shared module appears under each of its names, which a budget pays for (without one: that of a small file); one that
    contains itself raises FileError.
    """
    budget = budget or Budget(0)
    budget.nodes()
    yield "", record
    path = [("", id(record), _modules(record, budget))]
    above = {id(record)}
    while path:
        name, module, children = path[-1]
        for key, child in children:
            if id(child) in above:
                raise corrupt("its modules contain themselves")
            budget.nodes()
            below = _dotted(name, key, budget)
            yield below, child
            above.add(id(child))
            path.append((below, id(child), _modules(child, budget)))
            break
        else:
            path.pop()
            above.remove(module)


def _modules(record: Record, budget: Budget) -> Iterator[tuple[str, Record]]:
    entries = _dict(record.fields.get("_modules"))
    budget.steps(1 + len(entries))
    return ((key, child) for key, child in entries.items() if isinstance(key, str) and isinstance(child, Record))


def _dotted(name: str, key: str, budget: Budget) -> str:
    budget.characters(len(name) + len(key) + 1)
    return f"{name}.{key}" if name else key


def attribute(record: Record, name: str) -> Any:
    """`module.name` as Python would find it: plain attribute, parameter, buffer or submodule. FileError if none."""
    fields = record.fields
    for scope in (fields, *(_dict(fields.get(kind)) for kind in ("_parameters", "_buffers", "_modules"))):
        if name in scope:
            return scope[name]
    raise FileError(f"{clean(record.name, 120)} has no attribute {clean(name, 120)}", "The file is of another kind.")


def _read_archive_pickle(archive: Archive, member: str, folder: str, budget: Budget) -> Any:
    """The object in the pickle `member`, its storages in `folder`/<key>, of a torch zip."""
    order = read_byteorder(archive)
    storages: dict[str, Storage] = {}

    def persistent_load(pid: Any) -> Storage:
        dtype, key, numel, view = _storage_id(pid)
        storage = storages.get(key)
        if storage is None:
            storage = storages[key] = Storage(dtype, numel)
            record = f"{folder}/{key}"
            if archive.size(record) != storage.nbytes:
                raise corrupt(f"storage {clean(key, 120)} has the wrong size")
            storage.provide(_member(archive, record, budget), order)
        return _checked(storage, dtype, numel, view)

    return load_pickle(_member(archive, member, budget), persistent_load, budget)


def _member(archive: Archive, name: str, budget: Budget) -> bytes:
    """A member, charged when it holds more than its part of the file."""
    if archive.packed(name):
        budget.bytes(archive.size(name))
    return archive.read(name)


def read_byteorder(archive: Archive) -> str:
    """"<" or ">", for the storages of a torch zip. FileError if it says something else."""
    order = archive.read("byteorder") if "byteorder" in archive.names and archive.size("byteorder") < 10 else b"little"
    if order not in (b"little", b"big"):
        raise corrupt("its byte order is neither little nor big")
    return "<" if order == b"little" else ">"


def _read_legacy(data: bytes, budget: Budget) -> Any:
    """Pickles of magic, version, system, object and storage keys; then, per key, an int64 count and the numbers."""
    stream = io.BytesIO(data)
    load_stream(stream, budget)  # the magic number: container_kind saw it
    version, system = load_stream(stream, budget), load_stream(stream, budget)
    if type(version) is not int or version != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise corrupt("it is no torch file of protocol 1001")
    little = system.get("little_endian", True)
    if not isinstance(little, bool):
        raise corrupt("its byte order is neither little nor big")
    order = "<" if little else ">"
    storages: dict[str, Storage] = {}
    promised = 0

    def persistent_load(pid: Any) -> Any:
        nonlocal promised
        if isinstance(pid, tuple) and len(pid) == 4 and isinstance(pid[0], str) and pid[0] == "module":
            return pid[1]  # (_, class, source file, source)
        dtype, key, numel, view = _storage_id(pid)
        if key not in storages:
            storages[key] = Storage(dtype, numel)
            promised += storages[key].nbytes
            if promised > len(data):
                raise corrupt("it promises more numbers than the file holds")
        return _checked(storages[key], dtype, numel, view)

    root = load_stream(stream, budget, persistent_load)
    keys = load_stream(stream, budget)
    named = isinstance(keys, list) and len(keys) == len(storages) and all(isinstance(key, str) for key in keys)
    if not named or set(keys) != storages.keys():
        raise corrupt("its storages are not the ones it refers to")
    position, content = stream.tell(), memoryview(data)
    for key in keys:
        storage = storages[key]
        if content[position : position + 8] != struct.pack(f"{order}q", storage.numel):
            raise corrupt(f"storage {clean(key, 120)} has the wrong size")
        position += 8 + storage.nbytes
        storage.provide(content[position - storage.nbytes : position], order)
    return root


def _storage_id(pid: Any) -> tuple[str, str, int, tuple[int, int] | None]:
    """(dtype, key, numel, (offset, numel) of a legacy view) of ("storage", class, key, location, numel[, view])."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or not isinstance(pid[1], Global):
        raise corrupt("it refers to something that is not a storage")
    if not isinstance(pid[0], str) or pid[0] != "storage":
        raise corrupt("it refers to something that is not a storage")
    dtype = STORAGE_DTYPES.get(pid[1].name.rpartition(".")[2])
    if dtype is None or not pid[1].name.startswith("torch."):
        raise UnsupportedModelError(
            f"tensors of {clean(pid[1].name, 120)} cannot be read", "Convert the model with .float() and save it again."
        )
    key, numel, view = pid[2], pid[4], pid[5] if len(pid) == 6 else None
    if not isinstance(key, str) or len(key) > _MAX_KEY or not isinstance(numel, int) or not 0 <= numel < 2**48:
        raise corrupt("a storage has an impossible key or size")
    if view is None:
        return dtype, key, numel, None
    if not isinstance(view, tuple) or len(view) != 3 or not all(isinstance(n, int) for n in view[1:]):
        raise corrupt("a storage view is impossible")
    return dtype, key, numel, (view[1], view[2])


def _checked(storage: Storage, dtype: str, numel: int, view: tuple[int, int] | None) -> Storage:
    if storage.dtype != dtype or storage.numel != numel:
        raise corrupt("one storage is described in two ways")
    return storage if view is None else storage.window(*view)


def _npy_header(header: bytes) -> tuple[Any, bool, tuple[int, ...]]:
    """(type string, Fortran order, shape) from the literal dict of a .npy header."""
    text = header.decode("latin-1").strip()
    try:
        if not text.isascii() or not text.isprintable() or "\\" in text:
            raise ValueError
        fields = ast.literal_eval(text)
        return fields["descr"], bool(fields["fortran_order"]), fields["shape"]
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, RecursionError, MemoryError) as error:
        raise corrupt("the header of a .npy file cannot be read") from error


def _archive_kind(names: tuple[str, ...]) -> Kind:
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "archive_format" in names or any(name.endswith("serialized_exported_program.json") for name in names):
        return "pt2"
    if any(name.startswith("models/") and name.endswith(".json") for name in names):
        return "pt2"
    if "data.pkl" in names:
        return "torch-zip"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "zip"


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first 64 bytes and the last one."""
    with _open(path) as file:
        head = file.read(64)
        file.seek(-1 if head else 0, io.SEEK_END)
        return head, file.read(1)


def _bytes(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _open(path: Path) -> io.BufferedReader:
    try:
        if not path.is_file():
            raise FileError(f"{clean(path.name, 120)} is not a file", "Check the path.")
        return path.open("rb")
    except OSError as error:
        raise FileError(f"cannot open {clean(path.name, 120)}: {error.strerror}", "Check the path.") from error


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
