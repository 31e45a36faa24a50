"""What the native compiler compiles: a list of steps over values, for one image.

A value is [channels, height, width] (1-D data: height 1; a vector: height and width 1). Steps run in order; each
writes one value once. The batch is not part of a program: images are computed one after another, in groups
(planning.batching), or side by side by several threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import FLOAT32, DType
from gkp.types import Floats


class Activation(Enum):
    """Applied to every element x; the value is the name of a function in gkp.h."""

    NONE = "none"
    RELU = "relu"  # max(x, 0)
    RELU6 = "relu6"  # min(max(x, 0), 6)
    SILU = "silu"  # x * sigmoid(x)
    SIGMOID = "sigmoid"  # 1 / (1 + exp(-x))
    HARDSIGMOID = "hardsigmoid"  # min(max(x / 6 + 1/2, 0), 1)
    HARDSWISH = "hardswish"  # x * hardsigmoid(x)
    TANH = "tanh"
    ERF = "erf"  # the error function
    GELU = "gelu"  # x * (1 + erf(x / sqrt(2))) / 2
    GELU_TANH = "gelu_tanh"  # x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
    SOFTPLUS = "softplus"  # log(1 + exp(x))
    MISH = "mish"  # x * tanh(softplus(x))


@dataclass(frozen=True)
class Parametric:
    """An activation with numbers of its own: clip(low, high), leaky_relu(slope), elu(alpha); name: of the function in
    gkp.h."""

    name: str
    parameters: tuple[float, ...]


Function = Activation | Parametric

_NOT_AT_ZERO = (Activation.SIGMOID, Activation.HARDSIGMOID, Activation.SOFTPLUS)


def zero_at_zero(function: Function) -> bool:
    """Does it leave zeros zero?"""
    if isinstance(function, Parametric) and function.name == "clip":
        low, high = function.parameters
        return low <= 0 <= high
    return function not in _NOT_AT_ZERO


@dataclass(frozen=True)
class Grid:
    """What the integers of a value stand for: q for (q - zero) * scale. scale: of float32; zero: 0 to 255. Integers lie in
    memory as uint8, whatever the model says: int8 with a zero point z is uint8 with z + 128."""

    scale: float
    zero: int


@dataclass(frozen=True)
class Value:
    """The shape of a value and the type of its elements; its number is its position in Program.values. grid: of integers;
    None for those that stand for themselves."""

    channels: int
    height: int
    width: int
    dtype: DType = FLOAT32
    grid: Grid | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> int:
        return self.channels * self.pixels

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.bytes


@dataclass(frozen=True, eq=False)
class Conv:
    """target = final(activation(conv(source)) + residual). conv.kernel_shape has two axes (1-D: 1 and K).

    residual: a value of the target's shape, or None (then `final` is NONE). A fully connected layer is a 1x1
    convolution of a 1x1 plane.

    Over a source with a grid (conv.scale is given then) the sum is one of integers: of (q - zero) * weight / scale, and of
    the bias in steps of source scale * conv.scale, in int32, exactly; then float32, times that step. The residual may have a
    grid, and so may the target: the result is rounded to it, half to even, and saturated. In pads stands the zero point.
    rounded: of such a convolution with a residual, the grid to which activation(conv(source)) is rounded before."""

    source: int
    target: int
    conv: BranchedConv
    activation: Function = Activation.NONE
    residual: int | None = None
    final: Function = Activation.NONE
    layer: str = ""
    rounded: Grid | None = None


@dataclass(frozen=True, eq=False)
class Depthwise:
    """target = final(activation(conv(source)) + residual), output channel f reads input channel f * C // F only.

    weight: float32 [F, kh, kw] with F a multiple of the source's channels C; bias: float32 [F]; strides and dilations
    (y, x), pads (top, left, bottom, right). scale: as that of a BranchedConv. Over a source with a grid: see Conv."""

    source: int
    target: int
    weight: Floats
    bias: Floats
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    activation: Function = Activation.NONE
    residual: int | None = None
    final: Function = Activation.NONE
    layer: str = ""
    scale: Floats | None = None


@dataclass(frozen=True)
class Pool:
    """Maximum or average over windows. count_pads: padded cells count in the average's divisor (ONNX count_include_pad;
    cells beyond the declared pads, as ceil_mode makes them, never do). Global pooling: kernel = the source's plane."""

    source: int
    target: int
    maximum: bool
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int] = (1, 1)
    count_pads: bool = False


@dataclass(frozen=True)
class Binary:
    """target = activation(a op b), op in add, sub, mul, div, max, min. An operand has the target's size along each axis,
    or 1 and is broadcast."""

    a: int
    b: int
    target: int
    op: str
    activation: Function = Activation.NONE


@dataclass(frozen=True, eq=False)
class ConstantBinary:
    """target = activation(source op constant), op in add, mul. constant: float32 [channels or 1, height or 1, width or 1],
    broadcast to the source's shape."""

    source: int
    target: int
    op: str
    constant: Floats
    activation: Function = Activation.NONE


@dataclass(frozen=True, eq=False)
class Affine:
    """target = activation(source * scale + shift); scale and shift: float32 [channels]."""

    source: int
    target: int
    scale: Floats
    shift: Floats
    activation: Function = Activation.NONE


