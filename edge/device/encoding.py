"""How values travel between devices: as they are, rounded to half precision, or as the integers that they are steps of."""

from __future__ import annotations

import numpy as np

from gkp.edge.plan.schema import Grid, Value
from gkp.types import Array


def wire_dtype(value: Value, wire: str) -> str:
    """The dtype of a value on its way. wire: the plan's."""
    if value.dtype != "float32" or wire == "float32":
        return value.dtype
    if wire == "int8":
        return "float32" if value.grid is None else "uint8"
    return wire


def packed(value: Value, wire: str, array: Array) -> Array:
    """The array as it travels. What does not fit float16 becomes infinity, which the receiver refuses; numbers of a grid are
    the same behind it, to the bit."""
    dtype = wire_dtype(value, wire)
    if dtype == array.dtype:
        return array
    if dtype == "uint8" and value.grid is not None:
        return _integers(value.grid, array)
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def unpacked(value: Value, array: Array) -> Array:
    """The array as segments read it."""
    if array.dtype == value.dtype:
        return array
    if array.dtype == np.uint8 and value.grid is not None:
        found: Array = array.astype(np.float32)
        found -= np.float32(value.grid.zero)
        found *= np.float32(value.grid.scale)
        return found
    return array.astype(value.dtype)


def _integers(grid: Grid, array: Array) -> Array:
    steps = array / np.float32(grid.scale)
    np.rint(steps, out=steps)
    steps += np.float32(grid.zero)
    np.clip(steps, 0, 255, out=steps)
    found: Array = steps.astype(np.uint8)
    return found
