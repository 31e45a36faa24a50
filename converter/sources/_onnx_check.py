"""What must hold of an ONNX model before anything reads it: names are text, tensors are what they declare, no subgraphs."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message

from gkp.converter.budget import Budget
from gkp.errors import FileError, UnsupportedModelError
from gkp.text import clean

_MAX_BYTES = 2**31 - 1
_MAX_AXES = 32
_HINT = "export the model again"
_BITS = {name: bits for bits, names in ((2, "UINT2 INT2"), (4, "UINT4 INT4 FLOAT4E2M1"), (6, "FLOAT6E2M3 FLOAT6E3M2"))
         for name in names.split()}
_FOREIGN = frozenset(v.number for v in onnx.TensorProto.DataType.DESCRIPTOR.values
                     if v.name in _BITS or v.name.startswith("FLOAT8"))
"""Types of numbers that neither numpy nor the passes compute with."""
_DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data", "raw_data")
_PLAIN = {"float_data": np.float32, "double_data": np.float64, "int64_data": np.int64}
_VALUES = {kind: field for kind, field in (
    ("FLOAT", "f"), ("INT", "i"), ("STRING", "s"), ("TENSOR", "t"), ("SPARSE_TENSOR", "sparse_tensor"), ("TYPE_PROTO", "tp"),
    ("FLOATS", "floats"), ("INTS", "ints"), ("STRINGS", "strings"), ("TENSORS", "tensors"),
    ("SPARSE_TENSORS", "sparse_tensors"), ("TYPE_PROTOS", "type_protos"))}
_NUMBER = 40
"""Bytes of a number as an object of Python's."""
_FEW = 64 << 10


