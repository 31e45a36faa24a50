"""Small ONNX files that ask for much: one generator for each way of hiding it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from cli_kit import save, small_net
from onnx import TensorProto, helper, numpy_helper
from onnx_kit import Net

_MIB = 1 << 20


def outside(name: str, elements: int = _MIB // 4, location: str = "data.bin") -> onnx.TensorProto:
    """A tensor of float32 whose data lie in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[elements], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _with_data(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "data.bin").write_bytes(bytes(_MIB))
    return save(model, folder / "m.onnx")


def _in_initialisers(folder: Path) -> Path:
    model = small_net()
    model.graph.initializer.extend(outside(f"w{k}") for k in range(1000))
    return _with_data(model, folder)


def _in_constants(folder: Path) -> Path:
    model = small_net()
    model.graph.node.extend(helper.make_node("Constant", [], [f"c{k}"], value=outside("v")) for k in range(1000))
    return _with_data(model, folder)


def _in_list_attributes(folder: Path) -> Path:
    model = small_net()
    model.graph.node[0].attribute.append(helper.make_attribute("extra", [outside(f"w{k}") for k in range(1000)]))
    return _with_data(model, folder)


def _subgraph() -> onnx.GraphProto:
    info = helper.make_tensor_value_info("w0", TensorProto.FLOAT, [_MIB // 4])
    return helper.make_graph([], "then", [], [info], [outside(f"w{k}") for k in range(1000)])


def _in_subgraphs(folder: Path) -> Path:
    model = small_net()
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    model.graph.node.append(helper.make_node("If", ["flag"], ["z"], then_branch=_subgraph(), else_branch=_subgraph()))
    return _with_data(model, folder)


def _in_functions(folder: Path) -> Path:
    model = small_net()
    nodes = [helper.make_node("Constant", [], [f"c{k}"], value=outside("v")) for k in range(1000)]
    nodes.append(helper.make_node("Relu", ["a"], ["b"]))
    model.functions.append(helper.make_function("local", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 18)]))
    return _with_data(_calling(model, "F"), folder)


