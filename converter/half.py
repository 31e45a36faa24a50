"""--precision fp16: a float32 ONNX model in half precision, inputs and outputs left in float32."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gkp.errors import UnsupportedModelError

_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose float32 weights are float16, with a Cast behind each float input and in front of each float output.
    UnsupportedModelError when a weight overflows float16."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for tensor in out.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor)
            if value.size and np.abs(value).max() > _LARGEST:
                raise UnsupportedModelError(f"weight {tensor.name} does not fit into fp16", "use --precision fp32")
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), tensor.name))
    for node in out.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    first, last = [], []
    for value in out.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            _rename_reads(out, value.name, f"{value.name}_fp16")
            first.append(helper.make_node("Cast", [value.name], [f"{value.name}_fp16"], to=TensorProto.FLOAT16))
    for value in out.graph.output:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            for node in out.graph.node:
                for tensors in (node.output, node.input):
                    for k, name in enumerate(tensors):
                        if name == value.name:
                            tensors[k] = f"{value.name}_fp16"
            last.append(helper.make_node("Cast", [f"{value.name}_fp16"], [value.name], to=TensorProto.FLOAT))
    nodes = [*first, *out.graph.node, *last]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    del out.graph.value_info[:]
    return out


def _rename_reads(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name == old:
                node.input[k] = new