@dataclass(frozen=True, eq=False)
class Copy:
    """target[first + k, y, x] = source[index[k], offset[0] + y * strides[0], offset[1] + x * strides[1]], or 0 where
    index[k] is -1.

    Several copies may fill one target (Concat): each writes the channels [first, first + len(index))."""

    source: int
    target: int
    index: npt.NDArray[np.int64]
    strides: tuple[int, int] = (1, 1)
    first: int = 0
    offset: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Reshape:
    """target has the source's elements in the same order (channel, row, column), under another shape (Flatten)."""

    source: int
    target: int


@dataclass(frozen=True)
class Paste:
    """target[:, offset[0] + y, offset[1] + x] = source[:, y, x]. Several fill one target (Concat of rows or columns)."""

    source: int
    target: int
    offset: tuple[int, int]


@dataclass(frozen=True)
class Interleave:
    """Phases become one plane (depth to space): target[c, y, x] = source[(py * sx + px) * C + c, qy, qx] with
    y + offsets[0] = qy * sy + py and x + offsets[1] = qx * sx + px, 0 <= py < sy, 0 <= px < sx. strides: (sy, sx); C: the
    target's channels; rows and columns of the source that no element of the target asks for are left out."""

    source: int
    target: int
    strides: tuple[int, int]
    offsets: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Sampling:
    """One axis sampled anew: element k is low * (1 - weight) + high * weight of the source's elements at low[k] and high[k],
    and low alone where weight is 0, whatever lies beside it. low, high: int64 [n]; weight: float32 [n], 0 to 1 (all zero:
    the nearest)."""

    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]
    weight: Floats

    @property
    def nearest(self) -> bool:
        return not self.weight.any()


@dataclass(frozen=True, eq=False)
class Resize:
    """Every plane sampled anew, along the columns and along the rows."""

    source: int
    target: int
    rows: Sampling
    columns: Sampling


@dataclass(frozen=True)
class Softmax:
    """Over the channels of every pixel."""

    source: int
    target: int


@dataclass(frozen=True)
class Reduce:
    """target[o * inner + i] = the sum, mean or max (kind) of source[(o * count + k) * inner + i] over k < count: over all
    channels, or over those of a group that lie `inner` apart, at every pixel."""

    source: int
    target: int
    kind: str
    count: int
    inner: int = 1


@dataclass(frozen=True, eq=False)
class Normalise:
    """target = (source - mean) / sqrt(variance + epsilon) * scale + shift, mean and variance over the channels of every
    pixel (LayerNormalization over channels); scale and shift: float32 [channels]."""

    source: int
    target: int
    epsilon: float
    scale: Floats
    shift: Floats


@dataclass(frozen=True, eq=False)
class PRelu:
    """target = source, times its channel's slope where it is negative; slope: float32 [channels]."""

    source: int
    target: int
    slope: Floats


@dataclass(frozen=True)
class Map:
    """target = function(source), function in abs, exp, reciprocal, sqrt: those that no convolution needs."""

    source: int
    target: int
    function: str


@dataclass(frozen=True)
class Quantise:
    """The target, which has a grid, is the source rounded to it, half to even, and saturated (ONNX QuantizeLinear). The
    source may have another grid."""

    source: int
    target: int


@dataclass(frozen=True)
class Dequantise:
    """target, of float32, is what the source's integers stand for (ONNX DequantizeLinear)."""

    source: int
    target: int


@dataclass(frozen=True)
class Permute:
    """Axis k of the target (channel, row, column) is axis order[k] of the source."""

    source: int
    target: int
    order: tuple[int, int, int]


Step = (Conv | Depthwise | Pool | Binary | ConstantBinary | Affine | Copy | Paste | Interleave | Reshape | Resize | Softmax
        | Reduce | Normalise | PRelu | Map | Permute | Quantise | Dequantise)


@dataclass(frozen=True)
class Port:
    """An input or output of the network: its name in the model, its value, its shape without the batch, and the type of
    the caller's array. An input of uint8 becomes a value of the same numbers, of float32 or on a grid."""

    name: str
    value: int
    shape: tuple[int, ...]
    dtype: DType = FLOAT32

    @property
    def bytes(self) -> int:
        """Of one image."""
        return prod(self.shape) * self.dtype.bytes


@dataclass(frozen=True, eq=False)
class Program:
    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def renamed(step: Step, place: Mapping[int, int]) -> Step:
    """The step with other value numbers; those not in `place` stay."""
    names = ("source", "a", "b", "residual", "target")
    numbers = {name: v for name in names if (v := getattr(step, name, None)) is not None}
    new: Any = {name: place.get(v, v) for name, v in numbers.items()}
    return step if new == numbers else replace(step, **new)


def beside(programs: Sequence[Program]) -> Program:
    """Programs that have nothing to do with each other as one; the ports are numbered."""
    values, steps, inputs, outputs = list[Value](), list[Step](), list[Port](), list[Port]()
    for n, program in enumerate(programs):
        place = {v: v + len(values) for v in range(len(program.values))}
        for ports, own in ((inputs, program.inputs), (outputs, program.outputs)):
            ports += [replace(port, name=f"{n} {port.name}", value=place[port.value]) for port in own]
        steps += [renamed(step, place) for step in program.steps]
        values += program.values
    return Program(tuple(values), tuple(steps), tuple(inputs), tuple(outputs))


def reads(step: Step) -> tuple[int, ...]:
    """The values that a step reads."""
    if isinstance(step, Binary):
        return (step.a, step.b)
    residual: Any = getattr(step, "residual", None)
    return (step.source,) if residual is None else (step.source, residual)
