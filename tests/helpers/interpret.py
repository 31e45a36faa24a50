"""What a program computes, in numpy: the reference that every kernel is tested against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    ConstantBinary,
    Conv,
    Copy,
    Depthwise,
    Dequantise,
    Function,
    Grid,
    Interleave,
    Map,
    Normalise,
    Parametric,
    Paste,
    Permute,
    Pool,
    PRelu,
    Program,
    Quantise,
    Reduce,
    Reshape,
    Resize,
    Sampling,
    Softmax,
    Step,
)
from gkp.errors import UsageError

Array = npt.NDArray[Any]


def interpret(program: Program, inputs: Sequence[Array], *, double: bool = False) -> list[Array]:
    """The outputs [N, *port.shape] for inputs [N, *port.shape], in the order of the ports; any batch N.

    Computed step by step in float32, or in float64 (then the outputs are float64 too). A value with a grid is the numbers
    that its integers stand for. UsageError when the inputs do not fit the ports."""
    dtype = np.float64 if double else np.float32
    if len(inputs) != len(program.inputs):
        raise UsageError(f"{len(inputs)} inputs for a program with {len(program.inputs)}")
    values: dict[int, Array] = {}
    for port, x in zip(program.inputs, inputs, strict=True):
        if np.shape(x)[1:] != port.shape:
            raise UsageError(f"an input of shape {np.shape(x)}, expected [N, {', '.join(map(str, port.shape))}]")
        value = program.values[port.value]
        values[port.value] = on_grid(np.asarray(x, dtype).reshape(-1, *value.shape), value.grid)
    for step in program.steps:
        run_step(program, step, values)
    return [values[port.value].reshape(-1, *port.shape) for port in program.outputs]


def run_step(program: Program, step: Step, values: MutableMapping[int, Array]) -> Array:
    """Compute one step: read its operands from `values` ([N, channels, height, width] by value number), store its
    target there and return it. A Copy fills its channels of the target, a Paste its part of the planes, and leaves the others
    as they are (zero if the target is new)."""
    if isinstance(step, Copy | Paste):
        result = _part(program, step, values)
    elif isinstance(step, Conv | Depthwise):
        result = _convolve(step, values)
    elif isinstance(step, Pool):
        result = _pool(program, step, values[step.source])
    elif isinstance(step, Binary):
        result = activate(step.activation, _BINARY[step.op](values[step.a], values[step.b]))
    elif isinstance(step, ConstantBinary):
        x = values[step.source]
        result = activate(step.activation, _BINARY[step.op](x, step.constant.astype(x.dtype)))
    elif isinstance(step, Interleave):
        result = _interleave(program, step, values[step.source])
    elif isinstance(step, Resize):
        result = _sampled(_sampled(values[step.source], step.rows, 2), step.columns, 3)
    elif isinstance(step, Affine):
        x = values[step.source]
        scale, shift = (v.astype(x.dtype)[:, None, None] for v in (step.scale, step.shift))
        result = activate(step.activation, x * scale + shift)
    elif isinstance(step, Reshape):
        value = program.values[step.target]
        result = values[step.source].reshape(-1, value.channels, value.height, value.width)
    elif isinstance(step, Quantise | Dequantise):
        result = values[step.source]
    else:
        result = _simple(step, values[step.source])
    value = program.values[step.target]
    result = on_grid(result, value.grid)
    if result.shape[1:] != (value.channels, value.height, value.width):
        raise UsageError(f"{type(step).__name__} gives {result.shape[1:]} for a value declared {value}")
    values[step.target] = result
    return result


def on_grid(x: Array, grid: Grid | None) -> Array:
    """The numbers, rounded to a grid and back."""
    if grid is None:
        return x
    steps = np.clip(np.rint(x / np.asarray(grid.scale, x.dtype)) + grid.zero, 0, 255) - grid.zero
    return np.asarray(steps * np.asarray(grid.scale, x.dtype), x.dtype)


def activate(kind: Function, x: Array) -> Array:
    """The activation of every element, in x's dtype."""
    if isinstance(kind, Parametric):
        return np.asarray(_PARAMETRIC[kind.name](x, *kind.parameters), x.dtype)
    done: Array = np.asarray(_ACTIVATIONS[kind](x), x.dtype)
    return done


