"""What the native compiler compiles: a list of steps over values, for one image.

A value is [channels, height, width] (1-D data: height 1; a vector: height and width 1). Steps run in order; each
writes one value once. The batch is not part of a program: images are computed one after another, or side by side by
several threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import FLOAT32, DType
from gkp.types import Floats


class Activation(Enum):
    """Applied to every element x."""

    NONE = "none"
    RELU = "relu"  # max(x, 0)
    RELU6 = "relu6"  # min(max(x, 0), 6)
    SILU = "silu"  # x * sigmoid(x)
    SIGMOID = "sigmoid"  # 1 / (1 + exp(-x))
    HARDSIGMOID = "hardsigmoid"  # min(max(x / 6 + 1/2, 0), 1)
    HARDSWISH = "hardswish"  # x * hardsigmoid(x)


ZERO_AT_ZERO = (Activation.NONE, Activation.RELU, Activation.RELU6, Activation.SILU, Activation.HARDSWISH)
"""They leave zeros zero."""


@dataclass(frozen=True)
class Value:
    """The shape of a value and the type of its elements; its number is its position in Program.values."""

    channels: int
    height: int
    width: int
    dtype: DType = FLOAT32

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
    convolution of a 1x1 plane."""

    source: int
    target: int
    conv: BranchedConv
    activation: Activation = Activation.NONE
    residual: int | None = None
    final: Activation = Activation.NONE
    layer: str = ""


@dataclass(frozen=True, eq=False)
class Depthwise:
    """target = final(activation(conv(source)) + residual), output channel f reads input channel f * C // F only.

    weight: float32 [F, kh, kw] with F a multiple of the source's channels C; bias: float32 [F]; strides and dilations
    (y, x), pads (top, left, bottom, right)."""

    source: int
    target: int
    weight: Floats
    bias: Floats
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    activation: Activation = Activation.NONE
    residual: int | None = None
    final: Activation = Activation.NONE
    layer: str = ""


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
    """target = activation(a op b), op in add, mul, sub, div. a has the target's shape; b is broadcast to it along the axes
    on which its size is 1."""

    a: int
    b: int
    target: int
    op: str
    activation: Activation = Activation.NONE


@dataclass(frozen=True, eq=False)
class ConstantBinary:
    """target = activation(source op constant), op in add, mul. constant: float32 [channels or 1, height or 1, width or 1],
    broadcast to the source's shape."""

    source: int
    target: int
    op: str
    constant: Floats
    activation: Activation = Activation.NONE


@dataclass(frozen=True, eq=False)
class Affine:
    """target = activation(source * scale + shift); scale and shift: float32 [channels]."""

    source: int
    target: int
    scale: Floats
    shift: Floats
    activation: Activation = Activation.NONE


@dataclass(frozen=True, eq=False)
class Copy:
    """target[:, y, x][first + k] = source[index[k], y * strides[0], x * strides[1]], or 0 where index[k] is -1.

    Several copies may fill one target (Concat): each writes the channels [first, first + len(index))."""

    source: int
    target: int
    index: npt.NDArray[np.int64]
    strides: tuple[int, int] = (1, 1)
    first: int = 0


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
    """One axis sampled anew: element k is low + weight * (high - low) of the source's elements at low[k] and high[k]. low,
    high: int64 [n]; weight: float32 [n], 0 to 1 (all zero: the nearest)."""

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


Step = (Conv | Depthwise | Pool | Binary | ConstantBinary | Affine | Copy | Paste | Interleave | Reshape | Resize
        | Softmax)


@dataclass(frozen=True)
class Port:
    """An input or output of the network: its name in the model, its value, and its shape without the batch."""

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


def reads(step: Step) -> tuple[int, ...]:
    """The values that a step reads."""
    if isinstance(step, Binary):
        return (step.a, step.b)
    residual: Any = getattr(step, "residual", None)
    return (step.source,) if residual is None else (step.source, residual)
