"""Direct convolutions: every tile of both vectorisations, in every way that the planner may choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from conv_kit import Chain, chains, check_chains, random_conv, random_geometry, random_plane
from kernel_kit import NARROW, cpus

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.kernels import channel, pixel
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.kernels.layout import Kind, channels_last, planar
from gkp.converter.native.kernels.pixel import PixelTile
from gkp.converter.native.kernels.polyphase import polyphase, polyphase_value
from gkp.converter.native.planning.geometry import Geometry
from gkp.converter.native.planning.ways import conv_ways
from gkp.converter.native.program import Activation, Conv, Program, Value

Rng = np.random.Generator

FEATURES: dict[str, Callable[[Chain], bool]] = {
    "lines of pixels": lambda c: " line" in c.label,
    "whole rows": lambda c: " rows" in c.label and "load_rows" not in c.kernels[-1].source,
    "several rows in a vector": lambda c: "load_rows" in c.kernels[-1].source,
    "cells between the rows of a line": lambda c: "keep(" in c.kernels[-1].source,
    "a line shorter than a vector": lambda c: "store_first<" in c.kernels[-1].source,
    "vectors of channels": lambda c: "channel " in c.label,
    "channels in other places": lambda c: "scatter(" in c.kernels[-1].source,
    "channels side by side": lambda c: "first + i" in c.kernels[-1].source,
    "polyphase": lambda c: len(c.kernels) == 2,
    "planes to channels last": lambda c: "planar to last" in c.label,
    "channels last": lambda c: "last to last" in c.label,
    "several branches in a vector": lambda c: "groups " in c.label,
    "regions": lambda c: " in regions" in c.label,
    "residuals": lambda c: c.residual is not None,
    "input first": lambda c: "by tile" in c.label,
}
"""What the tests must have met to prove anything."""


def random_cases(rng: Rng, cpu: Cpu, count: int) -> list[Chain]:
    cases: list[Chain] = []
    for _ in range(count):
        conv = random_conv(rng)
        cases += chains(rng, conv, random_plane(rng, conv), cpu, lambda way: "winograd" not in way.name, most=3)
    return cases


@pytest.mark.parametrize("cpu", cpus())
def test_random_convolutions(cpu: Cpu) -> None:
    check_chains(random_cases(np.random.default_rng(cpu.lanes), cpu, 36), cpu)


# ---- corners --------------------------------------------------------------------------------------------------------
def form(rng: Rng, ins: int, outs: int, branches: Sequence[tuple[Sequence[int], Sequence[int]]], kernel: tuple[int, int] = (3, 3),
         zero: Callable[[np.ndarray[tuple[int, ...], np.dtype[np.float32]]], None] = lambda weight: None, *,
         pads: tuple[int, int, int, int] | None = None, dilations: tuple[int, int] = (1, 1)) -> BranchedConv:
    """A convolution with stride 1 that keeps the plane."""
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    parts = []
    for reads, writes in branches:
        weight = rng.standard_normal((len(writes), len(reads), *kernel)).astype(np.float32)
        weight /= np.float32(np.sqrt(max(1, len(reads) * kernel[0] * kernel[1])))
        zero(weight)
        parts.append(Branch(np.array(reads, np.int64), np.array(writes, np.int64), weight))
    return BranchedConv(ins, outs, tuple(parts), rng.standard_normal(outs).astype(np.float32), kernel, (1, 1),
                        pads or (reach[0] // 2, reach[1] // 2, reach[0] - reach[0] // 2, reach[1] - reach[1] // 2), dilations)


def dense(rng: Rng, ins: int, outs: int, kernel: tuple[int, int] = (3, 3)) -> BranchedConv:
    return form(rng, ins, outs, [(range(ins), range(outs))], kernel)


def groups(rng: Rng, count: int, ins: int, outs: int, kernel: tuple[int, int] = (3, 3)) -> BranchedConv:
    return form(rng, count * ins, count * outs, [(range(n * ins, (n + 1) * ins), range(n * outs, (n + 1) * outs))
                                                 for n in range(count)], kernel)


def zero_all(weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    weight[:] = 0


def zero_most_taps(weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    weight[:, 1::2, 0] = 0
    weight[:, :, 1:, ::2] = 0


def corners(rng: Rng, lanes: int) -> dict[str, tuple[BranchedConv, tuple[int, int]]]:
    return {
        "one pixel": (dense(rng, 5, 7), (1, 1)),
        "one pixel of many channels": (dense(rng, 70, 65, (1, 1)), (1, 1)),
        "two pixels": (dense(rng, 3, 4, (1, 1)), (1, 2)),
        "three pixels": (dense(rng, 3, 4, (1, 3)), (1, 3)),
        "one row": (dense(rng, 3, 9, (1, 5)), (1, 2 * lanes + 3)),
        "one column": (dense(rng, 3, 9, (5, 1)), (2 * lanes + 3, 1)),
        "a window larger than the plane": (dense(rng, 3, 4, (7, 7)), (2, 3)),
        "a vector as wide as two rows": (dense(rng, 8, 8), (6, lanes // 2)),
        "a vector as wide as four rows": (dense(rng, 8, 8), (9, lanes // 4)),
        "a row as wide as a vector": (dense(rng, 8, 8), (5, lanes)),
        "one more than a vector": (dense(rng, 8, 8), (5, lanes + 1)),
        "one less than a vector": (dense(rng, 8, 8), (5, lanes - 1)),
        "the widest rows": (dense(rng, 2, 3), (3, 8 * lanes)),
        "one more than the widest rows": (dense(rng, 2, 3), (3, 8 * lanes + 1)),
        "branches of one output": (form(rng, 6, 5, [([n, 5], [4 - n]) for n in range(5)]), (9, 9)),
        "no branch": (form(rng, 4, 2 * lanes, []), (7, 8)),
        "a branch that reads nothing": (form(rng, 4, 6, [([], [0, 3]), ([2], [1, 5])]), (7, 8)),
        "a branch of zeros": (form(rng, 4, 9, [(range(4), range(9))], zero=zero_all), (8, 8)),
        "zero taps": (form(rng, 16, 16, [(range(12), range(8)), (range(4, 16), range(8, 16))], zero=zero_most_taps), (8, 8)),
        "zero taps in vectors of channels": (form(rng, 16, 3 * lanes, [(range(16), range(3 * lanes))], zero=zero_most_taps), (5, 5)),
        "outputs backwards": (form(rng, 9, 2 * lanes, [(range(9), range(2 * lanes - 1, -1, -1))]), (5, 6)),
        "inputs backwards": (form(rng, 9, 8, [(range(8, -1, -1), range(8))]), (5, 8)),
        "outputs that begin within a vector": (form(rng, 9, 3 * lanes, [(range(9), range(3, 3 + lanes)), ([0, 8], [0, 1])]), (5, 6)),
        "outputs that end within a vector": (form(rng, 9, 2 * lanes, [([0, 8], range(lanes + 1, 2 * lanes)), (range(9), range(lanes + 1))]),
                                             (5, 6)),
        "narrow groups": (groups(rng, 6, 4, 4), (7, 9)),
        "narrow groups that fill no last vector": (groups(rng, 5, 2, 2), (5, 4)),
        "narrow groups of a large window": (groups(rng, 2 * lanes, 1, 1, (5, 7)), (6, 5)),
        "narrow groups, 1x1": (groups(rng, 4 * lanes, 2, 2, (1, 1)), (6, 7)),
        "narrow groups that widen": (groups(rng, 2 * lanes, 1, 2), (6, 7)),
        "narrow groups that overlap": (form(rng, lanes, lanes, [(range(n, n + 3), [n, lanes - 1 - n]) for n in range(lanes // 2)]),
                                       (6, 7)),
        "narrow groups in two orders": (form(rng, 2 * lanes, 2 * lanes, [
            *(([2 * n + 1, 2 * n], [2 * n, 2 * n + 1]) for n in range(lanes // 2)),
            *(([lanes + 2 * n, lanes + 2 * n + 1], [lanes + 2 * n, lanes + 2 * n + 1]) for n in range(lanes // 2))]), (6, 7)),
        "pads on one side": (form(rng, 5, 6, [(range(5), range(6))], pads=(2, 0, 0, 2)), (9, 2 * lanes)),
        "no pads": (form(rng, 5, 6, [(range(5), range(6))], pads=(0, 0, 0, 0)), (9, lanes + 2)),
        "a dilation as wide as the plane": (form(rng, 5, 6, [(range(5), range(6))], dilations=(4, 6)), (5, 7)),
        "a dilation wider than the plane": (form(rng, 5, 6, [([2, 4], range(6))], dilations=(6, 9)), (5, 7)),
        "dilation": (form(rng, 5, 6, [(range(5), range(6))], dilations=(2, 3)), (9, lanes + 5)),
        "float64 weights": (replace(f := dense(rng, 5, 6), branches=(replace(f.branches[0], weight=f.branches[0].weight.astype(float)),)),
                            (8, 8)),
    }


def corner_cases(rng: Rng, cpu: Cpu) -> list[Chain]:
    cases = []
    for name, (conv, plane) in corners(rng, cpu.lanes).items():
        found = chains(rng, conv, plane, cpu, lambda way: "winograd" not in way.name, most=3)
        cases += [replace(c, label=f"{name}: {c.label}") for c in found]
    conv, plane = corners(rng, cpu.lanes)["two pixels"]
    return [*cases, *chains(rng, conv, plane, cpu, lambda way: " line" in way.name, most=2)]


@pytest.mark.parametrize("cpu", cpus())
def test_corners(cpu: Cpu) -> None:
    check_chains(corner_cases(np.random.default_rng(7 * cpu.lanes), cpu), cpu)


@pytest.mark.parametrize("cpu", [NARROW, CPUS["x86-64-v3"], CPUS["x86-64-v4"]], ids=lambda cpu: f"{cpu.lanes} lanes")
def test_the_cases_above_meet_every_kind_of_kernel(cpu: Cpu) -> None:
    cases = random_cases(np.random.default_rng(cpu.lanes), cpu, 36) + corner_cases(np.random.default_rng(7 * cpu.lanes), cpu)
    assert [name for name, met in FEATURES.items() if not any(map(met, cases))] == []


@pytest.mark.parametrize("cpu", cpus()[:1])
def test_every_tile_of_one_layer(cpu: Cpu) -> None:
    """All of them, where the others take some: a plane of vectors that come out even, and one of vectors that do not."""
    rng, cases = np.random.default_rng(0), list[Chain]()
    for plane in ((8, 8), (7, 11)):
        conv = form(rng, 10, 13, [(range(7), range(2, 13)), (range(3, 10), [0])])
        step = Conv(0, 1, conv, Activation.RELU)
        values = Value(10, *plane), Value(13, *plane)
        at = random_geometry(rng, conv, values, cpu.lanes)
        found = chains(rng, conv, plane, cpu, lambda way: "winograd" not in way.name, residual=False, at=at)
        offered = [len((pixel if t == "planar" else channel).tiles(step, at.layouts[0][s], at.layouts[1][t], cpu))
                   for s, t in product(at.kinds(0), at.kinds(1)) if (s, t) != ("last", "planar")]
        assert len(found) == sum(offered)
        cases += found
    check_chains(cases, cpu)


@pytest.mark.parametrize("cpu", cpus())
def test_empty_branches_are_nothing(cpu: Cpu) -> None:
    """Files may hold branches without outputs."""
    rng = np.random.default_rng(1)
    conv = form(rng, 4, 6, [([1, 2], []), ([0, 3], [1, 2]), ([], [])])
    check_chains(chains(rng, conv, (8, 8), cpu, lambda way: "winograd" not in way.name, most=4), cpu)


# ---- what no cache holds --------------------------------------------------------------------------------------------
LARGE = {
    "blocks": (lambda rng: form(rng, 130, 160, [(range(130), range(96)), (range(3, 90), range(96, 160))]), (4, 5), "block == 0"),
    "blocks, some of no tap": (lambda rng: form(rng, 130, 160, [(range(130), range(96)), ([5, 7], range(96, 160))]), (4, 5), "block == 0"),
    "blocks, 1x1": (lambda rng: dense(rng, 1500, 64, (1, 1)), (3, 7), "block == 0"),
    "blocks of zero taps": (lambda rng: form(rng, 300, 96, [(range(300), range(96))], zero=zero_most_taps), (3, 4), "block == 0"),
    "outputs in other places": (lambda rng: form(rng, 100, 99, [(range(100), range(98, -1, -1))]), (3, 4), "prefetch(ahead"),
    "values read and written in turn": (lambda rng: dense(rng, 60, 64, (1, 1)), (66, 80), "prefetch(next_1"),
}
"""Layers, and what their kernels must have."""


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("cpu", cpus())
def test_large_weights_and_values(cpu: Cpu, residual: bool) -> None:
    rng, cases = np.random.default_rng(3), list[Chain]()
    for make, plane, word in LARGE.values():
        conv = make(rng)
        values = Value(conv.in_channels, *plane), Value(conv.out_channels, *plane)
        at = Geometry(tuple({"last": channels_last(v, (conv.pads[0],) * 4 if n == 0 else (0,) * 4, cpu.lanes)}
                            for n, v in enumerate([*values, values[1]])))
        found = chains(rng, conv, plane, cpu, lambda way: way.sort.startswith("channel"), residual=residual, at=at,
                       activation=Activation.NONE if residual else None)  # in blocks the residual is added first
        met = [c for c in found if word in c.kernels[-1].source]
        cases += [met[i] for i in rng.permutation(len(met))[:1]]
        cases += [c for c in met if " in regions" in c.label and c not in cases][:1]
        assert met, word
    check_chains(cases, cpu)


# ---- strides --------------------------------------------------------------------------------------------------------
def phases_of(x: np.ndarray[tuple[int, ...], np.dtype[np.float32]], strides: tuple[int, int], offsets: tuple[int, int], value: Value
              ) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """By the definition in polyphase's docstring, element by element."""
    (sy, sx), (oy, ox), c = strides, offsets, x.shape[0]
    out = np.zeros((value.channels, value.height, value.width), np.float32)
    for py, px, y, column in product(range(sy), range(sx), range(value.height), range(value.width)):
        row, at = y * sy + py - oy, column * sx + px - ox
        if 0 <= row < x.shape[1] and 0 <= at < x.shape[2]:
            first = (py * sx + px) * c
            out[first:first + c, y, column] = x[:, row, at]
    return out


