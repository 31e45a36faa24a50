"""The bytes of an ONNX file, before the protobuf library makes objects of them: two bytes can be an object of a hundred."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx

from gkp.converter.budget import Budget
from gkp.runtime.onnx_file import MESSAGE, fields

_MESSAGE, _STRING = 128, 48
"""Bytes that the library, and we, are taken to keep for each: an estimate on the safe side, not a measurement."""
_PER_VARINT = 8
_ENDS = 2
"""Fields 1 and 2 of a node are its inputs and outputs."""
_FLUSH = 1 << 16
_Kind = tuple[str, Any]


def charge(data: bytes, budget: Budget) -> None:
    """Charge the memory of every message, text and packed number in `data`, and every node and end of a node.
    FileError when it is no ONNX protobuf, UnsafeFileError when it would become too much."""
    stack: list[tuple[Any, int, int]] = [(onnx.ModelProto.DESCRIPTOR, 0, len(data))]
    cost = nodes = steps = 0
    while stack:
        kind, start, end = stack.pop()
        known, is_node = _known(kind), kind.name == "NodeProto"
        nodes += is_node
        for number, wire, at, stop in fields(data, start, end):
            steps += 1
            what, child = known.get(number, ("", None)) if wire == MESSAGE else ("", None)
            if what == "message":
                stack.append((child, at, stop))
                cost += _MESSAGE
            elif what == "text":
                cost += _STRING
                nodes += is_node and number <= _ENDS
            elif what == "numbers":
                cost += _PER_VARINT * (stop - at)
            if cost + steps > _FLUSH:
                _flush(budget, cost, nodes, steps)
                cost = nodes = steps = 0
    _flush(budget, cost, nodes, steps)


def _flush(budget: Budget, cost: int, nodes: int, steps: int) -> None:
    budget.bytes(cost)
    budget.nodes(nodes)
    budget.steps(steps)


@cache
def _known(kind: Any) -> dict[int, _Kind]:
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
