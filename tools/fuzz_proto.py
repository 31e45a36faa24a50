"""ONNX models that are networks for the most part, with a few places where the format allows what networks do not need.

`model` builds a small network of random layers and sabotages it: functions that call functions, subgraphs, tensors where
attributes may have them, weights in other files, constants that grow when they are computed, names, shapes, opsets.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import fuzz_quantised
import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

SIZES = (0, 1, 2, 3, 64, 1000, 2**16, 2**20, 2**24, 2**28, 2**31 - 1, 2**31, 2**40, 2**62)
NAMES = ("", "x", "y", "h0", "\x1b[31m", "a\nb", "../x", "\u202e", "x" * 5000, "\0", "<script>", "w", "\U0001f600", "A.b:0")
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "gkp", "local", "com.microsoft", "\x1b[31m", "x" * 3000)
ATTRIBUTES = ("pads", "strides", "dilations", "kernel_shape", "group", "axis", "axes", "perm", "transB", "epsilon",
              "keepdims", "training_mode", "ceil_mode", "auto_pad", "alpha", "allowzero", "batch_dims")
TYPES = (*range(26), 100, -1)


class Net:
    """A model under construction. file: its name, in which external data may lie, too."""

    def __init__(self, rng: Random, file: str) -> None:
        self.rng, self.file = rng, file
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        rng = np.random.default_rng(self.rng.randrange(2**32))
        return self.constant(rng.standard_normal(shape), np.float32)

    def add(self, operator: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> str:
        """A node; its (first) output."""
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, domain=domain, **attributes))
        return names[0]


def model(rng: Random, file: str) -> bytes:
    """The file, of a few kB (a few of them have more nodes)."""
    net = Net(rng, file)
    height = rng.choice((1, 4, 7))
    x, channels = "x", 4
    places = [x]
    for _ in range(rng.randrange(1, 6)):
        x, channels = _layer(net, x, channels, height)
        places.append(x)
    sabotages = [rng.choice(SABOTAGES) for _ in range(rng.choice((0, 1, 1, 1, 2, 4)))]
    for sabotage in [s for s in sabotages if s in BEFORE]:
        x = sabotage(net, x)
    y = net.add("Gemm", net.add("Flatten", net.add("GlobalAveragePool", x)), net.weight(channels, 3))
    opset = rng.choice((13, 17, 17, 18, 18, 21, 21) if rng.random() < 0.97 else (1, 9, 11, 12))
    made = helper.make_model(
        helper.make_graph(net.nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, height, height])],
                          [helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 3])], net.constants),
        functions=net.functions, ir_version=rng.choice((*(8,) * 30, 10, 3)),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("local", 1)])
    for sabotage in [s for s in sabotages if s in AFTER]:
        sabotage(net, made)
    return bytes(made.SerializeToString()) + (_wire(rng) if rng.random() < 0.03 else b"")


def _wire(rng: Random) -> bytes:
    """A graph within a graph ..., deeper than the protobuf library writes them."""
    data = b""
    for _ in range(rng.choice((20, 40, 3000))):
        for tag in (0x32, 0x2A, 0x0A):  # g of an attribute, of a node, of a graph
            data = bytes([tag]) + _varint(len(data)) + data
    return b"\x3a" + _varint(len(data)) + data


def _varint(n: int) -> bytes:
    return (bytes([n & 127 | 128]) + _varint(n >> 7)) if n > 127 else bytes([n])


def _layer(net: Net, x: str, channels: int, height: int) -> tuple[str, int]:
    rng, kind = net.rng, net.rng.randrange(8)
    if kind > 5:
        return fuzz_quantised.layer(net, x, channels)
    if kind == 0:
        out = rng.choice((4, 8))
        return net.add("Conv", x, net.weight(out, channels // 2, 3, 3), group=2, pads=[1] * 4), out
    if kind == 1:
        out = rng.choice((4, 8))
        return net.add("Relu", net.add("Conv", x, net.weight(out, channels, 1, 1))), out
    if kind == 2:
        return net.add("BatchNormalization", x, *(net.constant(np.ones(channels), np.float32) for _ in range(4))), channels
    if kind == 3:
        return net.add("Gather", x, net.constant(rng.sample(range(channels), channels)), axis=1), channels
    if kind == 4:
        return net.add("Add", x, x), channels
    a = net.add("Slice", x, net.constant([0]), net.constant([channels // 2]), net.constant([1]))
    b = net.add("Slice", x, net.constant([channels // 2]), net.constant([channels]), net.constant([1]))
    return net.add("Concat", b, a, axis=1), channels


# ---- in the network ----------------------------------------------------------------------------------------------------
def _joined(net: Net, x: str, constant: str) -> str:
    """Add a computed constant of any shape: as it is, or its mean."""
    if net.rng.random() < 0.3:
        return net.add("Add", x, constant)
    return net.add("Add", x, net.add("ReduceMax", constant, keepdims=0))


def _grown(net: Net, x: str) -> str:
    """A constant that is computed from little: one operator, or several in a row."""
    rng = net.rng
    size = rng.choice(SIZES)
    value = net.constant(np.ones((1, 2)), np.float32)
    for _ in range(rng.choice((1, 1, 2, 30))):
        kind = rng.randrange(12)
        if kind == 0:
            value = net.add("ConstantOfShape", net.constant([size] * rng.choice((1, 2, 5))))
        elif kind == 1:
            value = net.add("Tile", value, net.constant([rng.choice((2, size)), 2]))
        elif kind == 2:
            value = net.add("Expand", value, net.constant([size, 2]))
        elif kind == 3:
            value = net.add("Concat", *[value] * rng.choice((2, 10, 300)), axis=rng.choice((0, 1)))
        elif kind == 4:
            whole = net.add("Range", net.constant(0), net.constant(size), net.constant(rng.choice((1, 1, 0, -1))))
            value = net.add("Cast", whole, to=TensorProto.FLOAT)
        elif kind == 5:
            value = net.add("Pad", value, net.constant([0, 0, rng.choice((size, -size)), rng.choice((1, size))]))
        elif kind == 6:
            value = net.add("Resize", value, "", net.constant([float(size), 1.0], np.float32))
        elif kind == 7:
            value = net.add("OneHot", net.constant([0] * 64), net.constant(size), net.constant([0, 1], np.float32))
        elif kind == 8:
            value = net.add("Gather", value, net.constant(np.zeros((rng.choice((1, 3000)), 2))))
        elif kind == 9:
            value = net.add("MatMul", net.add("Transpose", value, perm=[1, 0]), value)
        elif kind == 10:
            value = net.add("Reshape", value, net.constant([-1, rng.choice((1, 2, 0, -1, size))]))
        else:
            value = net.add(rng.choice(("Unsqueeze", "Squeeze")), value, net.constant([rng.choice((0, 1, -1, 5))]))
    return _joined(net, x, value)


def _many_constants(net: Net, x: str) -> str:
    """Many of some size, each of them small enough."""
    shape = net.constant([net.rng.choice((2**10, 2**18, 2**22))])
    for _ in range(net.rng.choice((10, 100, 500))):
        x = _joined(net, x, net.add("ConstantOfShape", shape))
    return x


def _called(net: Net, x: str) -> str:
    """Functions that call functions: deep, wide, in a circle, with one name, with attributes that refer to theirs."""
    rng = net.rng
    levels, width = rng.choice(((1, 1), (1, 2000), (3, 3), (25, 2), (40, 1), (12, 8)))
    for level in range(levels):
        inner = [helper.make_node("Relu" if level == 0 else f"F{level - 1}", [f"a{k}"], [f"a{k + 1}"],
                                  domain="" if level == 0 else "local") for k in range(width)]
        if rng.random() < 0.1:
            inner.append(helper.make_node(rng.choice(("F0", f"F{level}", "F99", "If", "Relu")), ["a0"], ["b"],
                                          domain=rng.choice(("local", ""))))
        if rng.random() < 0.2:
            node = helper.make_node("Constant", [], ["c"])
            node.attribute.add(name="value", type=AttributeProto.TENSOR, ref_attr_name=rng.choice(("value", "nothing", "")))
            inner.append(node)
        net.functions.append(helper.make_function(
            "local", f"F{level}" if rng.random() < 0.99 else rng.choice(("F0", "Relu")), ["a0"], [f"a{width}"], inner,
            [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)], attributes=["value"] * rng.randrange(2)))
    return net.add(f"F{levels - 1}", x, domain="local")


def _subgraph(net: Net, x: str) -> str:
    """If, Loop, Scan; or any node with graphs in its attributes, and graphs in those."""
    rng = net.rng
    inner = onnx.GraphProto(name="inner")
    for _ in range(rng.choice((1, 2, 15))):
        node = helper.make_node(rng.choice(("If", "Relu", "Constant")), [], ["z"])
        node.attribute.add(name=rng.choice(("then_branch", "body", "value")), type=AttributeProto.GRAPH).g.CopyFrom(inner)
        inner = helper.make_graph([node], "inner", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1])],
                                  [_tensor(net, "t")] if rng.random() < 0.3 else [])
    node = helper.make_node(rng.choice(("If", "Loop", "Scan", "Conv", "F")), [x], [y := net.name()])
    attribute = node.attribute.add(name=rng.choice(("then_branch", "else_branch", "body", "x")), type=AttributeProto.GRAPH)
    attribute.g.CopyFrom(inner)
    if rng.random() < 0.3:
        attribute.type = AttributeProto.GRAPHS
        attribute.graphs.append(inner)
    net.nodes.append(node)
    return y


def _attributes(net: Net, x: str) -> str:
    """A node with a tensor, many tensors, a type, ... in an attribute, of which it may be one or not."""
    rng = net.rng
    node = helper.make_node(rng.choice(("Relu", "Constant", "Conv", "ConstantOfShape", "Frob")), [x], [y := net.name()])
    attribute = node.attribute.add(name=rng.choice(("value", "sparse_value", "value_ints", "group", "x", "")))
    attribute.type = rng.choice((*range(1, 15), rng.choice((0, 1, 4))))
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.choice((0, 0, *range(9)))
        if kind == 0:
            attribute.t.CopyFrom(_tensor(net, "t"))
        elif kind == 1:
            attribute.tensors.extend(_tensor(net, "t") for _ in range(rng.choice((1, 300))))
        elif kind == 2:
            attribute.sparse_tensor.CopyFrom(_sparse(net))
        elif kind == 3:
            attribute.sparse_tensors.extend(_sparse(net) for _ in range(3))
        elif kind == 4:
            _deep_type(attribute.tp, rng.choice((1, 5, 30)))
        elif kind == 5:
            _deep_type(attribute.type_protos.add(), 3)
        elif kind == 6:
            attribute.ints.extend([rng.choice(SIZES)] * rng.choice((1, 10_000)))
        elif kind == 7:
            attribute.strings.extend([b"s" * rng.choice((0, 10, 10_000))] * 5)
        else:
            attribute.ref_attr_name = rng.choice(("value", "x", "\x1b"))
    net.nodes.append(node)
    return y if rng.random() < 0.5 else x


def _deep_type(type_proto: onnx.TypeProto, depth: int) -> None:
    for _ in range(depth):
        type_proto = type_proto.sequence_type.elem_type
    type_proto.tensor_type.elem_type = TensorProto.FLOAT


def _tensor(net: Net, name: str) -> onnx.TensorProto:
    """A tensor: honest, with another type, shape or field of data, or in another file."""
    rng = net.rng
    tensor = numpy_helper.from_array(np.ones((2, 2), np.float32), name)
    kind = rng.choice((*range(7), 5, 5))
    if kind == 0:
        tensor.data_type = rng.choice(TYPES)
    elif kind == 1:
        del tensor.dims[:]
        tensor.dims.extend(rng.choice((-1, *SIZES)) for _ in range(rng.choice((0, 1, 2, 40))))
    elif kind == 2:
        tensor.ClearField("raw_data")
        field = rng.choice(("float_data", "int32_data", "int64_data", "double_data", "uint64_data"))
        getattr(tensor, field).extend([1] * rng.choice((1, 4, 5000)))
    elif kind == 3:
        tensor.string_data.extend([b"s"] * 4)
    elif kind == 4:
        tensor.segment.begin, tensor.segment.end = 0, rng.choice(SIZES[:9])
    elif kind == 5:
        _outside(net, tensor)
    return tensor


def _outside(net: Net, tensor: onnx.TensorProto) -> None:
    rng = net.rng
    tensor.data_location = TensorProto.EXTERNAL
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")
    places = (*[net.file] * 3, f"./{net.file}", f"x/../{net.file}", "../x", "/etc/passwd", "", ".", "\0", "x" * 5000,
              "/dev/zero", f"{net.file}/x", f"{net.file}\0")
    for key, values in (("location", places), ("offset", ("0", "1", "-1", "9" * 30, "x", "0x10", "1e3", "\u0661")),
                        ("length", ("16", "0", "-1", "9" * 5000, "")), ("checksum", ("x",)), ("location", places)):
        if rng.random() < (0.95 if values is places and not tensor.external_data else 0.4 if values is not places else 0.1):
            tensor.external_data.add(key=key, value=rng.choice(values))


def _sparse(net: Net) -> onnx.SparseTensorProto:
    rng = net.rng
    sparse = onnx.SparseTensorProto(dims=[rng.choice(SIZES) for _ in range(rng.randrange(3))])
    sparse.values.CopyFrom(_tensor(net, rng.choice(NAMES)))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array([0, rng.choice((1, -1, 2**40))], np.int64), "i"))
    return sparse


# ---- in the file -------------------------------------------------------------------------------------------------------
def _initializers(net: Net, made: onnx.ModelProto) -> None:
    rng, graph = net.rng, made.graph
    kind = rng.randrange(5)
    if kind == 0:
        graph.initializer.append(_tensor(net, rng.choice(NAMES)))
    elif kind == 1 and graph.initializer:
        _outside(net, rng.choice(graph.initializer))
    elif kind == 2:
        graph.sparse_initializer.append(_sparse(net))
    elif kind == 3 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        tensor.CopyFrom(_tensor(net, tensor.name))
    else:  # many of them in one place of one file
        for k in range(rng.choice((10, 1000))):
            tensor = graph.initializer.add(name=f"e{k}", data_type=TensorProto.UINT8, dims=[200])
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=net.file)
            tensor.external_data.add(key="length", value="200")


def _misfits(net: Net, made: onnx.ModelProto) -> None:
    """Honest tensors of another shape or type than their operators take, or attributes of another length."""
    rng, graph = net.rng, made.graph
    for _ in range(rng.choice((1, 1, 2, 4))):
        if graph.initializer and rng.random() < 0.7:
            tensor = rng.choice(graph.initializer)
            if tensor.data_location == TensorProto.EXTERNAL:
                continue
            try:
                array = numpy_helper.to_array(tensor)
            except (ValueError, TypeError, KeyError):  # it was not honest
                continue
            rows = array.reshape(len(array) if array.ndim and array.size else 1, -1)
            shapes = rows, array.reshape(-1), array[None], array[..., None], array.T, rows[:1], rows[:0], np.repeat(array, 2)
            others = array.sum(), np.float64(array), np.float16(array), array * np.float32("nan")
            other = rng.choice((*shapes, *others))
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(other), tensor.name))
        else:
            node = rng.choice(graph.node)
            name = rng.choice(ATTRIBUTES)
            for place in [k for k, a in enumerate(node.attribute) if a.name == name]:
                del node.attribute[place]
            value: Any = rng.choice((0, 1, 2, -1, 7, 2**40, [], [0], [1, 2], [1] * 4, [-1] * 4, [2**40] * 2, 0.5, "VALID"))
            node.attribute.append(helper.make_attribute(name, value, attr_type=AttributeProto.INTS if value == [] else None))


def _shapes(net: Net, made: onnx.ModelProto) -> None:
    """Sizes of inputs, outputs and values: huge, negative, symbolic, missing."""
    rng, graph = net.rng, made.graph
    value = rng.choice((*graph.input, *graph.output, graph.value_info.add(name=rng.choice(("v1", "v2", "v3", *NAMES)))))
    shape = value.type.tensor_type.shape
    kind = rng.randrange(5)
    if kind == 0 and shape.dim:
        rng.choice(shape.dim).dim_value = rng.choice((-1, *SIZES[:7], *SIZES[-3:]))  # others may be honest
    elif kind == 1 and shape.dim:
        rng.choice(shape.dim).dim_param = rng.choice(NAMES)
    elif kind == 2:
        del shape.dim[:]
        sizes = [rng.choice(SIZES[:5]) for _ in range(rng.choice((0, 3, 5, 70)))]
        shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=size) for size in sizes)
    elif kind == 3:
        value.type.tensor_type.elem_type = rng.choice(TYPES)
    else:
        value.type.Clear()
        _deep_type(value.type, rng.choice((0, 1, 40)))


def _wires(net: Net, made: onnx.ModelProto) -> None:
    """Names given twice, circles, ends that lead nowhere, nodes that are not in order."""
    rng, graph = net.rng, made.graph
    names = [name for node in graph.node for name in (*node.input, *node.output)] + list(NAMES)
    for _ in range(rng.choice((1, 1, 3))):
        node = rng.choice(graph.node)
        ends = rng.choice((node.input, node.output, graph.input, graph.initializer, graph.output))
        if not ends:
            ends.append(rng.choice(names)) if ends in (node.input, node.output) else None
        elif isinstance(ends[0], str):
            ends[rng.randrange(len(ends))] = rng.choice(names)
        else:
            rng.choice(ends).name = rng.choice(names)
    if rng.random() < 0.2:
        order = rng.sample(list(graph.node), len(graph.node))
        del graph.node[:]
        graph.node.extend(order)


def _words(net: Net, made: onnx.ModelProto) -> None:
    """Opsets, metadata, annotations, documentation, names of nodes."""
    rng = net.rng
    node, name = rng.choice(made.graph.node), rng.choice(NAMES)
    actions: tuple[Callable[[], object], ...] = (
        lambda: made.opset_import.add(domain=rng.choice(DOMAINS), version=rng.choice((-1, *SIZES))),
        lambda: made.ClearField("opset_import"), lambda: setattr(made, "ir_version", rng.choice((-1, *SIZES))),
        lambda: [made.metadata_props.add(key=name, value=name) for _ in range(rng.choice((1, 2, 3000)))],
        lambda: made.graph.quantization_annotation.add(tensor_name=name).quant_parameter_tensor_names.add(key=name),
        lambda: made.training_info.add().initialization.node.append(node), lambda: setattr(node, "doc_string", name),
        lambda: setattr(node, "name", name), lambda: setattr(node, "domain", rng.choice(DOMAINS)),
        lambda: setattr(node, "op_type", rng.choice((name, "Loop", "ConvTranspose", "Einsum", "Scan"))),
        lambda: setattr(made, "producer_name", name), lambda: setattr(node, "overload", name),
        lambda: made.graph.metadata_props.add(key=name), lambda: setattr(made.graph, "name", name))
    rng.choice(actions)()


BEFORE: tuple[Callable[[Net, str], str], ...] = (_grown, _many_constants, _called, _subgraph, _attributes)
AFTER: tuple[Callable[[Net, onnx.ModelProto], None], ...] = (_initializers, _misfits, _shapes, _wires, _words)
SABOTAGES: tuple[Any, ...] = (*BEFORE, _grown, _grown, _called, _attributes, *AFTER, _initializers, _misfits, _misfits)