def _calling(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Its first Relu calls a function instead."""
    model.opset_import.append(helper.make_opsetid("local", 1))
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type, relu.domain = name, "local"
    return model


def _function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, imports)


def nested(folder: Path, levels: int = 25, name: str = "F") -> Path:
    """Each function calls the next one twice."""
    model = small_net()
    for k in range(levels):
        calls = [helper.make_node(f"{name}{k + 1}", ["a"], ["m"], domain="local"),
                 helper.make_node(f"{name}{k + 1}", ["m"], ["b"], domain="local")]
        model.functions.append(_function(f"{name}{k}", calls))
    model.functions.append(_function(f"{name}{levels}", [helper.make_node("Relu", ["a"], ["b"])]))
    return save(_calling(model, f"{name}0"), folder / "m.onnx")


def _recursive(folder: Path) -> Path:
    model = small_net()
    for one, other in ("FG", "GF"):
        model.functions.append(_function(one, [helper.make_node(other, ["a"], ["b"], domain="local")]))
    return save(_calling(model, "F"), folder / "m.onnx")


def _function_constants(folder: Path) -> Path:
    """One function with a constant of 1 MiB, called a thousand times."""
    model = small_net()
    value = numpy_helper.from_array(np.zeros(_MIB // 4, np.float32), "v")
    size = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("ReduceMax", ["c"], ["m"], keepdims=0),
            helper.make_node("Add", ["a", "m"], ["b"])]
    model.functions.append(_function("G", size))
    calls = [helper.make_node("G", [f"t{k}" if k else "a"], [f"t{k + 1}" if k < 999 else "b"], domain="local")
             for k in range(1000)]
    model.functions.append(_function("F", calls))
    return save(_calling(model, "F"), folder / "m.onnx")


def _function_names(folder: Path) -> Path:
    """The inliner makes each name anew: a long one a thousand times."""
    model = small_net()
    long = "n" * 50_000
    body = [helper.make_node("Relu", ["a"], [long]), helper.make_node("Relu", [long], ["b"])]
    model.functions.append(_function("G", body))
    calls = [helper.make_node("G", [f"t{k}" if k else "a"], [f"t{k + 1}" if k < 4999 else "b"], domain="local")
             for k in range(5000)]
    model.functions.append(_function("F", calls))
    return save(_calling(model, "F"), folder / "m.onnx")


Build = Callable[[Net], str]


def computed(build: Build) -> Callable[[Path], Path]:
    """A network that adds a number to its input, which `build` makes a large constant for."""
    def write(folder: Path) -> Path:
        net = Net(1, 3, 8, 8)
        y = net.op("Add", net.conv3("x", 3, 4), net.op("ReduceMax", build(net), keepdims=0))
        info = helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 4, 8, 8])
        graph = helper.make_graph(net.nodes, "g", net.inputs, [info], net.constants)
        return save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "m.onnx")

    return write


def _many(net: Net) -> str:
    shape = net.ints(1 << 25)
    parts = [net.op("ReduceMax", net.op("ConstantOfShape", shape)) for _ in range(50)]
    return str(net.op("Max", *parts))


def _many_kept(net: Net) -> str:
    """All of them are read again at the end."""
    shape = net.ints(1 << 25)
    parts = [net.op("ConstantOfShape", shape) for _ in range(50)]
    return str(net.op("Max", *[net.op("ReduceMax", p) for p in parts]))


def _concat(net: Net) -> str:
    x = net.const(np.zeros(1024, np.float32))
    for _ in range(16):
        x = net.op("Concat", x, x, axis=0)
    return str(net.op("Concat", *[x] * 7, axis=0))


def _concat_twins(net: Net) -> str:
    x = net.const(np.zeros(1024, np.float32))
    for _ in range(14):
        x = net.op("Concat", x, x, axis=0)
    return str(net.op("Max", *[net.op("ReduceMax", net.op("Concat", x, x, axis=0)) for _ in range(30)]))


def _grown(op: str) -> Build:
    def build(net: Net) -> str:
        if op == "Tile":
            big = [net.op("Tile", net.const(np.zeros(1024, np.float32)), net.ints(30_000 + k)) for k in range(50)]
        elif op == "Pad":
            big = [net.op("Pad", net.const(np.zeros(4, np.float32)), net.ints(0, 30_000_000 + k)) for k in range(50)]
        elif op == "Resize":
            pixel = net.const(np.zeros((1, 1, 2, 2), np.float32))
            big = [net.op("Resize", pixel, "", "", net.ints(1, 1, 5000, 6000 + k)) for k in range(50)]
        elif op == "OneHot":
            big = [net.op("OneHot", net.const(np.zeros(500, np.int64)), net.const(np.int64(60_000 + k)),
                          net.const(np.float32([0, 1]))) for k in range(50)]
        elif op == "Gather":
            big = [net.op("Gather", net.const(np.zeros((1, 5_000), np.float32)), net.const(np.zeros(6_000, np.int64)))
                   for k in range(50)]
        elif op == "Where":
            big = [net.op("Where", net.const(np.zeros((5_000, 1), bool)), net.const(np.zeros((1, 6_000), np.float32)),
                          net.const(np.float32(k))) for k in range(50)]
        else:
            big = [net.op("Range", net.const(np.float32(k)), net.const(np.float32(3e7)), net.const(np.float32(1)))
                   for k in range(50)]
        return str(net.op("Max", *[net.op("ReduceMax", b, keepdims=0) for b in big]))

    return build


def _products(net: Net) -> str:
    """Products of constants, which ONNX Runtime computes when it opens the model."""
    x = net.op("ConstantOfShape", net.ints(4096, 4096))
    for _ in range(400):
        x = net.op("MatMul", x, x)
    return str(x)


def activations(op: str, copies: int = 1) -> Callable[[Path], Path]:
    """A network whose activations are large, many at a time."""
    def write(folder: Path) -> Path:
        net = Net(1, 3, 8, 8)
        x = net.conv3("x", 3, 4)
        if op == "Tile":
            big = [net.op("Tile", x, net.ints(1, 1, 400, 400 + k)) for k in range(copies)]
        elif op == "Expand":
            x = net.op("GlobalAveragePool", x)
            big = [net.op("Expand", x, net.ints(1, 4, 4000, 4000 + k)) for k in range(copies)]
        elif op == "Resize":
            big = [net.op("Resize", x, "", "", net.ints(1, 4, 4000, 4000 + k)) for k in range(copies)]
        else:
            big = [net.op("Pad", x, net.ints(0, 0, 0, 0, 0, 0, 4000, 4000 + k)) for k in range(copies)]
        means = [net.op("GlobalMaxPool", b) for b in big]
        held = [net.op("Slice", b, net.ints(0), net.ints(1), net.ints(2)) for b in big]
        y = net.op("Sum", *means, *[net.op("GlobalMaxPool", h) for h in held])
        info = helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, 4, 1, 1])
        graph = helper.make_graph(net.nodes, "g", net.inputs, [info], net.constants)
        return save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), folder / "m.onnx")

    return write


def _held(folder: Path) -> Path:
    """Eighty activations of 256 MB, all alive before the first of them is read."""
    net = Net(1, 3, 8, 8)
    x = net.conv3("x", 3, 4)
    big = [net.op("Tile", x, net.ints(1, 1, 500, 500 + k)) for k in range(80)]
    return save(net.model(net.op("Sum", *[net.op("GlobalMaxPool", b) for b in big])), folder / "m.onnx")


def _sparse(folder: Path) -> Path:
    model = small_net()
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [50_000, 50_000]))
    return save(model, folder / "m.onnx")


COSTLY: dict[str, Callable[[Path], Path]] = {
    "external data of many initialisers": _in_initialisers, "external data of constants": _in_constants,
    "external data in a list attribute": _in_list_attributes, "external data in subgraphs": _in_subgraphs,
    "external data in a function": _in_functions, "nested functions": nested, "recursive functions": _recursive,
    "constants of a function": _function_constants, "names of a function": _function_names,
    "many constants": computed(_many), "many constants kept": computed(_many_kept), "concat": computed(_concat),
    "concat twins": computed(_concat_twins),
    **{f"constants by {op}": computed(_grown(op)) for op in ("Tile", "Pad", "Resize", "OneHot", "Gather", "Where", "Range")},
    "products of constants": computed(_products), "sparse": _sparse, "activations held": _held,
    **{f"activations by {op}": activations(op, 40) for op in ("Tile", "Expand", "Resize", "Pad")},
}
