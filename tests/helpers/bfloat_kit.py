"""Convolutions of floats of 16 bits: random ones, their results in float64, how far float32 sums may be from these, and every
way to compute them.

Sums in float16 depend on their order. So its layers multiply small integers, of which chains of float16 lose nothing: then a
result may be as far off as float32 sums are, and one product too few is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from conv_kit import needed_halo, place, random_conv, random_plane
from emulated_kit import emulated
from integer_kit import AMX, AMX_FLAGS, ZEN4, Memory, parameter
from kernel_kit import PARTS, check_walls, compile_kernels

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import BFLOAT16, FLOAT16, DType
from gkp.converter.native.kernels.bfloats import direct as bfloats
from gkp.converter.native.kernels.bfloats.elements import bits
from gkp.converter.native.kernels.cpu import AMX_BF16, FP16, VECTORS, Cpu
from gkp.converter.native.kernels.halves import direct as halves
from gkp.converter.native.kernels.halves import pixel
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout, channels_last, narrow_planes, narrowed
from gkp.converter.native.kernels.matrix import direct as matrix
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.program import Activation, Conv, Function, Parametric, Value

Array = npt.NDArray[Any]
Rng = np.random.Generator
FUNCTIONS: tuple[Function, ...] = (Activation.NONE, Activation.RELU, Activation.RELU, Activation.RELU6, Activation.SIGMOID,
                                   Parametric("leaky_relu", (0.1,)))
"""None is steeper than the identity, so that errors do not grow."""
PROCESSORS = [parameter(ZEN4, "avx512_bf16", "avx512_vnni"), parameter(AMX, *AMX_FLAGS)]
_EPSILON = 2.0 ** -24


@dataclass(frozen=True)
class Kind:
    """Of floats. ways: the family of their kernels; half_step: by how much rounding changes a number, relative to it; numbers: at
    random, which are rounded then; planes: they lie in these, all of 16 bits."""

    dtype: DType
    cpu: Cpu
    ways: Callable[..., Iterator[Way]]
    half_step: float
    numbers: Callable[[Rng, Sequence[int]], Array]
    planes: bool = False

    def bits(self, values: Array) -> Array:
        return bits(values) if self.dtype == BFLOAT16 else values.astype(np.float16).view(np.uint16)

    def widened(self, halves: Array) -> Array:
        if self.dtype == BFLOAT16:
            return (halves.astype(np.uint32) << 16).view(np.float32)
        return halves.view(np.float16).astype(np.float32)

    def narrow(self, values: Array) -> Array:
        """float32, rounded."""
        return self.widened(self.bits(np.asarray(values, np.float32)))


def _integers(rng: Rng, shape: Sequence[int]) -> Array:
    return rng.integers(-3, 4, shape).astype(np.float32)


BF16 = Kind(BFLOAT16, ZEN4, bfloats.ways, 2.0 ** -8, lambda rng, shape: rng.standard_normal(shape))
SAPPHIRE_RAPIDS = Cpu("sapphire rapids", 16, 32, ZEN4.flags, instructions=(VECTORS, FP16))
HALF = Kind(FLOAT16, SAPPHIRE_RAPIDS, halves.ways, 2.0 ** -11, _integers)
PLANES = replace(HALF, ways=pixel.ways, planes=True)
narrow = BF16.narrow


def _apply(function: Function, v: Array) -> Array:
    if isinstance(function, Parametric):
        return np.where(v < 0, v * np.float64(np.float32(0.1)), v)
    bounds = {Activation.RELU: (0, np.inf), Activation.RELU6: (0, 6)}.get(function)
    if function is Activation.SIGMOID:
        return np.asarray(1 / (1 + np.exp(-v)))
    return v if bounds is None else np.clip(v, *bounds)


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution between layouts, what it is fed with, what comes out, and by how much that may be off."""

    step: Conv
    source: Layout
    target: Layout
    residual: Layout | None
    x: Array
    r: Array | None
    expected: Array
    allowed: Array
    kind: Kind = BF16

    @property
    def label(self) -> str:
        c = self.step.conv
        return (f"{self.source.value} to {self.target.value}, residual {self.residual and self.residual.value}, kernel "
                f"{c.kernel_shape}, strides {c.strides}, pads {c.pads}, dilations {c.dilations}, branches "
                f"{[b.weight.shape[:2] for b in c.branches]}, {self.step.activation}, {self.step.final}")


