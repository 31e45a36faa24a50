"""gkp::FakeQuantize: quantising an activation and back as one element-wise operator, so that passes meet one node.

Operator FakeQuantize, domain gkp, version 1:
  input       X
  attributes  scale: float; zero_point: int; type: "int8" or "uint8"
  output      Y = DequantizeLinear(QuantizeLinear(X, scale, zero_point), scale, zero_point), as ONNX defines these two

What is written for others holds QuantizeLinear and DequantizeLinear in its place (gkp.converter.lower.qdq).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import onnx
from onnx.reference.op_run import OpRun

from gkp.converter.graph import DOMAIN, Graph, Node, Tensor, producer
from gkp.converter.node import BranchedConvOp
from gkp.errors import UnsupportedModelError
from gkp.types import Array

OPERATOR = "FakeQuantize"
_TYPES = {"int8": np.dtype(np.int8), "uint8": np.dtype(np.uint8)}
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max) / 256


@dataclass(frozen=True)
class Quantiser:
    """One for a whole tensor. scale: of float32, positive, neither subnormal nor so large that a step overflows; zero_point:
    the integer that stands for 0; type: "int8" or "uint8". UnsupportedModelError for anything else."""

    scale: float
    zero_point: int
    type: str

    def __post_init__(self) -> None:
        dtype = _TYPES.get(self.type)
        if dtype is None:
            raise UnsupportedModelError(f"activations are quantised to {self.type}", "use int8 or uint8")
        info = np.iinfo(dtype)
        if not _SMALLEST <= self.scale <= _LARGEST or not info.min <= self.zero_point <= info.max:
            raise UnsupportedModelError(f"scale {self.scale}, zero point {self.zero_point}: not of {self.type} activations",
                                        "calibrate the model again")

    @property
    def dtype(self) -> np.dtype[Any]:
        return _TYPES[self.type]

    @property
    def range(self) -> tuple[np.float32, np.float32]:
        """The smallest and the largest number that it gives."""
        info = np.iinfo(self.dtype)
        return (np.float32(info.min - self.zero_point) * np.float32(self.scale),
                np.float32(info.max - self.zero_point) * np.float32(self.scale))

    def integers(self, x: Array) -> Array:
        """QuantizeLinear: half to even, then saturated."""
        info = np.iinfo(self.dtype)
        steps: Array = np.rint(x / np.float32(self.scale)) + self.zero_point
        held: Array = np.clip(steps, info.min, info.max).astype(self.dtype)
        return held

    def __call__(self, x: Array) -> Array:
        """x as its integers say it: numbers of float32, in x's type."""
        steps = self.integers(x).astype(np.float32) - np.float32(self.zero_point)
        return np.asarray(steps * np.float32(self.scale)).astype(x.dtype)


def is_quantiser(node: Node) -> bool:
    """Is the node a gkp::FakeQuantize?"""
    return bool(node.op == OPERATOR and node.domain == DOMAIN)


def read(node: Node) -> Quantiser:
    """What a gkp::FakeQuantize node does. UnsupportedModelError when it is none that ONNX can say."""
    try:
        return Quantiser(float(np.float32(node.attrs["scale"])), index(node.attrs["zero_point"]), str(node.attrs["type"]))
    except (KeyError, TypeError, ValueError) as e:
        raise UnsupportedModelError(f"{OPERATOR} {node.name} lacks scale, zero_point or type", "make the file again") from e


def write(graph: Graph, quantiser: Quantiser, x: Tensor, y: Tensor) -> Node:
    """Append a gkp::FakeQuantize node that computes y from x."""
    y.shape, y.dtype = x.shape, x.dtype
    return graph.add(OPERATOR, [x], [y], domain=DOMAIN,
                     attrs={"scale": quantiser.scale, "zero_point": quantiser.zero_point, "type": quantiser.type})


def of(tensor: Tensor) -> Quantiser | None:
    """How the tensor was quantised, if a FakeQuantize makes it."""
    node = producer(tensor)
    return read(node) if node is not None and is_quantiser(node) else None


class FakeQuantizeOp(OpRun):  # type: ignore[misc]
    """Reference implementation for onnx.reference."""

    op_domain = DOMAIN

    @classmethod
    def op_type(cls) -> str:
        return OPERATOR

    def _run(self, x: Any, scale: Any = None, zero_point: Any = None, type: Any = None) -> tuple[Any]:
        return (Quantiser(float(np.float32(scale)), int(zero_point), str(type))(np.asarray(x)),)


FakeQuantizeOp.__name__ = OPERATOR  # onnx.reference finds an operator by its class name


def schema() -> onnx.defs.OpSchema:
    """The operator's schema, as that of gkp.converter.node."""
    s, tensor = onnx.defs.OpSchema, ["tensor(float)"]
    return s(OPERATOR, DOMAIN, 1, doc="Y = DequantizeLinear(QuantizeLinear(X, scale, zero_point), scale, zero_point).",
             inputs=[s.FormalParameter("X", "T", "any shape")], outputs=[s.FormalParameter("Y", "T", "the shape of X")],
             type_constraints=[("T", tensor, "single precision")],
             attributes=[s.Attribute("scale", s.AttrType.FLOAT, "of one step"),
                         s.Attribute("zero_point", s.AttrType.INT, "the integer that stands for 0"),
                         s.Attribute("type", s.AttrType.STRING, "int8 or uint8")])


class QuantizeLinear(OpRun):  # type: ignore[misc]
    """As ONNX 13 defines it for int8 and uint8: onnx.reference knows it from opset 19 on."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, zero_point: Any = None, axis: Any = None, output_dtype: Any = None,
             **_: Any) -> tuple[Any]:
        signed = output_dtype == onnx.TensorProto.INT8
        zero = np.zeros((), np.int8 if signed else np.uint8) if zero_point is None else np.asarray(zero_point)
        info = np.iinfo(zero.dtype)
        y = np.rint(x / _along(scale, x, axis)) + _along(zero, x, axis).astype(np.int32)
        return (np.clip(y, info.min, info.max).astype(zero.dtype),)


class DequantizeLinear(OpRun):  # type: ignore[misc]
    """See QuantizeLinear; int32 (biases) too."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, zero_point: Any = None, axis: Any = None, **_: Any) -> tuple[Any]:
        zero = np.zeros((), x.dtype) if zero_point is None else np.asarray(zero_point)
        return ((x.astype(np.int32) - _along(zero, x, axis).astype(np.int32)).astype(np.float32) * _along(scale, x, axis),)


def in_double(operator: type[OpRun]) -> type[OpRun]:
    """The operator with the same results, as float64."""
    def _run(self: Any, *inputs: Any, **attrs: Any) -> tuple[Any]:
        return (operator._run(self, *inputs, **attrs)[0].astype(np.float64),)

    return type(operator.__name__, (operator,), {"_run": _run})


def _along(values: Any, x: Any, axis: Any) -> Any:
    """One number, or one for each slice of the axis (default 1), to compute with x."""
    values = np.asarray(values)
    if values.size == 1:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[1 if axis is None else axis] = values.size
    return values.reshape(shape)


OWN_OPERATORS = [BranchedConvOp, FakeQuantizeOp, QuantizeLinear, DequantizeLinear]
"""What onnx.reference has to be given to run a graph in the one form."""
_QUANTISED = {OPERATOR, "QuantizeLinear", "DequantizeLinear"}


def is_quantised(model: onnx.ModelProto) -> bool:
    """Are weights or activations of the model, as it is, integers times a scale?"""
    return any(n.op_type in _QUANTISED for n in model.graph.node)
