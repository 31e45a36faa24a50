"""The layouts that each value may have: planes, or channels last; in a network in bf16 or fp16 also in floats of 16 bits."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.converter.native.dtypes import FLOAT16, DType
from gkp.converter.native.kernels.layout import (
    BYTES,
    WORD,
    Halo,
    Kind,
    Layout,
    channels_last,
    integers,
    narrow_planes,
    narrowed,
    planar,
)
from gkp.converter.native.kernels.steps import knows_narrow
from gkp.converter.native.program import Conv, Depthwise, Program, Value, reads

_PLANES: tuple[Kind, ...] = ("planar", "narrow planes")


@dataclass(frozen=True)
class Geometry:
    """layouts[value][kind]: a value has the kinds that it may be written in. Planar values of one plane size share their
    halo, so that lines of pixels and residuals match; a 1x1 plane is always a vector of channels, and integers lie channels
    last."""

    layouts: tuple[dict[Kind, Layout], ...]

    def kinds(self, value: int) -> tuple[Kind, ...]:
        found = self.layouts[value]
        flat = found["last"].value.pixels == 1
        return tuple(kind for kind in found if not (flat and kind in _PLANES))

    def kind(self, value: int, wanted: Kind) -> Kind:
        """The wanted one, where the value may have it."""
        return wanted if wanted in self.kinds(value) else "last"


def geometry(program: Program, lanes: int, narrow: DType | None = None) -> Geometry:
    """The halo of a value is what its convolutions read beyond the plane. narrow: to floats of this type values may be
    rounded. Outputs and what only kernels of float32 write are not. Planes of float16 hold what the caller gives and
    convolutions write."""
    halos: list[Halo] = [(0, 0, 0, 0)] * len(program.values)
    for step in program.steps:
        if isinstance(step, Conv | Depthwise):
            halos[step.source] = _join(halos[step.source], _needed(step, program.values))
    planes: dict[tuple[int, int], Halo] = {}
    for value, halo in zip(program.values, halos, strict=True):
        if value.grid is not None:
            continue
        key = (value.height, value.width)
        planes[key] = _join(planes.get(key, (0, 0, 0, 0)), halo)
    wide = {port.value for port in program.outputs} | {step.target for step in program.steps if not knows_narrow(step)}
    other = {step.target for step in program.steps if not isinstance(step, Conv)}
    words = _words(program)
    found = list[dict[Kind, Layout]]()
    for number, (v, halo) in enumerate(zip(program.values, halos, strict=True)):
        if v.grid is not None:
            found.append({"last": integers(v, halo, WORD if number in words else BYTES)})
            continue
        found.append({"planar": planar(v, planes[v.height, v.width], lanes), "last": channels_last(v, halo, lanes)})
        if narrow is not None and number not in wide:
            found[-1]["narrow"] = narrowed(v, narrow, halo, lanes)
            if narrow == FLOAT16 and number not in other:
                found[-1]["narrow planes"] = narrow_planes(v, narrow, planes[v.height, v.width])
    return Geometry(tuple(found))


def _words(program: Program) -> set[int]:
    """Values of integers whose pixels are words: of few channels, that only convolutions read and none writes, as it would
    store whole vectors."""
    windows = {step.source for step in program.steps if isinstance(step, Conv | Depthwise)}
    others = {v for step in program.steps for v in reads(step)[1 if isinstance(step, Conv | Depthwise) else 0:]}
    written = {step.target for step in program.steps if isinstance(step, Conv | Depthwise)}
    return {v for v in windows - others - written if program.values[v].channels <= WORD}


def _join(a: Halo, b: Halo) -> Halo:
    return max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _needed(step: Conv | Depthwise, values: tuple[Value, ...]) -> Halo:
    c = step.conv if isinstance(step, Conv) else step
    kernel = step.conv.kernel_shape if isinstance(step, Conv) else step.weight.shape[2:] if step.weight.ndim == 4 \
        else step.weight.shape[1:]
    source, target = values[step.source], values[step.target]
    top, left = c.pads[0], c.pads[1]
    bottom = (target.height - 1) * c.strides[0] + (kernel[0] - 1) * c.dilations[0] + 1 - top - source.height
    right = (target.width - 1) * c.strides[1] + (kernel[1] - 1) * c.dilations[1] + 1 - left - source.width
    return top, left, max(0, bottom), max(0, right)
