"""Run ONNX models for comparison: ONNX Runtime where installed, else the reference implementation.

Not OpenVINO: it moves a Gather that permutes all channels into the plain convolution behind it with the inverse of the
permutation (2026.4.1), and a reference must be right."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from gkp.converter.graph import DOMAIN, Graph
from gkp.converter.quantiser import OWN_OPERATORS, in_double
from gkp.errors import BackendMissingError, UnsupportedModelError, UsageError
from gkp.require import install
from gkp.runtime.environment import physical_cores
from gkp.runtime.runners import OrtRunner, import_ort
from gkp.text import first_line
from gkp.types import Array, Run

_SCALED = ("QuantizeLinear", "DequantizeLinear")


def evaluator(model: onnx.ModelProto) -> tuple[str, Run]:
    """(name, function) that computes the model's outputs. A model in the one form is lowered to dense convolutions for
    the runtimes; onnx.reference runs the gkp operator itself."""
    if all(n.domain != DOMAIN for n in model.graph.node):
        return stock_evaluator(model.SerializeToString())
    from gkp.converter.lower.emit import lower  # the lowering needs the graph module, which needs none of this
    from gkp.converter.passes import lift_quantisers
    graph = Graph(model)
    lift_quantisers.check(graph)
    try:
        return "ONNX Runtime", OrtRunner(lower(graph, {}).to_model().SerializeToString(), physical_cores(), exact=True).run
    except BackendMissingError:
        return "onnx.reference", reference(model)


def evaluator_name() -> str:
    """The name that `evaluator` would give."""
    try:
        import_ort()
    except BackendMissingError:
        return "onnx.reference"
    return "ONNX Runtime"


def stock_evaluator(data: bytes) -> tuple[str, Run]:
    """As `evaluator`, of a serialised model of standard operators."""
    try:
        return "ONNX Runtime", OrtRunner(data, physical_cores(), exact=True).run
    except BackendMissingError:
        return "onnx.reference", reference(onnx.load_from_string(data))


def reference(model: onnx.ModelProto) -> Run:
    """The model under onnx.reference: slow, and independent of every runtime. UnsupportedModelError for operators that
    it does not have."""
    return _evaluated(model, OWN_OPERATORS)


def in_float64(model: onnx.ModelProto) -> Run:
    """As `reference`, with sums in float64, so that their order does not tell: of a quantised model, where another last bit
    of a sum may round to another integer. Products of integers and scales are those of float32, and so are the quotients of
    constants."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    kept = {name for n in wide.graph.node if n.op_type in _SCALED for name in n.input}
    for tensor in wide.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.name not in kept:
            tensor.CopyFrom(_widened(tensor))
    for attribute in (a for n in wide.graph.node if n.op_type not in _SCALED for a in n.attribute):
        if attribute.name in ("to", "dtype") and attribute.i == onnx.TensorProto.FLOAT:
            attribute.i = onnx.TensorProto.DOUBLE
        elif attribute.name == "value" and attribute.t.data_type == onnx.TensorProto.FLOAT:
            attribute.t.CopyFrom(_widened(attribute.t))
    run = _evaluated(wide, [in_double(o) if o.__name__ == "DequantizeLinear" else o for o in OWN_OPERATORS])
    return lambda feeds: run({k: x.astype(np.float64) if x.dtype == np.float32 else x for k, x in feeds.items()})


def _widened(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def _evaluated(model: onnx.ModelProto, operators: list[type[OpRun]]) -> Run:
    try:
        session = ReferenceEvaluator(model, new_ops=operators)
    except Exception as e:  # the library raises its own untyped errors
        raise UnsupportedModelError(f"onnx.reference cannot open the model: {first_line(e, 200)}",
                                    f"install a runtime: {install('ort')}") from e

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return [np.asarray(v) for v in session.run(None, dict(feeds))]
        except Exception as e:
            raise UsageError(f"onnx.reference cannot run the model on this input: {first_line(e, 200)}",
                             "check the model, or give another --input-shape") from e

    return run