@pytest.mark.parametrize("strides", [(2, 2), (2, 1), (1, 2), (3, 3), (3, 2)])
@pytest.mark.parametrize("dilations", [(1, 1), (2, 1), (2, 3)])
def test_polyphase_equals_the_stride(strides: tuple[int, int], dilations: tuple[int, int]) -> None:
    """On whole numbers, so that equal is equal."""
    rng = np.random.default_rng(0)
    for kernel, pads in product([(1, 1), (2, 2), (3, 3), (1, 5), (4, 3), (7, 7)], [(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 1, 0), (3, 0, 2, 3)]):
        need = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        plane = need[0] + int(rng.integers(0, 4)), need[1] + int(rng.integers(0, 4))
        weights = [rng.integers(-4, 5, (o, i, *kernel)).astype(np.float32) for o, i in ((2, 3), (1, 2))]
        conv = BranchedConv(4, 5, (Branch(np.array([3, 0, 2]), np.array([4, 1]), weights[0]),
                                   Branch(np.array([1, 2]), np.array([2]), weights[1])),
                            rng.integers(-9, 9, 5).astype(np.float32), kernel, strides, pads, dilations)
        x = rng.integers(-8, 9, (4, *plane)).astype(np.float32)
        want = conv(x[None])[0]
        inner, offsets = polyphase(Conv(0, 1, conv, Activation.RELU))
        value = polyphase_value(Conv(0, 1, conv), Value(5, want.shape[1], want.shape[2]))
        assert inner.conv.strides == inner.conv.dilations == (1, 1)
        assert inner.activation is Activation.RELU
        np.testing.assert_array_equal(inner.conv(phases_of(x, strides, offsets, value)[None])[0], want)


