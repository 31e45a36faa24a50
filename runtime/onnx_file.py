"""ONNX files of artefacts, read without the onnx package: all that runs lies in the bytes that were hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from gkp.errors import FileError, UnsafeFileError

MESSAGE, VARINT = 2, 0
"""Wire types of protobuf: something with its length in front, and a number of any length."""
_BELOW: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
"""The messages of onnx.proto3 that lead to tensors, by field number."""
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


def read_onnx(path: Path, sha256: str) -> bytes:
    """The file's bytes. FileError when they are not those of the checksum."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}", "convert the model again") from e
    if hashlib.sha256(data).hexdigest() != sha256:
        raise FileError(f"{path} is not the file that was written (checksum differs)", "convert the model again")
    return data


def refuse_external(data: bytes) -> None:
    """UnsafeFileError when a tensor of an ONNX model, wherever it is, lies in another file, which nobody has hashed.
    FileError when it is no ONNX model."""
    stack = [("model", 0, len(data))]
    while stack:
        kind, start, end = stack.pop()
        for number, wire, at, stop in fields(data, start, end):
            if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and data[at:stop] != b"\0")):
                raise UnsafeFileError("the model keeps weights in another file, whose checksum nobody knows",
                                      "do not use this model; convert it yourself")
            if wire == MESSAGE and number in _BELOW[kind]:
                stack.append((_BELOW[kind][number], at, stop))


def fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, begin, end) of every field of the protobuf message in data[at:end]; begin and end are those of its
    value. FileError where it is none."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == MESSAGE:
            length, at = _varint(data, at, end)
            stop = at + length
        elif wire == VARINT:
            stop = _varint(data, at, end)[1]
        elif wire in (1, 5):
            stop = at + (8 if wire == 1 else 4)
        else:  # groups: ONNX has none
            raise _broken()
        if stop > end:
            raise _broken()
        yield tag >> 3, wire, at, stop
        at = stop


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise _broken()


def _broken() -> FileError:
    return FileError("cannot open the model: it is not an ONNX file, or cut off", "export, convert or download it again")
