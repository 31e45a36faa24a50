"""Convolutions of integers: the exact definition in numpy, random ones, and every way to compute them, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conv_kit import needed_halo, place, random_conv, random_plane
from emulated_kit import emulated
from kernel_kit import PARTS, check_walls, compile_kernels

from gkp.branched import BranchedConv
from gkp.converter.native.building import tiles
from gkp.converter.native.dtypes import FLOAT32, UINT8
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8, AVX_VNNI, BF16, CPUS, MADD, PERMUTE, VECTORS, VNNI, Cpu
from gkp.converter.native.kernels.integers import direct
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import BYTES, WORD, Layout, channels_last, integers
from gkp.converter.native.kernels.matrix import direct as matrix
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.program import Activation, Conv, Function, Grid, Parametric, Value

Array = npt.NDArray[Any]
Rng = np.random.Generator
CLAMPS: tuple[Function, ...] = (Activation.NONE, Activation.RELU, Activation.RELU, Activation.RELU6, Parametric("clip", (-0.5, 1.25)))
CURVES: tuple[Function, ...] = (Activation.SILU, Activation.HARDSWISH, Parametric("leaky_relu", (0.1,)))
_POISON, _GUARD = 0x5a, 256
_NATIVE = ("-march=native", "-mprefer-vector-width=512")
ZEN4 = Cpu("zen4", 16, 32, _NATIVE, instructions=(VECTORS, VNNI, BF16, PERMUTE))
AMX = Cpu("sapphire rapids", 16, 32, _NATIVE, instructions=(VECTORS, VNNI, PERMUTE, AMX_INT8, AMX_BF16))
AMX_FLAGS = ("amx_tile", "amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512vbmi")


def processors() -> list[Any]:
    """Parameters: processors of every kind of instructions that this machine has, the others skipped."""
    avx2, avx512, vnni = ("avx2",), ("avx512bw", "avx512vl"), ("avx512_vnni", "avx512vl")
    found = [(ZEN4, (*vnni, "avx512vbmi")), (AMX, AMX_FLAGS),
             (Cpu("cascade lake", 16, 32, _NATIVE, instructions=(VECTORS, VNNI)), vnni),
             (Cpu("alder lake", 8, 16, _NATIVE, instructions=(VECTORS, MADD, AVX_VNNI)), vnni),  # the same on vectors of 256 bits
             (replace(CPUS["x86-64-v4"], instructions=(VECTORS, MADD)), avx512),
             (replace(CPUS["x86-64-v3"], instructions=(VECTORS, MADD)), avx2),
             (replace(CPUS["x86-64-v3"], lanes=4, name="plain"), avx2)]
    return [parameter(cpu, *flags) for cpu, flags in found]


def parameter(cpu: Cpu, *flags: str) -> Any:
    """The processor, skipped where this machine's lacks one of these, or the kernel denies its tiles."""
    missing = "" if has(*flags) else f"this processor lacks one of {', '.join(flags)}"
    if not missing and AMX_INT8 in cpu.instructions and tiles.refusal():
        missing = f"the kernel denies AMX: {tiles.refusal()}"
    return pytest.param(cpu, id=cpu.name.replace(" ", "-"), marks=pytest.mark.skipif(bool(missing), reason=missing))


def has(*flags: str) -> bool:
    """Does this machine's processor have them, by the kernel's names?"""
    with open("/proc/cpuinfo", encoding="ascii") as file:
        known = next((line.split() for line in file if line.startswith(("flags", "Features"))), [])
    return set(flags) <= set(known)


# ---- the definition -------------------------------------------------------------------------------------------------
def sums(conv: BranchedConv, q: Array, grid: Grid) -> Array:
    """int64 [F, rows, columns] of the integers q [C, H, W]."""
    assert conv.scale is not None
    scale = conv.scale.astype(np.float64)
    whole = tuple(replace(b, weight=np.rint(b.weight / scale[b.out_index].reshape(-1, 1, 1, 1))) for b in conv.branches)
    bias = np.rint(conv.bias.astype(np.float64) / (np.float64(grid.scale) * scale))
    exact = replace(conv, branches=whole, bias=bias, scale=None)
    return np.rint(exact((q.astype(np.float64) - grid.zero)[None])[0]).astype(np.int64)


