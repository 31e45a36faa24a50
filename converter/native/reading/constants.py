"""Arithmetic with constants that differ within a channel: anchors, strides of detection heads, position encodings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gkp.converter.graph import Node, Tensor
from gkp.converter.native.program import Affine, ConstantBinary
from gkp.converter.native.reading.builder import Builder, View, as_value
from gkp.converter.native.reading.moves import Refused
from gkp.converter.native.reading.parameters import floats


def with_constant(b: Builder, node: Node, x: Tensor, given: npt.NDArray[np.float64], first: bool) -> None:
    """node.outputs[0] = x op given, or given op x (first). given: of x's rank without the batch; each of its axes has one
    element or as many as x."""
    shape = b.shape(x)
    value = as_value(given.shape)
    constant = given.reshape(value.channels, value.height, value.width)
    source = b.number(x)
    if node.op == "Div":
        if first or not constant.all():
            raise Refused("only a division by constants that are not zero is known")
        constant = 1 / constant
    elif node.op == "Sub" and first:  # c - x = -x + c
        n, negative = b.values[source].channels, b.value(shape)
        b.steps.append(Affine(source, negative, np.full(n, -1, np.float32), np.zeros(n, np.float32)))
        source = negative
    elif node.op == "Sub":
        constant = -constant
    target = b.value(shape)
    op = "mul" if node.op in ("Mul", "Div") else "add"
    b.steps.append(ConstantBinary(source, target, op, floats(node, constant)))
    b.bind(node.outputs[0], View(shape, target))
