"""The bytes of an ONNX file, before the protobuf library makes objects of them: two bytes can be an object of a hundred."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx

from gkp.converter.budget import Budget
from gkp.errors import FileError

_MESSAGE, _STRING = 128, 48
"""Bytes that the library, and we, keep for each (measured with protobuf 6: 40 to 120, and 16 to 60)."""
_PER_VARINT = 8
_FLUSH = 1 << 16
_Kind = tuple[str, Any]


def charge(data: bytes, budget: Budget) -> None:
    """Charge the memory of every message, text and packed number in `data`, and every node and end of a node.
    FileError when it is no ONNX protobuf, UnsafeFileError when it would become too much."""
    stack: list[tuple[int, int, Any]] = [(0, len(data), onnx.ModelProto.DESCRIPTOR)]
    cost = nodes = steps = 0
    while stack:
        at, end, kind = stack.pop()
        fields, is_node = _fields(kind), kind.name == "NodeProto"
        nodes += is_node
        while at < end:
            steps += 1
            tag, at = _varint(data, at, end)
            if tag & 7 == 2:
                length, at = _varint(data, at, end)
                what, child = fields.get(tag >> 3, ("", None))
                if what == "message":
                    stack.append((at, at + length, child))
                    cost += _MESSAGE
                elif what == "text":
                    cost += _STRING
                    nodes += is_node and tag >> 3 <= 2  # input, output
                elif what == "numbers":
                    cost += _PER_VARINT * length
                at += length
            else:
                at = _skip(data, at, end, tag)
            if at > end:
                raise _broken()
            if cost + steps > _FLUSH:
                _flush(budget, cost, nodes, steps)
                cost = nodes = steps = 0
    _flush(budget, cost, nodes, steps)


def _flush(budget: Budget, cost: int, nodes: int, steps: int) -> None:
    budget.bytes(cost)
    budget.nodes(nodes)
    budget.steps(steps)


@cache
def _fields(kind: Any) -> dict[int, _Kind]:
    """What a length in front of a field means, by the field's number."""
    found: dict[int, _Kind] = {}
    for field in kind.fields:
        if field.message_type is not None:
            found[field.number] = ("message", field.message_type)
        elif field.type == field.TYPE_STRING or field.name in ("strings", "string_data"):
            found[field.number] = ("text", None)
        elif field.type not in (field.TYPE_BYTES, field.TYPE_FLOAT, field.TYPE_DOUBLE):
            found[field.number] = ("numbers", None)
    return found


def _skip(data: bytes, at: int, end: int, tag: int) -> int:
    if tag & 7 == 0:
        return _varint(data, at, end)[1]
    if tag & 7 in (1, 5):
        return at + (8 if tag & 7 == 1 else 4)
    raise _broken()  # groups: not in ONNX


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
    return FileError("it is not an ONNX file: no ONNX protobuf, or cut off", "export or download the model again")