def random_layer(rng: Rng, conv: BranchedConv | None = None, plane: tuple[int, int] | None = None, plain: bool = False,
                 of: Kind = BF16) -> Layer:
    """Of any structure, if none is given; to floats of 16 bits or float32, with a residual in either or none. plain: to 16
    bits, without activations, residual and more halo than is needed."""
    conv = conv or random_conv(rng, strides=(1, 1) if of.planes else None)
    if of.dtype == FLOAT16:
        conv = replace(conv, branches=tuple(replace(b, weight=np.where(b.weight == 0, 0, _integers(rng, b.weight.shape)))
                                            for b in conv.branches))
    plane = plane or random_plane(rng, conv)
    x = of.narrow(of.numbers(rng, (conv.in_channels, *plane)))
    exact = replace(conv, branches=tuple(replace(b, weight=of.narrow(b.weight).astype(np.float64)) for b in conv.branches),
                    bias=conv.bias.astype(np.float64))
    sums = exact(x.astype(np.float64)[None])[0]
    largest = replace(exact, branches=tuple(replace(b, weight=np.abs(b.weight)) for b in exact.branches),
                      bias=np.abs(exact.bias))(np.abs(x).astype(np.float64)[None])[0]
    step = Conv(0, 1, conv, FUNCTIONS[0 if plain else rng.integers(len(FUNCTIONS))])
    source, target = Value(conv.in_channels, *plane), Value(conv.out_channels, *sums.shape[1:])
    expected, r, kind = _apply(step.activation, sums), None, "none" if plain else rng.choice(["none", "narrow", "narrow" if of.planes else "float"])
    if kind != "none":
        step = replace(step, residual=2, final=FUNCTIONS[rng.integers(len(FUNCTIONS))])
        r = np.asarray(rng.standard_normal(sums.shape), np.float32)
        r = of.narrow(r) if kind == "narrow" else r
        expected = _apply(step.final, expected + r.astype(np.float64))
        largest = largest + np.abs(r) + 1
    more = rng.integers(0, 2, 4) * rng.integers(0, 1 if plain else 3)
    halos: list[Any] = [tuple(map(int, h)) for h in (more + needed_halo(conv, source, target),
                                                     rng.integers(0, 3, 4) * rng.integers(0, 1 if plain else 2), rng.integers(0, 2, 4))]
    if of.planes:  # those of one size share their halo, and often all their pitch
        halos = [tuple(map(max, *halos))] * 3 if rng.integers(2) else [halos[0], halos[1], halos[1]]
    to_floats = not plain and not of.planes and rng.integers(3) == 0

    def layout(value: Value, halo: Any, wide: bool) -> Layout:
        if of.planes:
            return narrow_planes(value, of.dtype, halo)
        return channels_last(value, halo, of.cpu.lanes) if wide else narrowed(value, of.dtype, halo, of.cpu.lanes)

    layouts = layout(source, halos[0], False), layout(target, halos[1], to_floats)
    other = None if r is None else layout(target, halos[2], kind == "float")
    terms = conv.in_channels * conv.kernel_shape[0] * conv.kernel_shape[1] + 8
    allowed = terms * _EPSILON * largest + 1e-6 + (0 if to_floats else 1.01 * of.half_step * np.abs(expected) + 2.0 ** -25)
    return Layer(step, layouts[0], layouts[1], other, x, r, expected, allowed, of)


def layer_ways(layer: Layer, cpu: Cpu, most: int = 6) -> Iterator[Way]:
    """Of a processor with AMX those by matrices."""
    family = matrix.ways if AMX_BF16 in cpu.instructions else layer.kind.ways
    return family(layer.step, layer.source, layer.target, layer.residual, cpu, most)


