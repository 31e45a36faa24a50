"""Quantised ONNX networks by hand, whose scales are powers of two: float32 computes them exactly, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_kit import Net

from gkp.converter.quantiser import OWN_OPERATORS

X_SCALE = 2.0**-4


class QuantNet(Net):
    """Net with quantisers. Activations are of `kind` ("int8" or "uint8")."""

    def pair(self, x: str, scale: float = X_SCALE, zero: int = 0, kind: str = "int8") -> str:
        """x, quantised and dequantised."""
        return self.dq(self.q(x, scale, zero, kind), scale, zero, kind)

    def q(self, x: str, scale: Any = X_SCALE, zero: Any = 0, kind: str = "int8", **attrs: Any) -> str:
        return str(self.op("QuantizeLinear", x, self.const(scale, np.float32), self.const(zero, np.dtype(kind)), **attrs))

    def dq(self, x: str, scale: Any = X_SCALE, zero: Any = 0, kind: str = "int8", **attrs: Any) -> str:
        return str(self.op("DequantizeLinear", x, self.const(scale, np.float32), self.const(zero, np.dtype(kind)), **attrs))

    def integers(self, *shape: int, largest: int = 20) -> Any:
        return self.rng.integers(-largest, largest + 1, shape).astype(np.int8)

    def scales(self, n: int) -> Any:
        """Powers of two."""
        return (2.0 ** -self.rng.integers(5, 8, n)).astype(np.float32)

    def qconv(self, x: str, weight: Any, scale: Any = 2.0**-6, *, bias: bool = True, x_scale: float = X_SCALE, zero: int | None = 0,
              name: str = "", **attrs: Any) -> str:
        """A convolution of integer weights [F, C/groups, *kernel] (int8 with zero point `zero`; zero 128: uint8), with one scale
        or one for each filter; bias in steps of int32."""
        per_filter = np.ndim(scale) > 0
        kind = "uint8" if zero == 128 else "int8"
        stored = (weight.astype(np.int16) + (zero or 0)).astype(kind)
        axis = {"axis": 0} if per_filter else {}
        w = self.dq(self.const(stored), scale, np.full(np.shape(scale), zero or 0), kind, **axis)
        inputs = [x, w]
        if bias:
            steps = self.rng.integers(-300, 300, len(weight)).astype(np.int32)
            unit = np.broadcast_to(np.float32(scale) * np.float32(x_scale), len(weight)).astype(np.float32)
            inputs.append(self.dq(self.const(steps), unit, np.zeros(len(weight)), "int32", axis=0))
        y = self.name()
        self.nodes.append(helper.make_node("Conv", inputs, [y], name=name or f"conv_{y}", **attrs))
        return y


def run_reference(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """By onnx.reference, with the quantisers as ONNX defines them."""
    return list(ReferenceEvaluator(model, new_ops=OWN_OPERATORS).run(None, feeds))


def assert_equal(got: Sequence[Any], want: Sequence[Any], where: str = "") -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w, err_msg=where)