def structure(model: onnx.ModelProto, budget: Budget) -> None:
    """Names, attributes, subgraphs. FileError or UnsupportedModelError with what is wrong."""
    model.ClearField("training_info")
    for node in _nodes(model):
        if any(a.HasField("g") or a.graphs or a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            raise UnsupportedModelError(f"operator {clean(node.op_type)} holds a subgraph (control flow)",
                                        "export the model without If, Loop and Scan")
    for message, in_function in _messages(model):
        if isinstance(message, onnx.AttributeProto):
            _attribute(message, in_function, budget)
    if any(not t.name for t in model.graph.initializer):
        raise FileError("the ONNX model holds an initialiser without a name", _HINT)


def tensors(model: onnx.ModelProto) -> list[tuple[onnx.TensorProto, int]]:
    """All tensors, wherever they are, each with the bytes that it declares. FileError for impossible shapes and types."""
    found = [m for m, _ in _messages(model) if isinstance(m, onnx.TensorProto)]
    return [(tensor, _declared(tensor)) for tensor in found]


def types(model: onnx.ModelProto, given: list[tuple[onnx.TensorProto, int]]) -> None:
    """UnsupportedModelError, by name, for what is of 4 bits, of float8 or the like."""
    graph = model.graph
    found = [(t.name, t.data_type) for t, _ in given]
    found += [(v.name, v.type.tensor_type.elem_type) for v in (*graph.input, *graph.value_info, *graph.output)]
    found += [(n.name, a.i) for n in _nodes(model) for a in n.attribute if a.name in ("to", "dtype", "output_dtype")]
    for name, kind in found:
        if kind in _FOREIGN:
            word = onnx.TensorProto.DataType.Name(kind).lower()
            raise UnsupportedModelError(f"{clean(name) or 'a constant'} is of {word}",
                                        "gkp takes models that are quantised to int8 or uint8")


def contents(model: onnx.ModelProto, given: list[tuple[onnx.TensorProto, int]], budget: Budget) -> None:
    """Do the tensors hold what they declare? FileError when not. Numbers that are stored one by one are packed."""
    for tensor, declared in given:
        fields = [name for name in _DATA if len(getattr(tensor, name))]
        if tensor.HasField("segment"):
            raise FileError(f"tensor {clean(tensor.name)} is stored in segments", _HINT)
        if fields in ([], ["raw_data"]):
            held = len(tensor.raw_data)
            if held != declared:
                raise FileError(f"tensor {clean(tensor.name)} declares {declared} bytes but holds {held}", _HINT)
        elif len(fields) > 1:
            raise FileError(f"tensor {clean(tensor.name)} holds its numbers twice", _HINT)
        else:
            _typed(tensor, fields[0], budget)
    for sparse in (m for m, _ in _messages(model) if isinstance(m, onnx.SparseTensorProto)):
        budget.bytes(2 * _bytes(sparse.values.data_type, list(sparse.dims), sparse.values.name))


def _typed(tensor: onnx.TensorProto, field: str, budget: Budget) -> None:
    count, kind = len(getattr(tensor, field)), onnx.TensorProto.DataType.Name(tensor.data_type)
    want = prod(tensor.dims)
    if kind in _BITS:
        want = -(-want * _BITS[kind] // 8)
    elif kind.startswith("COMPLEX"):
        want *= 2
    if count != want or field != onnx.helper.tensor_dtype_to_field(tensor.data_type):
        raise FileError(f"tensor {clean(tensor.name)} declares {want} numbers but holds {count} as {field}", _HINT)
    if field in _PLAIN and kind in ("FLOAT", "DOUBLE", "INT64") and count * 8 > _FEW:
        plain = np.dtype(_PLAIN[field])
        budget.bytes(2 * count * plain.itemsize)
        tensor.raw_data = np.fromiter(getattr(tensor, field), plain, count).astype(plain.newbyteorder("<")).tobytes()
        tensor.ClearField(field)
    else:
        budget.bytes(_NUMBER * count)


def _declared(tensor: onnx.TensorProto) -> int:
    if len(tensor.dims) > _MAX_AXES or any(d < 0 for d in tensor.dims):
        raise FileError(f"tensor {clean(tensor.name)} declares an impossible shape", _HINT)
    return _bytes(tensor.data_type, list(tensor.dims), tensor.name)


def _bytes(data_type: int, dims: list[int], name: str) -> int:
    try:
        kind = onnx.TensorProto.DataType.Name(data_type)
        bits = _BITS.get(kind) or 8 * onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize
    except (KeyError, ValueError, TypeError) as e:
        raise FileError(f"tensor {clean(name)} has an unknown type", _HINT) from e
    size = -(-prod(max(0, d) for d in dims) * bits // 8)
    if size > _MAX_BYTES or len(dims) > _MAX_AXES:
        raise FileError(f"tensor {clean(name)} declares an impossible shape", _HINT)
    return size


def _attribute(attribute: onnx.AttributeProto, in_function: bool, budget: Budget) -> None:
    if attribute.ref_attr_name:
        if not in_function:
            raise FileError(f"attribute {clean(attribute.name)} refers to one of a function, but is in none", _HINT)
        return
    kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
    held = {f.name for f, _ in attribute.ListFields()} - {"name", "type", "doc_string", "ref_attr_name"}
    if kind not in _VALUES or not held <= {_VALUES[kind]}:
        raise FileError(f"attribute {clean(attribute.name)} holds something else than its type says", _HINT)
    if kind.endswith("S") and not held and not attribute.name.startswith("value_"):  # value_ints: an empty constant
        raise FileError(f"attribute {clean(attribute.name)} is an empty list", _HINT)
    budget.bytes(_NUMBER * (len(attribute.ints) + len(attribute.floats) + len(attribute.strings)))


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _messages(model: onnx.ModelProto) -> Iterator[tuple[Any, bool]]:
    """Every message below the model, and whether it is in a function. FileError for names that are not UTF-8: the protobuf
    library gives them as bytes."""
    stack: list[tuple[Any, bool]] = [(model, False)]
    while stack:
        message, in_function = stack.pop()
        yield message, in_function
        if isinstance(message, onnx.TensorProto):  # its data are large, and looked at elsewhere
            _text(message.name, message.doc_string)
            stack += [(m, in_function) for m in (*message.external_data, *message.metadata_props)]
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                below = in_function or isinstance(message, onnx.FunctionProto)
                stack += [(m, below) for m in ([value] if isinstance(value, Message) else value)]
            elif field.type == field.TYPE_STRING:
                _text(*([value] if isinstance(value, str | bytes) else value))


def _text(*names: str | bytes) -> None:
    if any(isinstance(name, bytes) for name in names):
        raise FileError("the ONNX model holds a name that is not UTF-8", _HINT)
