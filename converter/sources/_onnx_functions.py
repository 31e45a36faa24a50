"""How large a model is once its functions are expanded, computed before anything expands them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from gkp.converter.budget import Budget
from gkp.errors import FileError, UnsafeFileError
from gkp.text import clean

_Key = tuple[str, str, str]
_MAX_DEPTH = 32
_COPIES = 4
"""The expanded model exists in the onnx package and in protobuf, as text and as objects."""
_SUFFIX = 16
"""Characters that the expansion appends to a name for each level."""


@dataclass(frozen=True)
class _Size:
    """nodes: with their ends; data: bytes of attributes; ends: inputs, outputs and names; depth: of calls."""

    nodes: int = 0
    data: int = 0
    ends: int = 0
    depth: int = 0

    def __add__(self, other: _Size) -> _Size:
        return _Size(self.nodes + other.nodes, self.data + other.data, self.ends + other.ends, max(self.depth, other.depth))


def drop_unused(model: onnx.ModelProto) -> None:
    """Take out the functions that nothing calls."""
    functions = _table(model)
    used: set[_Key] = set()
    left = [key for node in model.graph.node if (key := _key(node)) in functions]
    while left:
        key = left.pop()
        if key not in used:
            used.add(key)
            left += [called for node in functions[key].node if (called := _key(node)) in functions]
    for place in reversed(range(len(model.functions))):
        if _key(model.functions[place]) not in used:
            del model.functions[place]


def charge(model: onnx.ModelProto, budget: Budget) -> None:
    """Charge what the expansion makes. FileError when functions call themselves or have one name; UnsafeFileError when they
    are nested without measure."""
    functions = _table(model)
    if len(functions) != len(model.functions):
        raise FileError("the ONNX model defines a function twice", "export the model again")
    if not functions:
        return
    longest = max((len(name) for nodes in _bodies(model) for node in nodes
                   for name in (*node.input, *node.output, node.name)), default=0)
    given = max([a.ByteSize() for nodes in _bodies(model) for n in nodes if _key(n) in functions for a in n.attribute]
                + [a.ByteSize() for f in model.functions for a in f.attribute_proto], default=0)
    sizes: dict[_Key, _Size] = {}
    total = sum((_node_size(n, functions, sizes, given, ()) for n in model.graph.node), _Size())
    budget.nodes(total.nodes)
    budget.characters(total.ends * (longest + _SUFFIX * total.depth))
    budget.bytes(_COPIES * total.data)


def _node_size(node: onnx.NodeProto, functions: dict[_Key, onnx.FunctionProto], sizes: dict[_Key, _Size], given: int,
               above: tuple[_Key, ...]) -> _Size:
    key = _key(node)
    if key not in functions:
        ends = len(node.input) + len(node.output) + 1
        data = sum(given if a.ref_attr_name else a.ByteSize() for a in node.attribute)
        return _Size(1 + ends, data, ends, 1)
    if key in above:
        raise FileError(f"function {clean(node.op_type)} of the ONNX model calls itself", "export the model again")
    if len(above) >= _MAX_DEPTH:
        raise _too_deep()
    if key not in sizes:
        inner = sum((_node_size(n, functions, sizes, given, (*above, key)) for n in functions[key].node), _Size())
        sizes[key] = _Size(inner.nodes, inner.data, inner.ends, inner.depth + 1)
    if sizes[key].depth > _MAX_DEPTH:
        raise _too_deep()
    return sizes[key]


def _too_deep() -> UnsafeFileError:
    return UnsafeFileError(f"functions of the ONNX model are nested over {_MAX_DEPTH} deep", "export it without functions")


def _table(model: onnx.ModelProto) -> dict[_Key, onnx.FunctionProto]:
    return {_key(f): f for f in model.functions}


def _key(what: onnx.NodeProto | onnx.FunctionProto) -> _Key:
    """How a call finds its function."""
    name = what.op_type if isinstance(what, onnx.NodeProto) else what.name
    return what.domain if what.domain != "ai.onnx" else "", name, what.overload


def _bodies(model: onnx.ModelProto) -> Iterator[list[onnx.NodeProto]]:
    yield list(model.graph.node)
    yield from (list(f.node) for f in model.functions)