def test_polyphase_multiplies_no_more() -> None:
    conv = BranchedConv.from_dense(np.ones((6, 5, 3, 3), np.float32), strides=(2, 2), pads=(1, 1, 1, 1))
    inner, _ = polyphase(Conv(0, 1, conv))
    assert inner.conv.macs((4, 4)) == conv.macs((4, 4))


# ---- what is offered ------------------------------------------------------------------------------------------------
def one_step(conv: BranchedConv, plane: tuple[int, int], cpu: Cpu) -> tuple[Program, Geometry]:
    """The program of one convolution, with small halos."""
    height, width = conv.out_shape(plane)
    values = Value(conv.in_channels, *plane), Value(conv.out_channels, height, width)
    at = Geometry(tuple({"planar": planar(v, (1, 1, 1, 1), cpu.lanes), "last": channels_last(v, (1, 1, 1, 1), cpu.lanes)} for v in values))
    return Program(values, (Conv(0, 1, conv),), (), ()), at


@pytest.mark.parametrize("cpu", CPUS.values(), ids=CPUS)
def test_every_pair_of_layouts_can_be_computed_except_planes_from_channels_last(cpu: Cpu) -> None:
    rng = np.random.default_rng(0)
    for strides in ((1, 1), (2, 2)):
        for width in (4, 8, 16, 17, 200):
            conv = replace(dense(rng, 8, 16), strides=strides)
            program, at = one_step(conv, (16, width), cpu)
            kinds = {way.kinds for way in conv_ways(program, at, cpu)[0]}
            assert kinds == {("planar", "planar"), ("planar", "last"), ("last", "last")}, (strides, width)


