"""Run ONNX models for comparison: ONNX Runtime where installed, else the reference implementation.

Not OpenVINO: it moves a Gather that permutes all channels into the plain convolution behind it with the inverse of the
permutation (2026.4.1), and a reference must be right."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from gkp.converter.graph import DOMAIN, Graph
from gkp.converter.quantiser import OWN_OPERATORS
from gkp.errors import BackendMissingError, UnsupportedModelError, UsageError
from gkp.runtime.environment import physical_cores
from gkp.runtime.runners import OrtRunner, import_ort
from gkp.text import first_line
from gkp.types import Array, Run


def evaluator(model: onnx.ModelProto) -> tuple[str, Run]:
    """(name, function) that computes the model's outputs. A model in the one form is lowered to dense convolutions for
    the runtimes; onnx.reference runs the gkp operator itself."""
    if all(n.domain != DOMAIN for n in model.graph.node):
        return stock_evaluator(model.SerializeToString())
    from gkp.converter.lower.emit import lower  # the lowering needs the graph module, which needs none of this
    try:
        return "ONNX Runtime", OrtRunner(lower(Graph(model), {}).to_model().SerializeToString(), physical_cores()).run
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
        return "ONNX Runtime", OrtRunner(data, physical_cores()).run
    except BackendMissingError:
        return "onnx.reference", reference(onnx.load_from_string(data))


def reference(model: onnx.ModelProto) -> Run:
    """The model under onnx.reference: slow, and independent of every runtime. UnsupportedModelError for operators that
    it does not have."""
    try:
        session = ReferenceEvaluator(model, new_ops=OWN_OPERATORS)
    except Exception as e:  # the library raises its own untyped errors
        raise UnsupportedModelError(f"onnx.reference cannot open the model: {first_line(e, 200)}",
                                    'install a runtime: pip install "gkp[ort]"') from e

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        try:
            return [np.asarray(v) for v in session.run(None, dict(feeds))]
        except Exception as e:
            raise UsageError(f"onnx.reference cannot run the model on this input: {first_line(e, 200)}",
                             "check the model, or give another --input-shape") from e

    return run
