"""Every way to convolve integers gives the same bits as their definition."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from integer_kit import (
    AMX,
    AMX_FLAGS,
    ZEN4,
    Layer,
    check_emulated,
    check_layers,
    layer_ways,
    parameter,
    pixels,
    processors,
    quantised,
    random_layer,
    rebuilt,
    refilled,
)
from native_kit import zig_tools

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.building import toolchain
from gkp.converter.native.dtypes import FLOAT32
from gkp.converter.native.kernels.cpu import CPUS, DOTPROD, I8MM, VECTORS, Cpu
from gkp.converter.native.kernels.integers import direct
from gkp.converter.native.kernels.matrix import direct as matrix
from gkp.converter.native.kernels.prelude import prelude
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.program import Activation, Grid

Rng = np.random.Generator
SORTS = {ZEN4: {"broadcast", "picked 64", "picked 128", "picked 64 rows"}, AMX: {"matrix", "matrix rows"}}


def some_ways(rng: Rng, layer: Layer, cpu: Cpu, most: int) -> list[tuple[Layer, Way]]:
    """Of each sort one at random, but of all sorts at most so many."""
    sorts: dict[str, list[Way]] = {}
    for way in layer_ways(layer, cpu):
        sorts.setdefault(way.sort, []).append(way)
    assert sorts, layer.label
    found = [ways[rng.integers(len(ways))] for ways in sorts.values()]
    return [(layer, found[n]) for n in rng.permutation(len(found))[:most]]


def form(rng: Rng, ins: int, outs: int, branches: Sequence[tuple[Sequence[int], Sequence[int]]], kernel: tuple[int, int] = (3, 3),
         strides: tuple[int, int] = (1, 1), pads: tuple[int, int, int, int] | None = None, dilations: tuple[int, int] = (1, 1)
         ) -> BranchedConv:
    parts = tuple(Branch(np.array(i, np.int64), np.array(o, np.int64), rng.standard_normal((len(o), len(i), *kernel)))
                  for i, o in branches)
    half = tuple(d * (k - 1) // 2 for d, k in zip(dilations, kernel, strict=True))
    return BranchedConv(ins, outs, parts, np.zeros(outs), kernel, strides, pads or (*half, *half), dilations)


def dense(rng: Rng, ins: int, outs: int, kernel: tuple[int, int] = (3, 3), strides: tuple[int, int] = (1, 1)) -> BranchedConv:
    return form(rng, ins, outs, [(range(ins), range(outs))], kernel, strides)


def tmi_gkp(rng: Rng, channels: int, groups: int) -> BranchedConv:
    """Every group reads 9 of 16 channels, and writes any."""
    outs = np.array_split(rng.permutation(channels), groups)
    return form(rng, channels, channels, [(list(rng.permutation(channels)[:channels * 9 // 16]), list(o)) for o in outs])


def corners(rng: Rng) -> dict[str, tuple[BranchedConv, tuple[int, int]]]:
    return {
        "one pixel": (dense(rng, 5, 7), (1, 1)),
        "fully connected": (dense(rng, 70, 130, (1, 1)), (1, 1)),
        "a first layer": (dense(rng, 3, 16, (7, 7), (2, 2)), (15, 17)),
        "groups of two outputs": (tmi_gkp(rng, 16, 8), (9, 9)),
        "groups of eight outputs": (tmi_gkp(rng, 64, 8), (8, 8)),
        "wide groups": (tmi_gkp(rng, 128, 4), (3, 3)),
        "more channels than two windows": (tmi_gkp(rng, 272, 8), (2, 3)),
        "one channel each": (form(rng, 20, 20, [([n], [n]) for n in range(20)]), (5, 6)),
        "no branch": (form(rng, 4, 20, []), (3, 4)),
        "outputs of no branch": (form(rng, 9, 40, [([8, 1], [39, 0])]), (3, 4)),
        "a window larger than the plane": (dense(rng, 3, 4, (7, 7)), (2, 3)),
        "dilation": (form(rng, 7, 9, [(range(7), range(9))], dilations=(2, 3)), (9, 8)),
        "rows that are joined across a dilation": (form(rng, 5, 9, [([0, 4], range(9))], dilations=(1, 3), kernel=(3, 2)), (6, 7)),
        "pads on one side": (form(rng, 5, 6, [(range(5), range(6))], pads=(2, 0, 0, 2)), (5, 7)),
        "strides": (form(rng, 18, 33, [(range(18), range(33))], strides=(2, 3)), (7, 11)),
        "a flat plane": (dense(rng, 33, 48, (1, 1)), (7, 7)),
    }


@pytest.mark.parametrize("cpu", processors())
def test_random_layers(cpu: Cpu) -> None:
    rng = np.random.default_rng(3)
    layers = [random_layer(rng, lanes=cpu.lanes, curves=True) for _ in range(24 if cpu in SORTS else 8)]
    check_layers(rng, [case for layer in layers for case in some_ways(rng, layer, cpu, 2)], cpu)


@pytest.mark.parametrize("cpu", processors())
def test_corners(cpu: Cpu) -> None:
    rng, cases = np.random.default_rng(4), list[tuple[Layer, Way]]()
    for conv, plane in corners(rng).values():
        for pixel in pixels(conv):
            layer = random_layer(rng, conv, plane, cpu.lanes, pixel=pixel)
            cases += some_ways(rng, layer, cpu, 4 if cpu in SORTS else 2)
    check_layers(rng, cases, cpu, parts=(1, 3))
    assert {way.sort for _, way in cases} >= SORTS.get(cpu, set())


@pytest.mark.parametrize("cpu", processors())
def test_sums_that_saturate_at_both_ends(cpu: Cpu) -> None:
    """The largest sums of a layer of 2,304 products, far beyond the target's grid: a clamp, not what is left of them. With
    weights of 8 bits, and of 7."""
    rng, cases = np.random.default_rng(5), list[tuple[Layer, Way]]()
    for low, high in ((-128, 127), (-64, 64)):
        conv = quantised(rng, dense(rng, 256, 32), 1.0)
        signs = np.where(np.arange(32) % 2, high, low)[:, None, None, None]
        assert conv.scale is not None
        weight = (np.ones((32, 256, 3, 3)) * signs * conv.scale[:, None, None, None]).astype(np.float32)
        conv = replace(conv, branches=(replace(conv.branches[0], weight=weight),))
        layer = rebuilt(random_layer(rng, dense(rng, 256, 32), (3, 3), cpu.lanes, residual="none", floats=False), conv)
        for zero in (0, 100, 255):
            made = refilled(layer, Grid(1e-6, zero), np.full_like(layer.q, 255))
            assert set(np.unique(made.expected)) == {0, 255}
            cases += some_ways(rng, made, cpu, 2)
    check_layers(rng, cases, cpu, parts=(1,))


def wide_layers(rng: Rng, lanes: int) -> Iterator[Layer]:
    """1x1 convolutions of so many channels that one more could leave int32: weights of 8 bits, of 7, and the lowest; the first
    pixel is at an end, the other anywhere."""
    for channels, weight, zero in ((66_311, 127, 0), (131_585, -64, 0), (65_792, -128, 255)):
        of = dense(rng, channels, 8, (1, 1))
        one = random_layer(rng, of, (1, 2), lanes, residual="none", floats=False)
        whole = replace(of.branches[0], weight=np.full_like(of.branches[0].weight, weight))
        conv = replace(of, branches=(whole,), scale=np.ones(8, np.float32))
        source = replace(one.source, value=replace(one.source.value, grid=Grid(1.0, zero)))
        q = rng.integers(0, 256, one.q.shape).astype(np.uint8)
        q[..., 0] = 255 - zero
        yield refilled(replace(rebuilt(one, conv), source=source), Grid(1e7, 0 if (weight > 0) == (zero == 0) else 255), q)


@pytest.mark.parametrize("cpu", processors())
def test_sums_at_the_ends_of_int32(cpu: Cpu) -> None:
    rng = np.random.default_rng(10)
    check_layers(rng, [case for layer in wide_layers(rng, cpu.lanes) for case in some_ways(rng, layer, cpu, 1)], cpu, parts=(1,))


@pytest.mark.parametrize("cpu", [parameter(ZEN4, "avx512_vnni", "avx512vbmi"), parameter(AMX, *AMX_FLAGS)])
def test_lanes_without_a_channel_are_zero_for_floats(cpu: Cpu) -> None:
    """Also where the function is not zero at zero, and where the residual's integers there are anything."""
    rng, cases = np.random.default_rng(6), list[tuple[Layer, Way]]()
    for function in (Activation.SIGMOID, Activation.RELU):
        layer = random_layer(rng, dense(rng, 8, 19), (4, 4), residual="integers", floats=True)
        cases += some_ways(rng, replace(layer, step=replace(layer.step, activation=function, final=Activation.NONE), quanta=-1), cpu, 3)
    check_layers(rng, cases, cpu, parts=(1, 2))


