"""QuantizeLinear and DequantizeLinear of a file: their parameters, once checked.

ONNX: y = saturate(round(x / scale) + zero_point), x = (y - zero_point) * scale; one scale for the tensor, or one for each
slice of an axis. Here the integers have 8 bits; those of biases, which are only dequantised, 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from gkp.converter.graph import Node, producer, values
from gkp.converter.quantiser import Quantiser
from gkp.errors import FileError, UnsupportedModelError
from gkp.text import clean
from gkp.types import Array

QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
_TYPES = {QUANTISE: ("int8", "uint8"), DEQUANTISE: ("int8", "uint8", "int32")}
_LARGEST = np.finfo(np.float32).max / 256
"""Of a scale: all that its integers stand for is finite."""
_HINT = "quantise the model again"


@dataclass(frozen=True, eq=False)
class Linear:
    """scale: positive float32, [] or, for each slice of `axis`, [n]; zero: integers of the quantised tensor's type, in the
    same shape. axis: None for one scale."""

    scale: Array
    zero: Array
    axis: int | None

    @property
    def quantiser(self) -> Quantiser | None:
        """As one of activations; None for those of an axis and of 32 bits."""
        if self.axis is not None or self.zero.dtype == np.int32:
            return None
        return Quantiser(float(self.scale), int(self.zero), str(self.zero.dtype))


def is_quantise(node: Node | None) -> bool:
    return node is not None and node.op == QUANTISE and not node.domain


def is_dequantise(node: Node | None) -> bool:
    return node is not None and node.op == DEQUANTISE and not node.domain


def linear(node: Node) -> Linear | None:
    """The parameters of either node; None where they are computed, or are not of float32.

    FileError for a scale that is not a positive number, for numbers that do not fit the tensor or each other;
    UnsupportedModelError, by name, for integers of another type than 8 bits and for scales of blocks."""
    given = [values(t) if t.name else None for t in node.inputs[1:3]]
    scale, zero = given[0] if given else None, given[1] if len(given) > 1 else None
    where = f"{node.op} {clean(node.name)}"
    if node.attrs.get("block_size", 0):
        raise UnsupportedModelError(f"{where} has a scale for every {node.attrs['block_size']} elements",
                                    "quantise with one scale for each tensor, or for each filter")
    dtype = _dtype(node, zero)
    if dtype is None:
        return None
    if str(dtype) not in _TYPES[node.op]:
        raise UnsupportedModelError(f"{where} has integers of {dtype}", f"gkp takes int8 and uint8: {_HINT}")
    computed = zero is None and len(node.inputs) > 2 and bool(node.inputs[2].name)
    if scale is None or scale.dtype != np.float32 or computed or _otherwise(node):
        return None
    if not ((scale > 0) & (scale <= _LARGEST)).all() or not scale.size:
        raise FileError(f"the scale of {where} is not a positive number", _HINT)
    if scale.size == 1 and scale < np.finfo(np.float32).tiny and dtype != np.int32:
        raise FileError(f"the scale of {where} is too small: {float(scale):.3g}", _HINT)
    zero = np.zeros(scale.shape, dtype) if zero is None else zero
    if zero.shape != scale.shape and (zero.size, scale.size) != (1, 1):
        raise FileError(f"{where} has {scale.size} scales and {zero.size} zero points", _HINT)
    if dtype == np.int32 and zero.any():
        raise FileError(f"{where} has a zero point for integers of int32", _HINT)
    return _placed(node, scale, zero, where)


def _otherwise(node: Node) -> bool:
    """Does it divide, or give numbers, in another type than float32?"""
    said = node.attrs.get("precision", 0) if node.op == QUANTISE else node.attrs.get("output_dtype", 0)
    return said not in (0, onnx.TensorProto.FLOAT)


def _dtype(node: Node, zero: Array | None) -> Any:
    """Of the integers. FileError when zero point and tensor say different ones."""
    said = node.attrs.get("output_dtype", 0)
    if node.op == QUANTISE:
        if zero is not None:
            return zero.dtype
        return np.dtype(np.uint8) if not said else onnx.helper.tensor_dtype_to_np_dtype(said)
    value = values(node.inputs[0])
    found = node.inputs[0].dtype if value is None else value.dtype
    if zero is not None and found is not None and found != zero.dtype:
        raise FileError(f"{node.op} {clean(node.name)} has a zero point of {zero.dtype} for integers of {found}", _HINT)
    return found if found is not None else None if zero is None else zero.dtype


def _placed(node: Node, scale: Array, zero: Array, where: str) -> Linear:
    shape = node.inputs[0].shape
    if scale.size == 1:
        return Linear(scale.reshape(()), zero.reshape(()), None)
    axis = int(node.attrs.get("axis", 1))
    if scale.ndim != 1 or shape is None or not -len(shape) <= axis < len(shape):
        raise FileError(f"the scales of {where} do not fit its tensor", _HINT)
    count = shape[axis]
    if isinstance(count, int) and count != scale.size:
        raise FileError(f"{where} has {scale.size} scales for {count} slices", _HINT)
    return Linear(scale, zero, axis % len(shape))


def spread(array: Array, axis: int | None, ndim: int) -> Array:
    """One number, or one for each slice of the axis, to compute with a tensor of ndim axes."""
    return array if axis is None else array.reshape([-1 if a == axis else 1 for a in range(ndim)])


def why_left(node: Node) -> str:
    """Why a QuantizeLinear or DequantizeLinear is still there."""
    found = linear(node)
    if found is None:
        return "its parameters are computed, or not of float32"
    if found.axis is not None:
        return "one scale for each slice of an axis"
    if node.op == QUANTISE:
        readers = sorted({clean(n.op) for t in node.outputs for n in t.outputs if not is_dequantise(n)})
        return (f"its integers are read by {', '.join(readers)}" if readers else
                "its integers are an output, or dequantised otherwise")
    source = producer(node.inputs[0])
    if is_quantise(source):
        return "its tensor was quantised otherwise"
    return f"its integers come from {clean(source.op)}" if source is not None else "its integers are an input or constants"