def outcome(step: Conv, acc: Array, source: Value, target: Value, residual: Value | None, r: Array | None) -> Array:
    """Of the sums: uint8, or float32."""
    assert source.grid is not None
    assert step.conv.scale is not None
    first = clamp_of(step.activation) is not None
    folds = target.grid is not None and (first or step.rounded is not None) and clamp_of(step.final) is not None
    unit = target.grid.scale if folds and target.grid else 1.0
    before = unit if step.rounded is None else step.rounded.scale if first else 1.0
    factor = np.float32(source.grid.scale * step.conv.scale.astype(np.float64) / before)
    u = _apply(step.activation, acc.astype(np.float32) * factor[:, None, None], before)
    if step.rounded is not None:
        u = u if first else u * np.float32(1 / step.rounded.scale)
        zero = step.rounded.zero
        u = np.rint(np.clip(u, np.float32(-zero), np.float32(255 - zero))) * np.float32(step.rounded.scale / unit)
    if residual is not None:
        assert r is not None
        number = r.astype(np.float32) - np.float32(residual.grid.zero) if residual.grid else r
        added = np.float32((residual.grid.scale if residual.grid else 1.0) / unit)
        u = np.float32(number.astype(np.float64) * np.float64(added) + u.astype(np.float64))
        u = _apply(step.final, u, unit)
    if target.grid is None:
        return np.asarray(u, np.float32)
    if not folds:
        u = u * np.float32(1 / target.grid.scale)
    return np.asarray(np.clip(np.rint(u).astype(np.float64) + target.grid.zero, 0, 255), np.uint8)


def clamp_of(function: Function) -> tuple[float, float] | None:
    if isinstance(function, Parametric):
        return (function.parameters[0], function.parameters[1]) if function.name == "clip" else None
    return {Activation.NONE: (-np.inf, np.inf), Activation.RELU: (0, np.inf), Activation.RELU6: (0, 6)}.get(function)


def _apply(function: Function, u: Array, unit: float) -> Array:
    bounds = clamp_of(function)
    if bounds is not None:
        return np.clip(u, np.float32(bounds[0] / unit), np.float32(bounds[1] / unit))
    v = u.astype(np.float64)
    with np.errstate(over="ignore"):
        found = {Activation.SILU: v / (1 + np.exp(-v)), Activation.HARDSWISH: v * np.clip(v / 6 + 0.5, 0, 1)}
    return np.float32(np.where(v < 0, v * 0.1, v) if isinstance(function, Parametric) else found[function])


# ---- random layers --------------------------------------------------------------------------------------------------
def quantised(rng: Rng, conv: BranchedConv, step: float, largest: int = 127) -> BranchedConv:
    """Weights from -largest to largest times a scale of each output."""
    scale = rng.uniform(0.5, 2, conv.out_channels).astype(np.float32) * np.float32(0.01)
    parts = []
    for b in conv.branches:
        whole = np.where(b.weight != 0, rng.integers(-largest, largest + 1, b.weight.shape), 0)
        parts.append(replace(b, weight=(whole * scale[b.out_index].reshape(-1, 1, 1, 1)).astype(np.float32)))
    bias = (rng.integers(-20000, 20000, conv.out_channels) * (scale * np.float32(step))).astype(np.float32)
    return replace(conv, branches=tuple(parts), bias=bias, scale=scale)


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution between layouts, what it is fed with, and what comes out."""

    step: Conv
    source: Layout
    target: Layout
    residual: Layout | None
    q: Array
    r: Array | None
    expected: Array
    quanta: int
    """By how many steps a result may be off; of floats, 1: by what functions may; -1: it is not looked at."""

    @property
    def label(self) -> str:
        c = self.step.conv
        return (f"{self.source.value} to {self.target.value}, residual {self.residual and self.residual.value}, kernel "
                f"{c.kernel_shape}, strides {c.strides}, pads {c.pads}, dilations {c.dilations}, branches "
                f"{[b.weight.shape[:2] for b in c.branches]}, {self.step.activation}, {self.step.final}")


def random_layer(rng: Rng, conv: BranchedConv | None = None, plane: tuple[int, int] | None = None, lanes: int = 16,
                 curves: bool = False, residual: str | None = None, floats: bool | None = None, largest: int | None = None,
                 pixel: int | None = None) -> Layer:
    """Of any structure, and weights of 7 or 8 bits, if none is given. The target's grid is one that the results fill, or
    overflow. pixel: of the source's layout."""
    grid = Grid(float(np.float32(rng.uniform(0.005, 0.1))), int(rng.choice([0, 1, 77, 128, 255])))
    conv = quantised(rng, conv or random_conv(rng), grid.scale, largest or int(rng.choice([64, 127])))
    plane = plane or random_plane(rng, conv)
    source = Value(conv.in_channels, *plane, UINT8, grid)
    q = rng.integers(0, 256, (conv.in_channels, *plane)).astype(np.uint8)
    acc = sums(conv, q, grid)
    assert conv.scale is not None
    spread = float(np.abs(acc * conv.scale[:, None, None] * grid.scale).mean()) + 0.01
    curved = curves and rng.integers(2)
    functions = CURVES if curved else CLAMPS
    step = Conv(0, 1, conv, functions[rng.integers(len(functions))])
    to_floats = bool(rng.integers(4) == 0) if floats is None else floats
    own = Grid(float(np.float32(spread * rng.choice([0.002, 0.01, 0.05]))), int(rng.choice([0, 0, 3, 128, 255])))
    target = Value(conv.out_channels, *acc.shape[1:], *((FLOAT32, None) if to_floats else (UINT8, own)))
    kind = residual or rng.choice(["none", "integers", "floats"])
    other, r = None, None
    if kind != "none":
        step = replace(step, residual=2, final=functions[rng.integers(len(functions))])
        if rng.integers(2):
            step = replace(step, rounded=Grid(float(np.float32(spread * rng.choice([0.01, 0.05]))), int(rng.choice([0, 128, 131]))))
        other = replace(target, dtype=FLOAT32, grid=None)
        r = (rng.standard_normal(acc.shape) * spread).astype(np.float32)
        if kind == "integers":
            other = replace(other, dtype=UINT8, grid=Grid(float(np.float32(spread / 64)), int(rng.choice([0, 5, 128]))))
            r = rng.integers(0, 256, acc.shape).astype(np.uint8)
    more = rng.integers(0, 2, 4) * rng.integers(0, 3)
    halos = [tuple(map(int, h)) for h in (more + needed_halo(conv, source, target), rng.integers(0, 3, 4) * rng.integers(0, 2))]
    pixel = pixel or int(rng.choice(pixels(conv)))
    layouts = [_layout(v, halos[n % 2], lanes, pixel if n == 0 else BYTES)
               for n, v in enumerate((source, target, other)) if v is not None]
    expected = outcome(step, acc, source, target, other, r)
    return Layer(step, layouts[0], layouts[1], layouts[2] if other else None, q, r, expected, 1 if curved else 0)