def filled(layout: Layout, values: Array | None, kind: Kind) -> Memory:
    """The elements, and zeros around them. values None: nothing yet."""
    flat = np.zeros(layout.size, np.float32)
    if values is not None:
        flat[place(layout)] = values
    return Memory(kind.bits(flat).tobytes() if layout.value.dtype == kind.dtype else flat.tobytes())


def check_layers(cases: Sequence[tuple[Layer, Way]], cpu: Cpu, parts: Iterable[int] = PARTS) -> None:
    """Compiles all of them together; every kernel in every number of parts, and beside memory that nobody may touch."""
    kernels = [way.trial.recipe.kernel() for _, way in cases]
    sources = {source: n for n, source in enumerate(dict.fromkeys(k.source for k in kernels))}
    functions = compile_kernels([Kernel(_spaced(source, n)) for source, n in sources.items()], cpu)
    for (layer, way), kernel in zip(cases, kernels, strict=True):
        for n in parts:
            _check(layer, kernel, functions[sources[kernel.source]], n, f"{way.name}, {n} parts: {layer.label}")
    check_walls([(f"{way.name}: {layer.label}", partial(_operands, layer, kernel), functions[sources[kernel.source]])
                 for (layer, way), kernel in zip(cases, kernels, strict=True)])


def check_emulated(cases: Sequence[tuple[Layer, Way]], parts: int) -> None:
    """On an emulated processor: what the targets hold."""
    kernels = [way.trial.recipe.kernel() for _, way in cases]
    spaced = [Kernel(_spaced(k.source, n), k.data) for n, k in enumerate(kernels)]
    operands = [_operands(layer, kernel)[:3] for (layer, _), kernel in zip(cases, kernels, strict=True)]
    for (layer, way), got in zip(cases, emulated(spaced, operands, cases[0][0].kind.cpu, parts), strict=True):
        _check_target(layer, got, f"{way.name}: {layer.label}")


def _spaced(source: str, number: int) -> str:
    """With a namespace of its own, so that several kernels fit into one file."""
    include, used = '#include "gkp.h"\n', "".join(f"using ::{f};\n" for f in ("load", "load_first", "store", "store_first"))
    return f"{include}namespace n{number} {{\n{used}{source.removeprefix(include)}\n}}\n"


def _operands(layer: Layer, kernel: Kernel) -> list[Array]:
    r = filled(layer.residual, layer.r, layer.kind).flat if layer.residual else np.zeros(4, np.uint8)
    return [filled(layer.source, layer.x, layer.kind).flat, r, filled(layer.target, None, layer.kind).flat, np.frombuffer(kernel.data, np.uint8)]


def _check(layer: Layer, kernel: Kernel, function: Any, parts: int, what: str) -> None:
    x, y = filled(layer.source, layer.x, layer.kind), filled(layer.target, None, layer.kind)
    r = filled(layer.residual, layer.r, layer.kind) if layer.residual else None
    data = Memory(kernel.data)
    for part in reversed(range(parts)):
        function(x.address, r.address if r else None, y.address, data.address, part, parts)
    assert all(b.guards_hold for b in (x, y, data, *([r] if r else []))), f"{what}: writes out of bounds"
    assert all((b.flat == b.before).all() for b in (x, data, *([r] if r else []))), f"{what}: overwrites its input"
    _check_target(layer, y.flat, what)


def _check_target(layer: Layer, after: Array, what: str) -> None:
    where, is_narrow = place(layer.target), layer.target.value.dtype == layer.kind.dtype
    flat = layer.kind.widened(after.view(np.uint16)) if is_narrow else after.view(np.float32)
    beside = np.ones(flat.size, bool)
    beside[where] = False
    assert (flat[beside] == 0).all(), f"{what}: what lies beside the elements is not zero"
    got = flat[where]
    wrong = ~(np.abs(got - layer.expected) <= layer.allowed)
    assert not wrong.any(), (f"{what}: {wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}: {got[wrong][0]} "
                             f"for {layer.expected[wrong][0]}, {layer.allowed[wrong][0]} allowed")