def test_planes_whose_rows_do_not_match_lines_are_left_to_vectors_of_channels() -> None:
    cpu, conv = CPUS["x86-64-v4"], dense(np.random.default_rng(0), 4, 4)
    value = Value(4, 9, 9)
    source, target = planar(value, (1, 1, 1, 1), 16), planar(value, (0, 0, 0, 0), 16)
    assert pixel.tiles(Conv(0, 1, conv), source, target, cpu) == []
    assert not pixel.fits(Conv(0, 1, conv), PixelTile(2, 2, True, True), source, target, cpu)
    assert pixel.tiles(Conv(0, 1, conv), source, planar(value, (0, 1, 0, 0), 16), cpu) != []


@pytest.mark.parametrize("cpu", CPUS.values(), ids=CPUS)
def test_tiles_come_best_first_and_no_more_than_asked_for(cpu: Cpu) -> None:
    program, at = one_step(dense(np.random.default_rng(0), 32, 40), (16, 16), cpu)
    step = program.steps[0]
    assert isinstance(step, Conv)
    layouts = at.layouts
    for family, source, target in ((pixel, layouts[0]["planar"], layouts[1]["planar"]),
                                   (channel, layouts[0]["last"], layouts[1]["last"])):
        found, fewer = (family.tiles(step, source, target, cpu, most) for most in (1000, 5))
        for sort in {getattr(tile, "in_regions", False) for tile in found}:
            of_sort, few = ([t for t in tiles if getattr(t, "in_regions", False) == sort] for tiles in (found, fewer))
            seconds = [family.cycles(step, tile, source, target, cpu) for tile in of_sort]
            assert seconds == sorted(seconds)
            assert len(set(of_sort)) == len(of_sort) > 5
            assert few == of_sort[:5]


