"""What TensorRT's parser lets pass: it takes garbage and indices out of range, and builds engines from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from gkp.errors import FileError, UnsafeFileError, UnsupportedModelError
from gkp.text import clean, one_line

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_LARGEST = (2 << 30) - 1
_AGAIN = "convert the checkpoint again; if it was an ONNX file, check how it was made"
Dims = list["int | None"]


def check_model(model: onnx.ModelProto) -> None:
    """FileError when the model is not valid ONNX or too large, UnsafeFileError when its weights lie in other files,
    UnsupportedModelError when an index, axis or size is out of range."""
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise UnsafeFileError(f"the weights of {tensor.name!r} lie in another file",
                                  "save the model with its weights inside")
    if model.ByteSize() > _LARGEST:
        raise FileError("the model is over 2 GiB, which ONNX cannot hold in one file", "convert a smaller model")
    if not model.graph.node:
        raise FileError("the ONNX model holds no operators", _AGAIN)
    if not all(isinstance(name, str) for name in _names(model.graph)):  # protobuf gives bytes for what is not UTF-8
        raise FileError("the ONNX model is not valid: a name in it is not text", _AGAIN)
    try:
        onnx.checker.check_model(model)
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)  # what full_check adds
    except (onnx.checker.ValidationError, shape_inference.InferenceError, ValueError, RuntimeError) as e:
        raise FileError(f"the ONNX model is not valid: {one_line(e, 200)}", _AGAIN) from e
    _Bounds(inferred).check()


def _names(graph: onnx.GraphProto) -> Iterator[object]:
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
    yield from (entry.name for entry in [*graph.input, *graph.output, *graph.initializer])


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that holds data: weights and attributes, also of nested graphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] if attribute.HasField("t") else []
            yield from attribute.tensors
            for nested in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _tensors(nested)


class _Bounds:
    """Constant indices, axes and sizes against the inferred shapes. What is not known before the model runs is left."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and (value := _constant(node)) is not None:
                self.constants[node.output[0]] = value
        self.shapes: dict[str, Dims] = {name: list(t.dims) for name, t in self.constants.items()}
        for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]:
            if value.type.tensor_type.HasField("shape"):
                self.shapes.setdefault(value.name, [d.dim_value if d.HasField("dim_value") else None
                                                    for d in value.type.tensor_type.shape.dim])
        self.images = {v.name for v in [*model.graph.value_info, *model.graph.output]
                       if v.type.tensor_type.elem_type in _FLOATS}

    def check(self) -> None:
        rules: dict[str, Callable[[onnx.NodeProto], None]] = {
            "Gather": self._gather, "GatherElements": self._gather, "Slice": self._slice, "Split": self._split,
            "Conv": self._conv, "Transpose": self._transpose}
        for node in self.graph.node:
            if node.domain in ("", "ai.onnx") and node.op_type in rules:
                rules[node.op_type](node)
            for name in node.output:
                if name in self.images and 0 in self.shapes.get(name, []):
                    self._fail(node, f"its output {name!r} has no elements")

    def _fail(self, node: onnx.NodeProto, what: str) -> None:
        raise UnsupportedModelError(f"{node.op_type} {clean(node.name or node.output[0])}: {what}", _AGAIN)

    def _values(self, node: onnx.NodeProto, position: int) -> np.ndarray[Any, Any] | None:
        """A constant input, or None."""
        tensor = self.constants.get(node.input[position]) if position < len(node.input) else None
        return None if tensor is None else np.atleast_1d(numpy_helper.to_array(tensor))

    def _shape(self, node: onnx.NodeProto, position: int = 0) -> Dims | None:
        return self.shapes.get(node.input[position]) if position < len(node.input) else None

    def _size(self, node: onnx.NodeProto, axis: int) -> int | None:
        """Length of an axis of the first input, or None; the axis itself must exist."""
        shape = self._shape(node)
        if shape is None:
            return None
        if not -len(shape) <= axis < len(shape):
            self._fail(node, f"axis {axis} of an input with {len(shape)} axes")
        return shape[axis]

    def _gather(self, node: onnx.NodeProto) -> None:
        axis = _integer(node, "axis", 0)
        size, indices = self._size(node, axis), self._values(node, 1)
        if size is None or indices is None:
            return
        outside = indices[(indices < -size) | (indices >= size)]
        if outside.size:
            self._fail(node, f"index {outside.flat[0]} is out of range for axis {axis} with {size} elements")

    def _slice(self, node: onnx.NodeProto) -> None:
        axes, steps = self._values(node, 3), self._values(node, 4)
        for axis in [] if axes is None else axes.tolist():
            self._size(node, axis)
        if steps is not None and (steps == 0).any():
            self._fail(node, "a step of 0")

    def _split(self, node: onnx.NodeProto) -> None:
        axis = _integer(node, "axis", 0)
        size, sizes = self._size(node, axis), self._values(node, 1)
        if size is not None and sizes is not None and (sizes.sum() != size or (sizes < 0).any()):
            self._fail(node, f"parts of {sizes.sum()} elements from axis {axis} with {size}")

    def _transpose(self, node: onnx.NodeProto) -> None:
        shape = self._shape(node)
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if shape is not None and order is not None and sorted(order) != list(range(len(shape))):
            self._fail(node, f"{order} is no order of {len(shape)} axes")

    def _conv(self, node: onnx.NodeProto) -> None:
        group = _integer(node, "group", 1)
        x, w, b = self._shape(node), self._shape(node, 1), self._shape(node, 2) if len(node.input) > 2 else None
        if w is None or len(w) < 3 or None in w[:2]:
            return
        outputs, per_group = int(w[0] or 0), int(w[1] or 0)
        if group < 1 or outputs % group:
            self._fail(node, f"{outputs} output channels in {group} groups")
        if x is not None and len(x) == len(w) and x[1] is not None and x[1] != per_group * group:
            self._fail(node, f"{x[1]} input channels, its weights read {group} groups of {per_group}")
        if b is not None and b != [outputs]:
            self._fail(node, f"{outputs} output channels, a bias of shape {b}")


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node; None for the kinds that can be no index."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in ("value_int", "value_ints"):
            value = np.array(onnx.helper.get_attribute_value(attribute), np.int64)
            return numpy_helper.from_array(value, node.output[0])
    return None


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)