@pytest.mark.parametrize(("features", "needs"), [("", ()), ("+v8.2a+dotprod", (DOTPROD,)), ("+v8.6a+i8mm", (DOTPROD, I8MM))],
                         ids=["plain", "dotprod", "i8mm"])
def test_aarch64(features: str, needs: tuple[str, ...]) -> None:
    rng, arm = np.random.default_rng(8), CPUS["aarch64"]
    cpu = replace(arm, flags=(f"-mcpu=generic{features.replace('8.', '8_')}",), instructions=(VECTORS, *needs))
    layers = [random_layer(rng, conv, plane, 4, pixel=pixel) for conv, plane in corners(rng).values() for pixel in pixels(conv)]
    check_emulated(rng, [case for layer in layers for case in some_ways(rng, layer, cpu, 1)], cpu, 2)


@pytest.mark.parametrize("compiler", ["zig", *filter(shutil.which, ("clang++", "g++"))])
@pytest.mark.parametrize("name", sorted(CPUS))
def test_every_sort_compiles_for_every_processor_of_cpu(name: str, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the flags of its name: a processor here with other instructions takes other lines of the same kernel."""
    rng, cpu = np.random.default_rng(9), CPUS[name]
    if compiler == "zig":
        tools = zig_tools()
    elif toolchain.machine(cpu) != platform.machine():
        pytest.skip(f"{compiler} compiles for this machine only")
    else:
        monkeypatch.setenv("GKP_CXX", compiler)
        tools = toolchain.find(cpu)
    layers = [random_layer(rng, tmi_gkp(rng, 32, 4), (5, 5), cpu.lanes, residual="integers", largest=largest) for largest in (64, 127)]
    ways = {way.sort: way for layer in layers for family in (direct.ways, matrix.ways)
            for way in family(layer.step, layer.source, layer.target, layer.residual, cpu)}
    assert "broadcast" in ways
    (tmp_path / "gkp.h").write_text(prelude(cpu))
    for n, way in enumerate(ways.values()):
        (tmp_path / f"kernel_{n}.cpp").write_text(way.trial.recipe.kernel().source)
    toolchain.compile_objects(tmp_path, [f"kernel_{n}.cpp" for n in range(len(ways))], cpu, tools)


@pytest.mark.parametrize("cpu", SORTS, ids=lambda cpu: cpu.name)
def test_a_source_of_floats_is_left_to_others(cpu: Cpu) -> None:
    layer = random_layer(np.random.default_rng(7))
    floats = replace(layer.source.value, dtype=FLOAT32, grid=None)
    assert not list(layer_ways(replace(layer, source=replace(layer.source, value=floats)), cpu))