@pytest.mark.parametrize("kind", ["planar", "last"])
def test_zero_taps_cost_nothing(kind: Kind) -> None:
    """Neither in multiply-accumulates, nor in weights to read, nor by the model."""
    rng, cpu = np.random.default_rng(0), CPUS["x86-64-v4"]

    def center_only(weight: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
        middle = weight[:, ::2, 1, 1].copy()
        weight[:] = 0
        weight[:, ::2, 1, 1] = middle

    whole, holed = (form(rng, 32, 32, [(range(32), range(32))], zero=z) for z in (lambda weight: None, center_only))
    (full,), (few,) = ([next(w for w in conv_ways(*one_step(c, (16, 16), cpu), cpu)[0]
                             if w.kinds == (kind, kind) and "winograd" not in w.name)] for c in (whole, holed))
    assert few.macs == holed.macs((16, 16)) == full.macs // 18
    assert len(few.trial.recipe.draft.fill()) < 0.1 * len(full.trial.recipe.draft.fill())
    assert few.trial.cycles < 0.15 * full.trial.cycles


@pytest.mark.parametrize("kind", ["planar", "last"])
def test_layers_of_one_shape_share_their_source(kind: Kind) -> None:
    """Weights and index lists are data: such layers are compiled once."""
    cpu, recipes = CPUS["x86-64-v3"], []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        branches = [(rng.permutation(16)[:9].tolist(), range(n, n + 4)) for n in (0, 4, 8, 12)]
        program, at = one_step(form(rng, 16, 16, branches), (16, 16), cpu)
        step = program.steps[0]
        assert isinstance(step, Conv)
        family = pixel.ways if kind == "planar" else channel.ways
        recipes.append(next(family(step, at.layouts[0][kind], at.layouts[1][kind], None, cpu)).trial.recipe)
    assert recipes[0].source == recipes[1].source
    assert recipes[0].draft.key == recipes[1].draft.key
    assert recipes[0].draft.fill() != recipes[1].draft.fill()
