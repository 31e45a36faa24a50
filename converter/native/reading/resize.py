"""Resize and Upsample: planes of another size, by nearest neighbours or linearly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gkp.converter.graph import Node
from gkp.converter.native.program import Resize, Sampling
from gkp.converter.native.reading.builder import Builder, View
from gkp.converter.native.reading.moves import Refused, constant_ints
from gkp.converter.native.reading.parameters import constant
from gkp.text import clean
from gkp.types import Floats

_HALF = np.float32(0.5)
_UNKNOWN = {"antialias": 0, "exclude_outside": 0, "keep_aspect_ratio_policy": "stretch"}
"""Attributes that are known with this value only."""


@dataclass(frozen=True)
class _Axis:
    """n elements become m. scale: as the model gives it, or m / n; where it is 1, every element stays."""

    n: int
    m: int
    scale: np.float32


def _half_pixel(a: _Axis, k: Floats) -> Floats:
    x: Floats = (k + _HALF) / a.scale - _HALF
    return x


def _pytorch_half_pixel(a: _Axis, k: Floats) -> Floats:
    return _half_pixel(a, k) if a.m > 1 else 0 * k


def _asymmetric(a: _Axis, k: Floats) -> Floats:
    x: Floats = (k / a.scale).astype(np.float32)
    return x


def _align_corners(a: _Axis, k: Floats) -> Floats:
    x: Floats = k * np.float32(a.n - 1) / np.float32(max(1, a.m - 1))
    return x


_COORDINATES: Mapping[str, Callable[[_Axis, Floats], Floats]] = {
    "half_pixel": _half_pixel, "pytorch_half_pixel": _pytorch_half_pixel, "asymmetric": _asymmetric,
    "align_corners": _align_corners}
"""Where element k lies among the source's (ONNX: Resize), in float32 and in this order, as runtimes compute it: which of
two elements is the nearest depends on it."""

_TIE = 1e-6
"""What lies no further from the middle between two elements is there, but for float32's rounding."""


def _tied(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    middle = np.floor(x) + 0.5
    return np.where(np.abs(x - middle) < _TIE, middle, x)


_NEAREST: Mapping[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]] = {
    "floor": np.floor, "ceil": np.ceil, "round_prefer_floor": lambda x: np.ceil(_tied(x) - 0.5),
    "round_prefer_ceil": lambda x: np.floor(_tied(x) + 0.5)}


@dataclass(frozen=True)
class _Mode:
    """old: Upsample, and Resize before opset 11, which have neither of the other two."""

    linear: bool
    coordinates: str
    nearest: str
    old: bool

    def sampling(self, axis: _Axis) -> Sampling:
        k = np.arange(axis.m, dtype=np.float32)
        exact = k if axis.scale == 1 else _COORDINATES[self.coordinates](axis, k)
        x: npt.NDArray[np.float64] = exact.astype(np.float64)
        if self.linear:
            x = np.clip(x, 0, axis.n - 1)
            low = np.floor(x).astype(np.int64)
            return Sampling(low, np.minimum(low + 1, axis.n - 1), (x - low).astype(np.float32))
        if self.old and axis.scale < 1 and (x != np.floor(x)).any():
            raise Refused("before opset 11 it does not say which neighbour a smaller image takes")
        near = np.clip(_NEAREST[self.nearest](x), 0, axis.n - 1).astype(np.int64)
        return Sampling(near, near, np.zeros(axis.m, np.float32))


def resize(b: Builder, node: Node) -> None:
    """Resize and Upsample over the plane."""
    x = node.inputs[0]
    shape = b.shape(x)
    if len(shape) not in (2, 3):
        raise Refused("it is not over one or two spatial axes")
    mode, axes = _mode(node), _axes(b, node, shape)
    if axes[0].m != shape[0] or axes[0].scale != 1:
        raise Refused("it resizes the channels")
    out = (shape[0], *(a.m for a in axes[1:]))
    if min(out) < 1:
        raise Refused("its output is empty")
    declared = node.outputs[0].shape
    if declared is not None and any(isinstance(d, int) and d != m for d, m in zip(declared[1:], out, strict=False)):
        raise Refused(f"its scales give {list(out)} where {list(declared[1:])} is declared")  # by rounding, for one
    if all(a.scale == 1 for a in axes):
        b.bind(node.outputs[0], View(shape, b.number(x)))
        return
    source, target = b.number(x), b.value(out)
    samplings = [mode.sampling(a) for a in axes[1:]]
    rows = samplings[0] if len(samplings) == 2 else mode.sampling(_Axis(1, 1, np.float32(1)))
    b.steps.append(Resize(source, target, rows, samplings[-1]))
    b.bind(node.outputs[0], View(out, target))


def _mode(node: Node) -> _Mode:
    old = node.op == "Upsample" or len(node.inputs) == 2
    kind = str(node.attrs.get("mode", "nearest"))
    if kind not in ("nearest", "linear"):
        raise Refused(f"mode {clean(kind)}")
    for name, known in _UNKNOWN.items():
        if node.attrs.get(name, known) != known:
            raise Refused(f"{name} {clean(str(node.attrs[name]))}")
    coordinates = "asymmetric" if old else str(node.attrs.get("coordinate_transformation_mode", "half_pixel"))
    nearest = "floor" if old else str(node.attrs.get("nearest_mode", "round_prefer_floor"))
    if coordinates not in _COORDINATES:
        raise Refused(f"coordinate_transformation_mode {clean(coordinates)}")
    if nearest not in _NEAREST:
        raise Refused(f"nearest_mode {clean(nearest)}")
    return _Mode(kind == "linear", coordinates, nearest, old)


def _axes(b: Builder, node: Node, shape: tuple[int, ...]) -> list[_Axis]:
    """The channels, then the spatial axes. Refused when the batch is resized too."""
    rank = 1 + len(shape)
    scales, sizes = _given(node)
    count = len(scales if scales is not None else sizes)
    chosen = [int(a) % rank for a in node.attrs.get("axes") or range(rank)]
    if len(chosen) != count or len(set(chosen)) != count:
        raise Refused("its scales or sizes do not fit its input")
    found = [_Axis(n, n, np.float32(1)) for n in shape]
    for place, axis in enumerate(chosen):
        if scales is not None:
            scale = np.float32(scales[place])
            if not 0 < scale < 1 << 20:
                raise Refused("a scale is not positive")
            made = None if axis == 0 else _Axis(shape[axis - 1], int(np.float32(shape[axis - 1]) * scale), scale)
            touched = scale != 1
        else:
            size = sizes[place]
            made = None if axis == 0 else _Axis(shape[axis - 1], size, np.float32(size) / np.float32(shape[axis - 1]))
            touched = size != b.batch
        if made is not None:
            found[axis - 1] = made
        elif touched:
            raise Refused("it resizes the batch")
    return found


def _given(node: Node) -> tuple[list[float] | None, list[int]]:
    """(scales, sizes): one of them; scales None where the sizes are given."""
    if node.op == "Upsample" and "scales" in node.attrs:
        return [float(s) for s in node.attrs["scales"]], []
    places = (1, None) if node.op == "Upsample" or len(node.inputs) == 2 else (2, 3)
    scales = constant(node, places[0])
    if scales is not None and scales.size:
        return [float(s) for s in scales.ravel()], []
    sizes = constant_ints(node, places[1]) if places[1] is not None else None
    if not sizes:
        raise Refused("it has neither scales nor sizes")
    return None, sizes
