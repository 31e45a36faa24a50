"""Functions of single elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import numpy as np

from gkp.converter import quantiser
from gkp.converter.graph import Node, Tensor, values
from gkp.converter.native.program import Activation, Affine, Dequantise, Function, Grid, Parametric, PRelu, Quantise
from gkp.converter.native.reading.axes import Oriented, bind, combined, like, mapped, on_grid, oriented, per_channel
from gkp.converter.native.reading.builder import Builder
from gkp.converter.native.reading.moves import Refused
from gkp.converter.native.reading.parameters import constant, floats

Operator = Callable[[Builder, Node], None]
_TOLERANCE = 1e-6
_LARGEST = float(np.finfo(np.float32).max)


def affine(b: Builder, node: Node, x: Tensor, scale: Any, shift: Any, activation: Function = Activation.NONE) -> None:
    """node.outputs[0] = activation(x * scale + shift), scale and shift broadcast to x."""
    source = oriented(b, x)
    factors, shifts = (floats(node, per_channel(b, source, np.asarray(v, np.float64))) for v in (scale, shift))
    target = like(b, source.value)
    b.steps.append(Affine(source.value, target, factors, shifts, activation))
    bind(b, node.outputs[0], Oriented(target, source.shape, source.order))


def _activate(kind: Function) -> Operator:
    def operator(b: Builder, node: Node) -> None:
        affine(b, node, node.inputs[0], 1, 0, kind)

    return operator


def _with_alpha(name: str, default: float) -> Operator:
    def operator(b: Builder, node: Node) -> None:
        affine(b, node, node.inputs[0], 1, 0, Parametric(name, (float(node.attrs.get("alpha", default)),)))

    return operator


def _bound(node: Node, place: int, name: str, default: float) -> float:
    """A bound of a Clip, as an input or (before opset 11) an attribute."""
    if len(node.inputs) <= place or not node.inputs[place].name:
        return float(node.attrs.get(name, default))
    given = values(node.inputs[place])
    if given is None or given.size != 1 or np.isnan(given).any():
        raise Refused("its bounds are computed")
    return float(given.item())


def clipping(low: float, high: float) -> Function:
    """min(max(x, low), high)."""
    if low == 0 and high in (6, inf):
        return Activation.RELU6 if high == 6 else Activation.RELU
    return Parametric("clip", (low, high))


def _clip(b: Builder, node: Node) -> None:
    low, high = _bound(node, 1, "min", -inf), _bound(node, 2, "max", inf)
    affine(b, node, node.inputs[0], 1, 0, clipping(-inf if low <= -_LARGEST else low, inf if high >= _LARGEST else high))


def _hardsigmoid(b: Builder, node: Node) -> None:
    """Any slope a and offset b: hardsigmoid(x) = clip(x / 6 + 1/2), so clip(a x + b) = hardsigmoid(6 a x + 6 (b - 1/2))."""
    scale = 6 * float(node.attrs.get("alpha", 0.2))
    shift = 6 * (float(node.attrs.get("beta", 0.5)) - 0.5)
    affine(b, node, node.inputs[0], 1 if abs(scale - 1) < _TOLERANCE else scale, shift, Activation.HARDSIGMOID)


def _swish(b: Builder, node: Node) -> None:
    if float(node.attrs.get("alpha", 1.0)) != 1:
        raise Refused("only x * sigmoid(x) is known")
    affine(b, node, node.inputs[0], 1, 0, Activation.SILU)


def _gelu(b: Builder, node: Node) -> None:
    approximate = node.attrs.get("approximate", "none") == "tanh"
    affine(b, node, node.inputs[0], 1, 0, Activation.GELU_TANH if approximate else Activation.GELU)


def _prelu(b: Builder, node: Node) -> None:
    slope, source = constant(node, 1), oriented(b, node.inputs[0])
    if slope is None or slope.ndim > 1 + len(source.shape):
        raise Refused("its slopes are computed")
    given = slope.reshape((1,) * (1 + len(source.shape) - slope.ndim) + slope.shape)
    if len(given) > 1:
        raise Refused("its slopes differ from image to image")
    slopes, target = floats(node, per_channel(b, source, given[0])), like(b, source.value)
    b.steps.append(PRelu(source.value, target, slopes))
    bind(b, node.outputs[0], Oriented(target, source.shape, source.order))


def _mapped(function: str) -> Operator:
    def operator(b: Builder, node: Node) -> None:
        bind(b, node.outputs[0], mapped(b, oriented(b, node.inputs[0]), function))

    return operator


def _neg(b: Builder, node: Node) -> None:
    affine(b, node, node.inputs[0], -1, 0)


def _pow(b: Builder, node: Node) -> None:
    """By 1/2, -1/2, -1, 1, 2, 3 and 4."""
    exponent, x = constant(node, 1), oriented(b, node.inputs[0])
    power = exponent.item() if exponent is not None and exponent.size == 1 else 0
    if power not in (0.5, -0.5, -1, 1, 2, 3, 4):
        raise Refused("only small whole exponents and roots are known")
    result = mapped(b, x, "sqrt") if power in (0.5, -0.5) else x
    if power in (-1, -0.5):
        result = mapped(b, result, "reciprocal")
    if power in (2, 3, 4):
        square = combined(b, "mul", x, x)
        result = square if power == 2 else combined(b, "mul", square, x if power == 3 else square)
    bind(b, node.outputs[0], result)


def quantised(b: Builder, node: Node) -> None:
    """gkp::FakeQuantize: integers, and what they stand for."""
    how, x = quantiser.read(node), oriented(b, node.inputs[0])
    grid = Grid(how.scale, how.zero_point - int(np.iinfo(how.dtype).min))
    integers, target = on_grid(b, x.value, grid), like(b, x.value)
    b.steps += [Quantise(x.value, integers), Dequantise(integers, target)]
    bind(b, node.outputs[0], Oriented(target, x.shape, x.order))


ACTIVATIONS: Mapping[str, Operator] = {
    "Relu": _activate(Activation.RELU), "Sigmoid": _activate(Activation.SIGMOID), "Clip": _clip,
    "HardSigmoid": _hardsigmoid, "HardSwish": _activate(Activation.HARDSWISH), "Swish": _swish, "Gelu": _gelu,
    "Tanh": _activate(Activation.TANH), "Erf": _activate(Activation.ERF), "Softplus": _activate(Activation.SOFTPLUS),
    "Mish": _activate(Activation.MISH), "LeakyRelu": _with_alpha("leaky_relu", 0.01), "Elu": _with_alpha("elu", 1.0),
    "PRelu": _prelu, "Neg": _neg, "Pow": _pow, "Abs": _mapped("abs"), "Exp": _mapped("exp"), "Sqrt": _mapped("sqrt"),
    "Reciprocal": _mapped("reciprocal"),
}
"""ONNX operators by name."""
