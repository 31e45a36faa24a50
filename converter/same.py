"""Are two models the same network, whatever their tensors and nodes are called?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import onnx
from onnx import numpy_helper

from gkp.types import Array

_EMPTY = b""
"""Stands for an input that is left out."""


def same_network(one: onnx.ModelProto, other: onnx.ModelProto) -> bool:
    """Does every output of the one come from the same operators, attributes and constants as in the other? Names of graph
    inputs count, in the order of outputs; what no output needs does not. False also for what is not looked into (weights in
    files beside the model, control flow)."""
    digests = [_outputs(model) for model in (one, other)]
    return digests[0] is not None and digests[0] == digests[1]


def digest(model: onnx.ModelProto) -> bytes | None:
    """Equal for the same networks (see same_network) with inputs of the same types and shapes; None: cannot be told."""
    outputs = _outputs(model)
    ports = [value.type.SerializeToString(deterministic=True) for value in model.graph.input]
    return None if outputs is None else _digest(*outputs, *ports)


def _outputs(model: onnx.ModelProto) -> list[bytes] | None:
    """A digest of all that each output is computed from; None where a part is not looked into."""
    graph = model.graph
    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in graph.initializer):
        return None
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    known = {"": _EMPTY, **{i.name: _digest(b"input", i.name.encode()) for i in graph.input},
             **{name: _constant(value) for name, value in constants.items()}}
    for node in graph.node:
        if not set(node.input) <= known.keys() or any(a.g.node or a.graphs or a.sparse_tensor.dims for a in node.attribute):
            return None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            known[node.output[0]] = _constant(constants[node.output[0]])
            continue
        made = _digest(node.domain.encode(), node.op_type.encode(), *_attributes(node, constants),
                       *(known[name] for name in _inputs(node, constants)))
        known |= {name: _digest(made, str(place).encode()) for place, name in enumerate(node.output)}
    opsets = sorted((entry.domain or "", entry.version) for entry in model.opset_import)
    return [str(opsets).encode(), *(known.get(o.name, _EMPTY) for o in graph.output)]


def _inputs(node: onnx.NodeProto, constants: Mapping[str, Array]) -> list[str]:
    """Without a bias of zeros, and what is left out at the end."""
    names = list(node.input)
    if node.op_type == "Conv" and len(names) > 2 and names[2] in constants and not constants[names[2]].any():
        del names[2]
    while names and not names[-1]:
        del names[-1]
    return names


def _attributes(node: onnx.NodeProto, constants: Mapping[str, Array]) -> Iterator[bytes]:
    """In the order of their names; those of a convolution with the defaults that the file leaves out."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv" and len(node.input) > 1 and node.input[1] in constants:
        axes = constants[node.input[1]].ndim - 2
        if given.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID"):
            given.pop("auto_pad", None)
        given = {"kernel_shape": list(constants[node.input[1]].shape[2:]), "strides": [1] * axes, "pads": [0] * 2 * axes,
                 "dilations": [1] * axes, "group": 1, **given}
    for name in sorted(given):
        value = given[name]
        told = _constant(numpy_helper.to_array(value)) if isinstance(value, onnx.TensorProto) else repr(value).encode()
        yield _digest(name.encode(), told)


def _constant(value: Array) -> bytes:
    return _digest(str(value.dtype).encode(), str(value.shape).encode(), value.tobytes())


def _digest(*parts: bytes) -> bytes:
    """Of the parts, each with its length, so that no two lists of them read alike."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()
