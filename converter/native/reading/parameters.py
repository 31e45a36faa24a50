"""What nodes carry besides their data: constant parameters, and the geometry of windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.converter.graph import Node, producer, values, weights
from gkp.converter.native.reading.builder import Border
from gkp.converter.native.reading.moves import Refused
from gkp.errors import UnsupportedModelError
from gkp.text import clean
from gkp.types import Floats


def constant(node: Node, place: int) -> npt.NDArray[np.float64] | None:
    """A constant input in float64, dequantised ones among them; None where it is absent. Refused when it is computed."""
    if len(node.inputs) <= place or not node.inputs[place].name:
        return None
    value = weights(node.inputs[place])
    if value is None or value.dtype.kind not in "fiu":
        raise Refused("its parameters are not constant numbers")
    if not np.isfinite(value).all():
        raise UnsupportedModelError(f"the constants of {clean(node.name)} hold NaN or infinity",
                                    "the checkpoint is damaged or training diverged; use an earlier one")
    exact: npt.NDArray[np.float64] = value.astype(np.float64)
    return exact


def scale_of(node: Node, place: int, axis: int, count: int) -> Floats | None:
    """Of a constant input that is dequantised from int8 with zero points of 0 (gkp.converter.passes.lift_quantisers makes
    all such that fit): float32 [count], a scale for each slice of the axis; None of another."""
    maker = producer(node.inputs[place])
    integers, scale, *zeros = (None, None) if maker is None else [values(t) for t in maker.inputs]
    if maker is None or integers is None or integers.dtype != np.int8 or any(z is None or z.any() for z in zeros) \
            or scale is None or (scale.size > 1 and int(maker.attrs.get("axis", 1)) != axis):
        return None
    return np.broadcast_to(np.asarray(scale, np.float32).ravel(), count)


def floats(node: Node, array: npt.NDArray[np.floating[Any]]) -> Floats:
    """As float32, as long as it stays finite."""
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise Refused("its constants do not fit into float32")
    return narrow


def layer(node: Node) -> str:
    """The node's name, for reports."""
    return clean(node.name)


def geometry(node: Node, plane: tuple[int, ...],
             kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(strides, dilations, pads: begins then ends) with auto_pad resolved (ONNX: Conv)."""
    n = len(plane)
    strides = tuple(int(s) for s in node.attrs.get("strides") or (1,) * n)
    dilations = tuple(int(d) for d in node.attrs.get("dilations") or (1,) * n)
    pads = tuple(int(p) for p in node.attrs.get("pads") or (0,) * 2 * n)
    auto = node.attrs.get("auto_pad", "NOTSET")
    if len(strides) != n or len(dilations) != n or len(pads) != 2 * n or len(kernel) != n \
            or min((*strides, *dilations, *kernel)) < 1 or min(pads) < 0:
        raise Refused("its kernel, strides, pads or dilations do not fit its input")
    if auto == "VALID":
        pads = (0,) * 2 * n
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        total = [max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
                 for size, s, d, k in zip(plane, strides, dilations, kernel, strict=True)]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        pads = (*less, *more) if auto == "SAME_UPPER" else (*more, *less)
    elif auto != "NOTSET":
        raise Refused(f"auto_pad {clean(str(auto))}")
    return strides, dilations, pads


def two(pair: tuple[int, ...]) -> tuple[int, int]:
    """One int per spatial axis as (y, x)."""
    return (1, pair[0]) if len(pair) == 1 else (pair[0], pair[1])


def four(pads: tuple[int, ...]) -> Border:
    """Pads as a tuple of four."""
    top, left, bottom, right = pads
    return top, left, bottom, right