def _simple(step: Step, x: Array) -> Array:
    """Steps that read one value and change no shape but as they say."""
    if isinstance(step, Reduce):
        groups = x.reshape(len(x), -1, step.count, step.inner, *x.shape[2:])
        y: Array = groups.max(2) if step.kind == "max" else groups.sum(2) / (step.count if step.kind == "mean" else 1)
        return y.reshape(len(x), -1, *x.shape[2:])
    if isinstance(step, Normalise):
        scale, shift = (v.astype(x.dtype)[:, None, None] for v in (step.scale, step.shift))
        root = np.sqrt(x.var(1, keepdims=True) + np.asarray(step.epsilon, x.dtype))
        return np.asarray((x - x.mean(1, keepdims=True)) / root * scale + shift)
    if isinstance(step, PRelu):
        return np.where(x < 0, x * step.slope.astype(x.dtype)[:, None, None], x)
    if isinstance(step, Map):
        return np.asarray(_MAPS[step.function](x), x.dtype)
    if isinstance(step, Permute):
        return x.transpose(0, *(1 + k for k in step.order))
    assert isinstance(step, Softmax)
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


_BINARY: Mapping[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}
_MAPS: Mapping[str, Callable[[Array], Array]] = {"abs": np.abs, "exp": np.exp, "reciprocal": np.reciprocal, "sqrt": np.sqrt}
_PARAMETRIC: Mapping[str, Callable[..., Array]] = {
    "clip": np.clip, "leaky_relu": lambda x, slope: np.where(x < 0, slope * x, x),
    "elu": lambda x, alpha: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)}


def _erf(x: Array) -> Array:
    y: Array = np.vectorize(math.erf, [x.dtype])(x)
    return y


def _erfc(x: Array) -> Array:
    y: Array = np.vectorize(math.erfc, [x.dtype])(x)
    return y


def _softplus(x: Array) -> Array:
    y: Array = np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return y


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))  # never overflows
    y: Array = np.where(x >= 0, 1 / (1 + e), e / (1 + e))
    return y


def _hardsigmoid(x: Array) -> Array:
    y: Array = np.clip(x / 6 + 0.5, 0, 1)
    return y


_ACTIVATIONS: Mapping[Activation, Callable[[Array], Array]] = {
    Activation.NONE: lambda x: x,
    Activation.RELU: lambda x: np.maximum(x, 0),
    Activation.RELU6: lambda x: np.clip(x, 0, 6),
    Activation.SILU: lambda x: x * _sigmoid(x),
    Activation.SIGMOID: _sigmoid,
    Activation.HARDSIGMOID: _hardsigmoid,
    Activation.HARDSWISH: lambda x: x * _hardsigmoid(x),
    Activation.TANH: np.tanh,
    Activation.ERF: _erf,
    Activation.GELU: lambda x: x * _erfc(-x * math.sqrt(0.5)) / 2,
    Activation.GELU_TANH: lambda x: x * _sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x ** 3)),
    Activation.SOFTPLUS: _softplus,
    Activation.MISH: lambda x: x * np.tanh(_softplus(x)),
}


def _convolve(step: Conv | Depthwise, values: Mapping[int, Array]) -> Array:
    x = values[step.source]
    y = activate(step.activation, step.conv(x) if isinstance(step, Conv) else _depthwise(step, x))
    y = on_grid(y, step.rounded if isinstance(step, Conv) else None)
    return y if step.residual is None else activate(step.final, y + values[step.residual])


