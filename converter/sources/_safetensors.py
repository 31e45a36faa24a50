"""Reads safetensors files: names, types and places of tensors in a JSON header, and then their numbers.

Format (huggingface.co/docs/safetensors): 8 bytes, the length of the header as a little-endian integer; the header,
{name: {"dtype": "F32", "shape": [8, 3, 3, 3], "data_offsets": [begin, end]}, "__metadata__": {text: text}}, with offsets
that count from its end; the numbers, little-endian and in C order, without gaps.

The header is checked here before the package sees the file: the package takes a name that stands there twice, fields that
the format does not know, and 100 MB of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gkp.converter.budget import Budget
from gkp.errors import FileError, UnsupportedModelError
from gkp.require import require
from gkp.text import clean, first_line
from gkp.types import Array

_BFLOAT16, _BOOL = "BF16", "BOOL"
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", _BFLOAT16: "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
           "U8": "u1", _BOOL: "u1"}
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_OBJECTS = 32  # of Python for a tensor, here and in the package
_MAX_DIMS = 32
_MAX_DIGITS = 19
_TEXT = range(9, 127)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in the header. shape: its sides; begin, end: where its bytes lie behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def is_safetensors(head: bytes) -> bool:
    """Do these first bytes of a file begin with a length, which is not text, and a JSON object?"""
    opens = head[8:9] == b"{" and head[9:10] in (b'"', b"}", b" ", b"\t", b"\r", b"\n")
    return opens and any(byte not in _TEXT for byte in head[:8])


def read_safetensors(data: bytes, budget: Budget) -> dict[str, Array]:
    """Name -> array, native and C-contiguous, in the header's order; bfloat16 as float32.

    FileError: damaged, or not what the header says. UnsafeFileError: the header costs too much. UnsupportedModelError: types
    without a numpy twin. BackendMissingError: the package is not installed."""
    entries = _header(data, budget)
    library = require("safetensors", "torch", "reading a safetensors file")
    budget.objects(_OBJECTS * len(entries))
    budget.bytes(sum(_cost(entry) for entry in entries.values()))
    try:
        found = dict(library.deserialize(data))
    except library.SafetensorError as error:
        raise _corrupt(first_line(error, 200)) from error
    if found.keys() != entries.keys():
        raise _corrupt("its header can be read in two ways")
    return {name: _array(found[name]["data"], entry) for name, entry in entries.items()}


def _cost(entry: _Entry) -> int:
    """Bytes beside the file: what the package copies, and bfloat16 as float32."""
    size = entry.end - entry.begin
    return 5 * size if entry.dtype == _BFLOAT16 else size


def _array(data: bytes, entry: _Entry) -> Array:
    stored: Array = np.frombuffer(data, _STORED[entry.dtype]).reshape(entry.shape)
    if entry.dtype == _BFLOAT16:  # the upper half of a float32
        single: Array = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return single
    return np.asarray(stored, np.bool_ if entry.dtype == _BOOL else stored.dtype.newbyteorder("="))


# ---- the header ------------------------------------------------------------------------------------------------------
def _header(data: bytes, budget: Budget) -> dict[str, _Entry]:
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise _corrupt("it ends before its header does")
    header = data[8:start]
    budget.objects(sum(header.count(mark) for mark in b"[{,:"))
    budget.bytes(4 * len(header))
    try:
        found = json.loads(header.decode(), object_pairs_hook=_once, parse_int=_integer, parse_float=_no_number,
                           parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"its header: {first_line(error, 200)}") from error
    if not isinstance(found, dict):
        raise _corrupt("its header is not an object")
    metadata = found.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt("its metadata are not text")
    entries = {name: _entry(name, value) for name, value in found.items()}
    _check_places(entries, len(data) - start)
    return entries


def _entry(name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or value.keys() != _FIELDS or not isinstance(value["dtype"], str):
        raise _corrupt(f"{clean(name, 120)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _counts(shape) or len(shape) > _MAX_DIMS or math.prod(max(side, 1) for side in shape) >= 2**60:
        raise _corrupt(f"{clean(name, 120)} has an impossible shape")
    if not _counts(offsets) or len(offsets) != 2:
        raise _corrupt(f"{clean(name, 120)} has impossible offsets")
    if dtype not in _STORED:
        raise UnsupportedModelError(f"tensors of type {clean(dtype, 40)} cannot be read",
                                    "convert the model with .float() and save it again")
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(_STORED[dtype]).itemsize:
        raise _corrupt(f"{clean(name, 120)} has {end - begin} bytes, which its shape and type contradict")
    return _Entry(dtype, tuple(shape), begin, end)


def _check_places(entries: Mapping[str, _Entry], size: int) -> None:
    """The tensors lie one behind the other and fill the file."""
    position = 0
    for begin, end, name in sorted((entry.begin, entry.end, name) for name, entry in entries.items()):
        if begin != position:
            raise _corrupt(f"{clean(name, 120)} {'overlaps another tensor' if begin < position else 'lies behind a gap'}")
        position = end
    if position != size:
        raise _corrupt(f"its header promises {position:,} bytes of tensors, and it holds {size:,}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice: which of the two counts would be the reader's choice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{clean(key, 120)} stands there twice")
        found[key] = value
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"{clean(text, 40)} is not an integer")


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _corrupt(what: str) -> FileError:
    return FileError(f"damaged safetensors file: {what}", "download it again, or save it again")
