"""Small ONNX networks by hand, and the comparison of a model with its rewritten forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from gkp.converter import node as branched_node
from gkp.converter.graph import DOMAIN, Graph
from gkp.converter.node import BranchedConvOp
from gkp.converter.recognise import recognise, simplify

MOVES = ("Gather", "GatherND", "GatherElements", "Split", "Slice", "ScatterElements", "ScatterND", "Concat", "Reshape",
         "Transpose", "Pad")


class Net:
    """Builds a model node by node; every method returns the name of the tensor it made."""

    def __init__(self, *shape: Any, seed: int = 0, opset: int = 18, dtype: int = TensorProto.FLOAT) -> None:
        self.rng, self.opset, self.dtype = np.random.default_rng(seed), opset, dtype
        self.numpy = helper.tensor_dtype_to_np_dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = [helper.make_tensor_value_info("x", dtype, shape)]
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def const(self, value: Any, dtype: Any = None) -> str:
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(np.asarray(value, dtype)).reshape(
            np.shape(value)), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def op(self, op: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n_{names[0]}", **attrs))
        return names[0] if outputs == 1 else names

    def normal(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape).astype(self.numpy)

    def weight(self, *shape: int) -> Any:
        """Random, scaled so that activations keep their size from layer to layer."""
        return (self.normal(*shape) / np.sqrt(np.prod(shape[1:]))).astype(self.numpy)

    def conv(self, x: str, weight: Any, *, bias: Any = None, name: str = "", **attrs: Any) -> str:
        y = self.name()
        inputs = [x, self.const(weight), *([] if bias is None else [self.const(bias)])]
        self.nodes.append(helper.make_node("Conv", inputs, [y], name=name or f"conv_{y}", **attrs))
        return y

    def conv3(self, x: str, cin: int, cout: int, *, group: int = 1, stride: int = 1, bias: bool = False) -> str:
        """3x3, pad 1, random weights."""
        return self.conv(x, self.weight(cout, cin // group, 3, 3), group=group, pads=[1] * 4, strides=[stride] * 2,
                         bias=self.normal(cout) if bias else None)

    def conv1(self, x: str, cin: int, cout: int, *, group: int = 1, stride: int = 1) -> str:
        """1x1, random weights."""
        return self.conv(x, self.weight(cout, cin // group, 1, 1), group=group, strides=[stride] * 2)

    def bn(self, x: str, c: int) -> str:
        gamma, var = self.rng.uniform(-1.2, 1.2, c), self.rng.uniform(0.5, 2, c)
        beta, mean = self.rng.standard_normal((2, c)) / 2
        params = [self.const(v.astype(self.numpy)) for v in (gamma, beta, mean, var)]
        return str(self.op("BatchNormalization", x, *params))

    def relu(self, x: str) -> str:
        return str(self.op("Relu", x))

    def take(self, x: str, index: Sequence[int] | Any) -> str:
        return str(self.op("Gather", x, self.const(np.asarray(index, np.int64)), axis=1))

    def concat(self, *xs: str) -> str:
        return str(self.op("Concat", *xs, axis=1))

    def model(self, *outputs: str) -> onnx.ModelProto:
        outs = [helper.make_tensor_value_info(o, self.dtype, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, outs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model, full_check=True)
        return model


def feeds_of(model: onnx.ModelProto, batch: int | None = None, seed: int = 1) -> dict[str, Any]:
    """Random inputs for a model; `batch` stands in for a dynamic first axis."""
    rng, out = np.random.default_rng(seed), {}
    for entry in model.graph.input:
        shape = [d.dim_value or batch or 2 for d in entry.type.tensor_type.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        out[entry.name] = rng.standard_normal(shape).astype(dtype)
    return out


def with_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The model with another batch size (only where no constant in it knows the batch)."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    del model.graph.value_info[:]
    for entry in (*model.graph.input, *model.graph.output):
        if entry.type.tensor_type.shape.dim:
            entry.type.tensor_type.shape.dim[0].dim_value = batch
    return model


def run_ort(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def run_one_form(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    return list(ReferenceEvaluator(model, new_ops=[BranchedConvOp]).run(None, dict(feeds)))


def assert_close(got: Sequence[Any], want: Sequence[Any], where: str = "", tol: float = 2e-5) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape, where
        scale = max(1.0, float(np.abs(w).max(initial=0)))
        np.testing.assert_allclose(g, w, rtol=0, atol=tol * scale, err_msg=where)


def one_form(model: onnx.ModelProto, *, batch: int = 2, tol: float = 2e-5) -> Graph:
    """recognise + simplify, with the model run before and after every pass that changed it."""
    feeds = feeds_of(model, batch)
    want = run_ort(model, feeds)

    def watch(name: str, graph: Graph) -> None:
        if graph.opset < 14 and ops(graph)["BatchNormalization"]:
            return  # onnx.reference mixes in batch statistics there
        assert_close(run_one_form(graph.to_model(), feeds), want, f"after {name}", tol)

    graph = simplify(recognise(Graph(model), watch), watch)
    after = graph.to_model()
    assert [o.name for o in after.graph.output] == [o.name for o in model.graph.output]
    assert_close(run_one_form(after, feeds), want, "at the end", tol)
    return graph


def ops(model: Graph | onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator."""
    if isinstance(model, Graph):
        return Counter(n.op for n in model.nodes)
    return Counter(n.op_type for n in model.graph.node)


def macs(graph: Graph) -> int:
    """Multiply-accumulates of the BranchedConv nodes for one image."""
    return sum(branched_node.read(n).macs(tuple(n.outputs[0].shape[2:])) for n in graph.branched())


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, once onnx.checker accepts it in full (stock operators only)."""
    assert all(n.domain != DOMAIN for n in model.graph.node)
    onnx.checker.check_model(model, full_check=True)
    return model