def _depthwise(step: Depthwise, x: Array) -> Array:
    """The sum over the taps of the plane that each tap sees."""
    f, kh, kw = step.weight.shape
    channel = np.arange(f) * x.shape[1] // f
    form = BranchedConv(1, 1, (), np.zeros(1), (kh, kw), step.strides, step.pads, step.dilations)
    height, width = form.out_shape(x.shape[2:])
    padded = np.pad(x, ((0, 0), (0, 0), step.pads[::2], step.pads[1::2]))[:, channel]
    y: Array = np.broadcast_to(step.bias.astype(x.dtype)[:, None, None], (len(x), f, height, width)).copy()
    for i in range(kh):
        for j in range(kw):
            seen = _window(padded, (i * step.dilations[0], j * step.dilations[1]), step.strides, (height, width))
            y += seen * step.weight[:, i, j].astype(x.dtype)[:, None, None]
    return y


def _window(x: Array, offset: tuple[int, int], strides: tuple[int, int], size: tuple[int, int]) -> Array:
    """x[:, :, offset + k * stride] for k < size, on both axes."""
    rows, columns = (slice(o, o + (n - 1) * s + 1, s) for o, s, n in zip(offset, strides, size, strict=True))
    return x[:, :, rows, columns]


def _pool(program: Program, step: Pool, x: Array) -> Array:
    """Every tap's plane, with a filler outside the input and a plane of counts (0 or 1 per cell) beside it."""
    value = program.values[step.target]
    size = value.height, value.width
    top, left, bottom, right = step.pads
    reach = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(size, step.strides, step.dilations, step.kernel,
                                                                strict=True)]
    inside = np.ones((1, 1, *x.shape[2:]), x.dtype)
    counted = np.pad(inside, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=int(step.count_pads))
    beyond = [(0, max(0, r - n)) for r, n in zip(reach, counted.shape[2:], strict=True)]  # only ceil_mode reaches there
    counted = np.pad(counted, ((0, 0), (0, 0), *beyond))
    widths = ((0, 0), (0, 0), (top, bottom + beyond[0][1]), (left, right + beyond[1][1]))
    padded = np.pad(x, widths, constant_values=-np.inf if step.maximum else 0)
    taps = [(i * step.dilations[0], j * step.dilations[1]) for i in range(step.kernel[0]) for j in range(step.kernel[1])]
    planes = [_window(padded, tap, step.strides, size) for tap in taps]
    if step.maximum:
        largest: Array = np.maximum.reduce(planes)
        return largest
    mean: Array = sum(planes) / sum(_window(counted, tap, step.strides, size) for tap in taps)  # type: ignore[assignment]
    return mean


def _part(program: Program, step: Copy | Paste, values: Mapping[int, Array]) -> Array:
    value, x = program.values[step.target], values[step.source]
    old = values.get(step.target)
    y = np.zeros((len(x), value.channels, value.height, value.width), x.dtype) if old is None else old.copy()
    if isinstance(step, Paste):
        y[:, :, step.offset[0]:step.offset[0] + x.shape[2], step.offset[1]:step.offset[1] + x.shape[3]] = x
        return y
    taken = _window(x, step.offset, step.strides, (value.height, value.width))[:, step.index]
    y[:, step.first:step.first + step.index.size] = np.where((step.index >= 0)[:, None, None], taken, 0)
    return y



def _interleave(program: Program, step: Interleave, x: Array) -> Array:
    """Element by element."""
    value, (sy, sx) = program.values[step.target], step.strides
    y = np.empty((len(x), value.channels, value.height, value.width), x.dtype)
    for row, column in np.ndindex(value.height, value.width):
        (qy, py), (qx, px) = divmod(row + step.offsets[0], sy), divmod(column + step.offsets[1], sx)
        first = (py * sx + px) * value.channels
        y[:, :, row, column] = x[:, first:first + value.channels, qy, qx]
    return y


def _sampled(x: Array, sampling: Sampling, axis: int) -> Array:
    low, high = x.take(sampling.low, axis), x.take(sampling.high, axis)
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = sampling.weight.astype(x.dtype).reshape(shape)
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, low, low * (1 - weight) + high * weight)