def pixels(conv: BranchedConv) -> tuple[int, ...]:
    """What the pixels of its source may be padded to."""
    return (WORD, BYTES) if conv.in_channels <= WORD else (BYTES,)


def _layout(value: Value, halo: Any, lanes: int, pixel: int) -> Layout:
    return channels_last(value, halo, lanes) if value.grid is None else integers(value, halo, pixel)


def rebuilt(layer: Layer, conv: BranchedConv) -> Layer:
    """With other weights, and no function; what comes out is to be told by `refilled`."""
    return replace(layer, step=replace(layer.step, conv=conv, activation=Activation.NONE))


def refilled(layer: Layer, target: Grid, q: Array) -> Layer:
    """With another grid of the target, and other integers. No residual."""
    source, value = layer.source.value, replace(layer.target.value, grid=target)
    assert source.grid is not None
    expected = outcome(layer.step, sums(layer.step.conv, q, source.grid), source, value, None, None)
    return replace(layer, target=replace(layer.target, value=value), q=q, expected=expected)


# ---- running --------------------------------------------------------------------------------------------------------
def layer_ways(layer: Layer, cpu: Cpu, most: int = 6) -> Iterator[Way]:
    """Of a processor with AMX those by matrices: it has the others from those without."""
    family = matrix.ways if AMX_INT8 in cpu.instructions else direct.ways
    return family(layer.step, layer.source, layer.target, layer.residual, cpu, most)


class Memory:
    """Bytes at a multiple of 64, `shift` off, between guards."""

    def __init__(self, content: bytes | Array, shift: int = 0) -> None:
        flat = np.frombuffer(bytes(content), np.uint8)
        self._all = np.full(flat.size + 2 * _GUARD + 128, _POISON, np.uint8)
        self._start = _GUARD + (-(self._all.ctypes.data + _GUARD) % 64) + shift
        self.flat = self._all[self._start:self._start + flat.size]
        self.flat[:] = flat
        self.before = flat.copy()

    @property
    def address(self) -> int:
        return self._all.ctypes.data + self._start

    @property
    def guards_hold(self) -> bool:
        return bool((np.concatenate([self._all[:self._start], self._all[self._start + self.flat.size:]]) == _POISON).all())


def filled(rng: Rng, layout: Layout, values: Array | None) -> Memory:
    """The elements, the zero point around them, and anything where no channel is. values None: nothing yet."""
    v = layout.value
    if v.grid is None:
        flat = np.zeros(layout.size, np.float32)
    else:
        flat = np.full(layout.size, v.grid.zero, np.uint8)
        pixels = layout.origin + np.arange(v.height)[:, None, None] * layout.row + np.arange(v.width)[:, None] * layout.column
        flat[pixels + np.arange(layout.padded)] = rng.integers(0, 256, layout.padded)
    if values is not None:
        flat[place(layout)] = values
    return Memory(flat.tobytes())


