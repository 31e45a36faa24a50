"""Arithmetic with constants that differ within a channel: anchors, strides of detection heads, position encodings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gkp.converter.graph import Node
from gkp.converter.native.program import ConstantBinary
from gkp.converter.native.reading.axes import Oriented, bind, like, mapped, scaled
from gkp.converter.native.reading.builder import Builder
from gkp.converter.native.reading.moves import Refused
from gkp.converter.native.reading.parameters import floats


def with_constant(b: Builder, node: Node, x: Oriented, given: npt.NDArray[np.float64], first: bool) -> None:
    """node.outputs[0] = x op given, or given op x (first). given: of x's rank without the batch; each of its axes has one
    element or as many as x."""
    value = b.values[x.value]
    constant = np.broadcast_to(given, x.shape).transpose(x.order).reshape(value.channels, value.height, value.width)
    for axis in range(3):
        one = constant.take([0], axis)
        constant = one if (constant == one).all() else constant
    if node.op == "Div" and first:
        x = mapped(b, x, "reciprocal")
    elif node.op == "Div":
        if not constant.all():
            raise Refused("only a division by constants that are not zero is known")
        constant = 1 / constant
    elif node.op == "Sub" and first:  # c - x = -x + c
        x = replace(x, value=scaled(b, x.value, -1.0))
    elif node.op == "Sub":
        constant = -constant
    target = like(b, x.value)
    op = "mul" if node.op in ("Mul", "Div") else "add"
    b.steps.append(ConstantBinary(x.value, target, op, floats(node, constant)))
    bind(b, node.outputs[0], replace(x, value=target))
