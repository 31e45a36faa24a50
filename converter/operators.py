"""What is known of ONNX's operators: one table that the passes, the lowering, the native compiler and edge/ read.

A reader names the property that its rule needs and adds what only its rule can do. Names are those of ONNX's own domain, and
BranchedConv and FakeQuantize of gkp's; whoever meets operators of other domains asks for the domain too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gkp.converter.graph import Node, channels, values, weights

Kind = Literal["unary", "nary", "cast", "copy", "reshape", "move", "pool", "plane", "norm", "product"]
AtZero = Literal["zero", "number", "nothing"]


@dataclass(frozen=True)
class Operator:
    """An operator and what makes its elements.

    kind, of what an element of the output is made:
        unary    of the element at its place in the first input, by one function for all; other inputs are parameters
        nary     of the elements at its place in all inputs, which are broadcast
        cast     of the element at its place, as another type
        copy     it is the element at its place (Dropout: in inference)
        reshape  it is the element of the same number in the first input, in row-major order
        move     it is an element of an input, or zero; the others of its inputs say which (Scatter: or a sum of two)
        pool     of a window of its channel
        plane    of its channel, whole
        norm     of the element at its place, by a scale and a shift of its channel (in inference)
        product  of a sum of products with weights, over channels: where nearly all of a network's time goes
    at_zero: what unary and nary ones make of zeros: zero, another finite number, or nothing that can be computed with.
    fused: do runtimes compute it within the convolution before it?"""

    name: str
    kind: Kind
    at_zero: AtZero = "nothing"
    fused: bool = False


def _rows(names: str, kind: Kind, at_zero: AtZero = "nothing", *, fused: bool = False) -> tuple[Operator, ...]:
    return tuple(Operator(name, kind, at_zero, fused) for name in names.split())


OPERATORS: tuple[Operator, ...] = (
    *_rows("FakeQuantize Relu LeakyRelu HardSwish Gelu Swish", "unary", "zero", fused=True),
    *_rows("Abs Ceil Celu Elu Erf Floor Mish Neg Round Selu Sin Softsign Sqrt Tanh ThresholdedRelu", "unary", "zero"),
    *_rows("Clip HardSigmoid Sigmoid", "unary", "number", fused=True),
    *_rows("Exp Softplus", "unary", "number"),
    *_rows("Log Reciprocal", "unary", "nothing"),
    *_rows("Add Mul Sum", "nary", "zero", fused=True),
    *_rows("Max Mean Min PRelu Sub", "nary", "zero"),
    *_rows("Div Pow", "nary", "nothing"),
    *_rows("Cast", "cast"),
    *_rows("Dropout Identity", "copy"),
    *_rows("Flatten Reshape Squeeze Unsqueeze", "reshape"),
    *_rows("Concat Gather GatherElements GatherND Pad ScatterElements ScatterND Slice Split Transpose", "move"),
    *_rows("AveragePool MaxPool", "pool"),
    *_rows("GlobalAveragePool GlobalMaxPool", "plane"),
    *_rows("BatchNormalization", "norm", fused=True),
    *_rows("BranchedConv Conv ConvTranspose Gemm MatMul", "product"),
)


def _named(fits: Callable[[Operator], bool]) -> frozenset[str]:
    return frozenset(o.name for o in OPERATORS if fits(o))


UNARY = _named(lambda o: o.kind == "unary" and o.at_zero != "nothing")
"""They may stand between convolutions whose channels are reordered, dropped or padded with zeros: it makes no infinities."""
ZERO_PRESERVING = _named(lambda o: o.kind == "unary" and o.at_zero == "zero")
"""Those of UNARY that give zero for zero."""
NARY = _named(lambda o: o.kind == "nary" and o.at_zero != "nothing")
"""The same of several inputs. Not Div: 0 / 0 in padded channels."""
ELEMENTWISE = _named(lambda o: o.kind in ("unary", "nary", "cast") or o.name == "Identity")
"""Every operator whose elements are made of those at their place."""
COPIES = _named(lambda o: o.kind == "copy")
RESHAPES = _named(lambda o: o.kind == "reshape")
MOVES = _named(lambda o: o.kind == "move")
POOLS = _named(lambda o: o.kind == "pool")
PLANES = _named(lambda o: o.kind == "plane")
CHANNELWISE = UNARY | COPIES | POOLS | PLANES
"""Their output's channel c is made of channel c of their first input, and of no parameter of that channel."""
HEAVY = _named(lambda o: o.kind == "product")
FUSED = _named(lambda o: o.fused)


def is_batchnorm(node: Node) -> bool:
    """Is it BatchNormalization in inference, with constant parameters, one number of each for every channel?"""
    if node.op != "BatchNormalization" or len(node.inputs) != 5 or node.attrs.get("training_mode", 0):
        return False
    shape = (channels(node.inputs[0]),)
    return all((given := values(t)) is not None and given.shape == shape for t in node.inputs[1:])


def is_depthwise(node: Node) -> bool:
    """Is it a stock Conv of constant weights with one filter per channel?"""
    weight = weights(node.inputs[1]) if node.op == "Conv" and len(node.inputs) > 1 else None
    return weight is not None and weight.shape[1] == 1 and node.attrs.get("group", 1) == weight.shape[0]


def reduces_plane(node: Node) -> bool:
    """Is it a mean over spatial axes only? (The newer PyTorch exporter writes global average pooling so.)"""
    if node.op != "ReduceMean" or not node.inputs[0].shape:
        return False
    axes = node.attrs.get("axes") if len(node.inputs) < 2 else values(node.inputs[1])
    rank = len(node.inputs[0].shape)
    return axes is not None and len(axes) > 0 and all(int(a) % rank > 1 for a in axes)
