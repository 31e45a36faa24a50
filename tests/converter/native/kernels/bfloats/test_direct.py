"""Every way to convolve in bfloat16 computes what the rounded inputs and weights give, but for the rounding of float32 sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bfloat_kit import PROCESSORS, Layer, Rng, check_layers, layer_ways, narrow, random_layer
from conv_kit import random_conv
from integer_kit import ZEN4

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.bfloats.elements import bits
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.way import Way

every_processor = pytest.mark.parametrize("cpu", PROCESSORS)


def some_ways(rng: Rng, layer: Layer, cpu: Cpu, most: int) -> list[tuple[Layer, Way]]:
    """Of each sort one at random, but of all sorts at most so many."""
    sorts: dict[str, list[Way]] = {}
    for way in layer_ways(layer, cpu):
        sorts.setdefault(way.sort, []).append(way)
    assert sorts, layer.label
    found = [ways[rng.integers(len(ways))] for ways in sorts.values()]
    return [(layer, found[n]) for n in rng.permutation(len(found))[:most]]


def test_numbers_are_rounded_half_to_even() -> None:
    halves = np.array([0x3f808000, 0x3f818000, 0x3f808001, 0xbf807fff, 0x80000000, 0x7f7fffff], np.uint32).view(np.float32)
    assert [hex(b) for b in bits(halves)] == ["0x3f80", "0x3f82", "0x3f81", "0xbf80", "0x0", "0x7f80"]
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert (np.abs(narrow(values) - values) <= np.abs(values) * 2.0 ** -8).all()
    assert (narrow(narrow(values)) == narrow(values)).all()


@every_processor
@pytest.mark.parametrize("seed", range(2))
def test_random_layers(seed: int, cpu: Cpu) -> None:
    rng = np.random.default_rng(seed)
    check_layers([case for _ in range(20) for case in some_ways(rng, random_layer(rng), cpu, 1)], cpu, parts=(1, 3))


@every_processor
def test_hundreds_of_branch_structures_through_the_same_kernels(cpu: Cpu) -> None:
    """What a branch reads and writes is data: structures of one shape share a source, as far as they need as many panels."""
    rng = np.random.default_rng(5)
    found = list[tuple[Layer, Way]]()
    for _ in range(300 if cpu is ZEN4 else 60):
        conv = random_conv(rng, (3, 3), (1, 1), dilate=False, ins=32, outs=32)
        layer = random_layer(rng, replace(conv, pads=(1, 1, 1, 1)), (6, 6), plain=True)
        found += [(layer, way) for way in layer_ways(layer, cpu, 1)]
    assert len({way.trial.recipe.source for _, way in found}) < 40
    check_layers(found, cpu, parts=(1,))


@every_processor
def test_corners(cpu: Cpu) -> None:
    rng = np.random.default_rng(6)

    def dense(ins: int, outs: int, kernel: int = 3, stride: int = 1) -> BranchedConv:
        weight = rng.standard_normal((outs, ins, kernel, kernel)).astype(np.float32)
        pads = (kernel // 2,) * 4
        return BranchedConv.from_dense(weight, rng.standard_normal(outs).astype(np.float32), strides=(stride, stride), pads=pads)

    corners = [(dense(5, 7), (1, 1)), (dense(70, 130, 1), (1, 1)), (dense(3, 16, 7, 2), (15, 17)), (dense(3, 4, 7), (2, 3)),
               (dense(33, 48, 1), (7, 7)), (dense(272, 20), (2, 3)), (dense(1, 1, 1), (1, 1))]
    check_layers([case for conv, plane in corners for case in some_ways(rng, random_layer(rng, conv, plane), cpu, 2)], cpu, parts=(1, 3))
