"""Every way to convolve in float16 computes what the rounded inputs and weights give: sums of small integers exactly, others
as closely as chains of so many roundings do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bfloat_kit import HALF, PLANES, Kind, Layer, Rng, check_emulated, check_layers, layer_ways, random_layer
from conv_kit import random_conv
from integer_kit import has

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.halves.elements import bits
from gkp.converter.native.kernels.way import Way

needs_fp16 = pytest.mark.skipif(not has("avx512_fp16"), reason="this processor has no AVX512-FP16")
ARM = replace(HALF, cpu=CPUS["aarch64-fp16"])
ARM_PLANES = replace(PLANES, cpu=CPUS["aarch64-fp16"])


def some_ways(rng: Rng, layer: Layer, most: int) -> list[tuple[Layer, Way]]:
    """Of each sort one at random, but of all sorts at most so many."""
    sorts: dict[str, list[Way]] = {}
    for way in layer_ways(layer, layer.kind.cpu):
        sorts.setdefault(way.sort, []).append(way)
    assert sorts or layer.kind.planes, layer.label
    found = [ways[rng.integers(len(ways))] for ways in sorts.values()]
    return [(layer, found[n]) for n in rng.permutation(len(found))[:most]]


def dense(rng: Rng, ins: int, outs: int, kernel: int = 3, stride: int = 1) -> BranchedConv:
    weight = rng.standard_normal((outs, ins, kernel, kernel)).astype(np.float32)
    return BranchedConv.from_dense(weight, rng.standard_normal(outs).astype(np.float32), strides=(stride, stride), pads=(kernel // 2,) * 4)


def corners(rng: Rng, kind: Kind) -> list[Layer]:
    found = [((5, 7), (1, 1)), ((70, 130, 1), (1, 1)), ((3, 16, 7, 2), (15, 17)), ((3, 4, 7), (2, 3)), ((33, 48, 1), (7, 7)),
             ((272, 20), (2, 3)), ((1, 1, 1), (1, 1)), ((32, 16), (4, 4))]
    return [random_layer(rng, dense(rng, *shape), plane, of=kind) for shape, plane in found]


def test_numbers_are_rounded_half_to_even() -> None:
    values = np.array([1 + 2 ** -11, 1 + 3 * 2 ** -11, -0.0, 65504, 65520, 2 ** -24], np.float32)
    assert [hex(b) for b in bits(values)] == ["0x3c00", "0x3c02", "0x0", "0x7bff", "0x7c00", "0x1"]


@needs_fp16
@pytest.mark.parametrize("seed", range(2))
def test_random_layers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_layers([case for _ in range(20) for case in some_ways(rng, random_layer(rng, of=HALF), 1)], HALF.cpu, parts=(1, 3))


@needs_fp16
@pytest.mark.parametrize("seed", range(2))
def test_random_layers_in_planes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_layers([case for _ in range(40) for case in some_ways(rng, random_layer(rng, of=PLANES), 1)], HALF.cpu, parts=(1, 3))


@needs_fp16
def test_planes_whose_rows_fill_parts_of_a_vector_or_lie_in_one_line() -> None:
    rng, cases = np.random.default_rng(7), list[tuple[Layer, Way]]()
    for side in (1, 2, 4, 7, 8, 16, 32, 56):
        for _ in range(2):
            layer = random_layer(rng, dense(rng, 12, 9), (side, side), of=PLANES)
            cases += [(layer, way) for way in layer_ways(layer, layer.kind.cpu)][::3]
    assert all(any(text in way.tile for _, way in cases) for text in ("line", "rows", "by tile"))
    check_layers(cases, HALF.cpu, parts=(1, 3))


@needs_fp16
def test_corners() -> None:
    rng = np.random.default_rng(6)
    cases = [case for layer in corners(rng, HALF) for case in some_ways(rng, layer, 3)]
    check_layers(cases, HALF.cpu, parts=(1, 3))
    assert {way.sort for _, way in cases} >= {"broadcast", "picked 32", "picked 64"}


def ones(rng: Rng, kind: Kind) -> Layer:
    """4,608 products of ones in a sum: in float16 alone it would end at 2,048."""
    conv = dense(rng, 512, 16)
    layer = random_layer(rng, conv, (4, 4), plain=True, of=kind)
    conv = replace(conv, branches=(replace(conv.branches[0], weight=np.ones((16, 512, 3, 3), np.float32)),), bias=np.zeros(16, np.float32))
    rows = np.array([2, 3, 3, 2], np.float32)
    return replace(layer, step=replace(layer.step, conv=conv), x=np.ones((512, 4, 4), np.float32),
                   expected=np.broadcast_to(512 * rows[:, None] * rows, (16, 4, 4)), allowed=np.zeros((16, 4, 4)))


@needs_fp16
def test_long_sums_lose_nothing() -> None:
    rng = np.random.default_rng(9)
    check_layers([(layer, way) for layer in (ones(rng, HALF), ones(rng, PLANES)) for way in layer_ways(layer, HALF.cpu, 2)], HALF.cpu, parts=(1,))


def test_aarch64() -> None:
    rng = np.random.default_rng(8)
    layers = [*corners(rng, ARM), *(random_layer(rng, random_conv(rng), of=ARM) for _ in range(6))]
    cases = [case for layer in layers for case in some_ways(rng, layer, 2)]
    cases += [case for _ in range(10) for case in some_ways(rng, random_layer(rng, of=ARM_PLANES), 1)]
    assert {way.sort for _, way in cases} >= {"broadcast", "picked 8", "picked 16", "pixel"}
    check_emulated(cases, 2)
