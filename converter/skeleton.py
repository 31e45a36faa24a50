"""An ONNX model without its large weights, for what looks at structure only: the checker, shape inference, the version
converter. Each of them would copy all weights several times; they read values of small constants (shapes, axes) alone."""

from __future__ import annotations

import onnx
from google.protobuf.message import Message

from gkp.errors import FileError
from gkp.text import first_line

SMALL = 16 << 10
"""Bytes of a constant that may be a shape, an index or a scale."""
ERRORS = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError,
          KeyError, IndexError, OverflowError, AttributeError)
"""What the onnx package raises for a malformed model."""


def is_large(tensor: onnx.TensorProto) -> bool:
    """Is it left out?"""
    return int(tensor.ByteSize()) > SMALL


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large initialisers are inputs of the graph."""
    out = onnx.ModelProto()
    _copy_fields(model, out, without="graph")
    _copy_fields(model.graph, out.graph, without="initializer")
    listed = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if not is_large(tensor):
            out.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            out.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return out


def put_back(structure: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """The inverse, in place: `model` gets all of `structure`, made of its skeleton, and keeps its large weights."""
    large = {t.name for t in model.graph.initializer if is_large(t)}
    for place in reversed(range(len(model.graph.initializer))):
        if not is_large(model.graph.initializer[place]):
            del model.graph.initializer[place]
    for message in (model, model.graph):
        for field, _ in message.ListFields():
            if field.name not in ("graph", "initializer"):
                message.ClearField(field.name)
    _copy_fields(structure, model, without="graph")
    _copy_fields(structure.graph, model.graph, without="input")
    model.graph.input.extend(i for i in structure.graph.input if i.name not in large)


_SHAPELESS = ("GroupNormalization", "MeanVarianceNormalization")
"""They give the shape that they get, and onnx.shape_inference does not know it."""


def inferred(structure: onnx.ModelProto) -> onnx.ModelProto:
    """A skeleton with the shapes that onnx.shape_inference finds; its nodes may be others then. FileError when it is
    malformed."""
    for node in structure.graph.node:
        if node.op_type in _SHAPELESS and node.domain in ("", "ai.onnx"):
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output[:1]))
    try:
        return onnx.shape_inference.infer_shapes(structure)
    except ERRORS as e:
        raise FileError(f"the ONNX graph is malformed: {first_line(e, 200)}", "check it with onnx.checker") from e


def _copy_fields(source: onnx.ModelProto | onnx.GraphProto, target: onnx.ModelProto | onnx.GraphProto, without: str) -> None:
    for field, value in source.ListFields():
        if field.name == without:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, str | bytes | int | float):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)
