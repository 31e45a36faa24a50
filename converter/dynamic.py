"""Static shapes in, dynamic axes out: the batch (and what the source left open) becomes symbolic again."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

BATCH = "batch"


def batch_axes(model: onnx.ModelProto) -> dict[str, dict[int, str]]:
    """Axis 0 of every input that has axes, as a dynamic axis."""
    return {value.name: {0: BATCH} for value in model.graph.input if value.type.tensor_type.shape.dim}


def free_axes(model: onnx.ModelProto, dynamic: Mapping[str, Mapping[int, str]]) -> onnx.ModelProto:
    """A copy of a model with static shapes in which the given input axes are symbolic.

    A Reshape to a constant shape that begins with the static batch copies the batch of its input instead (0). Shapes of
    outputs and intermediate tensors are left to the runtime. Whether the model still computes the same is for
    verification to show, which runs other batch sizes.
    """
    if not any(dynamic.values()):
        return model
    out = onnx.ModelProto()
    out.CopyFrom(model)
    batches = {v.type.tensor_type.shape.dim[0].dim_value for v in out.graph.input
               if 0 in dynamic.get(v.name, {}) and v.type.tensor_type.shape.dim}
    for value in out.graph.input:
        for axis, name in dynamic.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    if batches:
        _free_reshapes(out, batches)
        for value in out.graph.output:
            shape = value.type.tensor_type.shape
            if shape.dim and shape.dim[0].dim_value in batches:
                shape.dim[0].dim_param = next(iter(next(iter(dynamic.values())).values()))
    if any(axis > 0 for axes in dynamic.values() for axis in axes):
        for value in out.graph.output:
            for dim in value.type.tensor_type.shape.dim[0 if not batches else 1:]:
                dim.Clear()
    del out.graph.value_info[:]
    return out


def _free_reshapes(model: onnx.ModelProto, batches: set[int]) -> None:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "Reshape" and len(node.input) > 1:
            readers.setdefault(node.input[1], []).append(node)
    for tensor in model.graph.initializer:
        if tensor.name not in readers:
            continue
        target = numpy_helper.to_array(tensor).copy()
        if target.ndim == 1 and target.size and int(target[0]) in batches:
            target[0] = 0
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(target, np.int64), tensor.name))
            for node in readers[tensor.name]:
                _let_zero_copy(node)


def _let_zero_copy(reshape: onnx.NodeProto) -> None:
    """In place: a 0 in its shape is the input's axis, not an empty one (the newer PyTorch exporter says allowzero)."""
    kept = [a for a in reshape.attribute if a.name != "allowzero"]
    del reshape.attribute[:]
    reshape.attribute.extend(kept)