def check_layers(rng: Rng, cases: Sequence[tuple[Layer, Way]], cpu: Cpu, parts: Iterable[int] = PARTS) -> None:
    """Compiles all of them together; every kernel in every number of parts, and beside memory that nobody may touch."""
    kernels = [way.trial.recipe.kernel() for _, way in cases]
    sources = {source: n for n, source in enumerate(dict.fromkeys(k.source for k in kernels))}
    functions = compile_kernels([Kernel(_spaced(source, n)) for source, n in sources.items()], cpu)
    for (layer, way), kernel in zip(cases, kernels, strict=True):
        for n in parts:
            _check(rng, layer, kernel, functions[sources[kernel.source]], n, f"{way.name}, {n} parts: {layer.label}")
    check_walls([(f"{way.name}: {layer.label}", partial(_operands, rng, layer, kernel), functions[sources[kernel.source]])
                 for (layer, way), kernel in zip(cases, kernels, strict=True)])


def _operands(rng: Rng, layer: Layer, kernel: Kernel) -> list[Array]:
    r = filled(rng, layer.residual, layer.r).flat if layer.residual else np.zeros(4, np.uint8)
    return [filled(rng, layer.source, layer.q).flat, r, filled(rng, layer.target, None).flat, np.frombuffer(kernel.data, np.uint8)]


def _spaced(source: str, number: int) -> str:
    """With a namespace of its own, so that several kernels fit into one file."""
    include = '#include "gkp.h"\n'
    return f"{include}namespace n{number} {{\n{source.removeprefix(include)}\n}}\n"


def check_emulated(rng: Rng, cases: Sequence[tuple[Layer, Way]], cpu: Cpu, parts: int) -> None:
    """On an emulated processor: what the targets hold."""
    kernels = [way.trial.recipe.kernel() for _, way in cases]
    operands = [_operands(rng, layer, kernel)[:3] for (layer, _), kernel in zip(cases, kernels, strict=True)]
    spaced = [Kernel(_spaced(k.source, n), k.data) for n, k in enumerate(kernels)]
    for (layer, way), given, got in zip(cases, operands, emulated(spaced, operands, cpu, parts), strict=True):
        _check_target(layer, got, given[2], f"{way.name}: {layer.label}")


def _check(rng: Rng, layer: Layer, kernel: Kernel, function: Any, parts: int, what: str) -> None:
    x, y = filled(rng, layer.source, layer.q), filled(rng, layer.target, None)
    r = filled(rng, layer.residual, layer.r) if layer.residual else None
    data = Memory(kernel.data)
    for part in reversed(range(parts)):
        function(x.address, r.address if r else None, y.address, data.address, part, parts)
    assert all(b.guards_hold for b in (x, y, data, *([r] if r else []))), f"{what}: writes out of bounds"
    assert all((b.flat == b.before).all() for b in (x, data, *([r] if r else []))), f"{what}: overwrites its input"
    _check_target(layer, y.flat, y.before, what)
    other, target = layer.residual, layer.target
    if r and other and (other.origin, other.bytes, other.value.dtype) == (target.origin, target.bytes, target.value.dtype):
        both = filled(rng, other, layer.r)
        before = Memory(both.before)
        for part in reversed(range(parts)):
            function(x.address, both.address, both.address, data.address, part, parts)
        _check_target(layer, both.flat, before.flat, f"{what}, over the residual")


def _check_target(layer: Layer, after: Array, untouched: Array, what: str) -> None:
    kept = np.ones(layer.target.size, bool)
    v, where = layer.target.value, place(layer.target)
    kept[layer.target.origin + np.arange(v.height)[:, None, None] * layer.target.row
         + np.arange(v.width)[:, None] * layer.target.column + np.arange(layer.target.padded)] = False
    flat, before = (a.view(v.dtype.numpy) for a in (after, untouched))
    assert (flat[kept] == before[kept]).all(), f"{what}: writes into the halo"
    if v.grid is None:
        spare = np.ones(flat.size, bool)
        spare[where] = False
        assert (flat[spare] == 0).all(), f"{what}: lanes without a channel are not zero"
    got = flat[where]
    if layer.quanta < 0:
        return
    if layer.quanta and v.grid is None:
        wrong = ~np.isclose(got, layer.expected, rtol=1e-5, atol=1e-5 * float(np.abs(layer.expected).max()))
    elif layer.quanta:
        wrong = np.abs(got.astype(int) - layer.expected) > layer.quanta
    else:
        wrong = got != layer.expected
    assert not wrong.any(), (f"{what}: {wrong.sum()} of {wrong.size} wrong, first at {np.argwhere(wrong)[0]}: {got[wrong][0]} "
                             f"for {layer.expected[wrong][0]}")
