"""Winograd's minimal filtering: exact matrices, and every way that uses them against the direct convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from conv_kit import Chain, chains, check_chains, random_branches, random_conv
from kernel_kit import cpus

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.kernels.layout import channels_last, planar
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.kernels.winograd import cook_toom, rows_fit, tiles_fit
from gkp.converter.native.planning.geometry import Geometry
from gkp.converter.native.planning.ways import conv_ways
from gkp.converter.native.program import Conv, Program, Value


def exact(matrix: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[list[Fraction]]:
    """The fractions that the matrix's floats stand for."""
    return [[Fraction(v).limit_denominator(100_000) for v in row] for row in matrix.tolist()]


def times(matrix: list[list[Fraction]], vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


@pytest.mark.parametrize(("m", "r"), [(2, 3), (4, 3), (6, 3), (3, 2), (5, 2), (2, 5), (4, 5)])
def test_cook_toom_is_exact(m: int, r: int) -> None:
    """F(m, r) on whole numbers, in fractions: every output equals the direct correlation."""
    at, g, bt = cook_toom(m, r)
    n = m + r - 1
    assert (at.shape, g.shape, bt.shape) == ((m, n), (n, r), (n, n))
    for matrix in (at, g, bt):
        assert np.array_equal(matrix, [[float(v) for v in row] for row in exact(matrix)])
    rng = np.random.default_rng(m * 10 + r)
    for _ in range(20):
        d, w = ([Fraction(int(v)) for v in rng.integers(-99, 100, size)] for size in (n, r))
        products = [a * b for a, b in zip(times(exact(g), w), times(exact(bt), d), strict=True)]
        assert times(exact(at), products) == [sum((d[k + j] * w[j] for j in range(r)), Fraction(0)) for k in range(m)]


def test_rounding_errors_stay_small() -> None:
    """In float32 with float32 transforms: about what the tolerance of the kernels is made for."""
    rng = np.random.default_rng(0)
    for m, bound in ((2, 1e-6), (4, 8e-6), (6, 3e-5)):
        at, g, bt = (a.astype(np.float32) for a in cook_toom(m))
        d, w = (rng.standard_normal((size, 2000)).astype(np.float32) for size in (m + 2, 3))
        got = at @ ((g @ w) * (bt @ d))
        want = np.stack([sum(d[k + j].astype(float) * w[j] for j in range(3)) for k in range(m)])
        assert np.abs(got - want).max() <= bound * np.abs(want).max()


# ---- kernels --------------------------------------------------------------------------------------------------------
FEATURES: dict[str, Callable[[Chain], bool]] = {
    **{f"winograd {m}": lambda c, m=m: f"winograd {m}, " in c.label for m in (2, 4)},  # type: ignore[misc]
    **{f"winograd {m}x{m}": lambda c, m=m: f"winograd {m}x{m}, " in c.label for m in (2, 4)},  # type: ignore[misc]
    "rows shorter than a vector": lambda c: "planar" in c.label and c.layouts[-1].value.width < 16 and "Row" in c.kernels[0].source,
    "residuals": lambda c: c.residual is not None,
    "several branches in a vector": lambda c: "groups " in c.label,
    "tiles beyond the plane": lambda c: "4x4" in c.label and c.layouts[-1].value.width % 4 != 0,
    "spare lanes in the source": lambda c: not c.layouts[0].planar and c.layouts[0].padded > c.layouts[0].value.channels,
}


def windows(rng: np.random.Generator, lanes: int) -> tuple[BranchedConv, tuple[int, int]]:
    """A convolution to which some way of Winograd applies, and a plane for it."""
    outs = int(rng.choice([1, 2, 3])) * lanes if rng.integers(2) else int(rng.integers(1, 40))
    conv = random_conv(rng, (3, 3), (1, 1), dilate=False, outs=outs)
    if rng.integers(3):
        conv = replace(conv, pads=(1, 1, 1, 1))
    sides = [2, 4, 5, 8, 12, 16, 20, lanes, lanes + 3, lanes // 2]
    return conv, (int(rng.choice(sides)) - conv.pads[0] - conv.pads[2] + 2, int(rng.choice(sides)) - conv.pads[1] - conv.pads[3] + 2)


def uses_winograd(way: Way) -> bool:
    return "winograd" in way.name


@pytest.mark.parametrize("cpu", cpus())
def test_every_way_of_winograd(cpu: Cpu) -> None:
    rng, cases = np.random.default_rng(cpu.lanes), list[Chain]()
    pairs = [(np.array([2 * n, 2 * n + 1]),) * 2 for n in range(cpu.lanes)]
    narrow = BranchedConv.build(2 * cpu.lanes, 2 * cpu.lanes, [(*p, rng.standard_normal((2, 2, 3, 3)).astype(np.float32)) for p in pairs],
                                kernel_shape=(3, 3), pads=(1, 1, 1, 1))
    cases += chains(rng, narrow, (9, 11), cpu, lambda way: uses_winograd(way) and "groups " in way.name, most=2)
    for conv, plane in (windows(rng, cpu.lanes) for _ in range(32)):
        if min(plane) > 0:
            cases += chains(rng, conv, plane, cpu, uses_winograd, most=2)
    assert [name for name, met in FEATURES.items() if not any(map(met, cases))
            and not (name == "rows shorter than a vector" and cpu.lanes == 4)] == []
    check_chains(cases, cpu)


@pytest.mark.parametrize("cpu", cpus())
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 0, 1, 1), (2, 2, 2, 2), (0, 2, 2, 0)])
def test_pads_that_change_the_plane(cpu: Cpu, pads: tuple[int, int, int, int]) -> None:
    """Source and target of different widths: whatever is offered is right."""
    rng = np.random.default_rng(3)
    conv = BranchedConv(5, cpu.lanes, random_branches(rng, 5, cpu.lanes, (3, 3)), np.ones(cpu.lanes, np.float32), (3, 3), (1, 1), pads,
                        (1, 1))
    plane = 10 - pads[0] - pads[2], cpu.lanes + 2 - pads[1] - pads[3]
    check_chains(chains(rng, conv, plane, cpu, uses_winograd, most=3), cpu)


# ---- what is offered ------------------------------------------------------------------------------------------------
def ways_of(conv: BranchedConv, plane: tuple[int, int], cpu: Cpu) -> list[Way]:
    values = Value(conv.in_channels, *plane), Value(conv.out_channels, *conv.out_shape(plane))
    at = Geometry(tuple({"planar": planar(v, (1, 1, 1, 1), cpu.lanes), "last": channels_last(v, (1, 1, 1, 1), cpu.lanes)} for v in values))
    return conv_ways(Program(values, (Conv(0, 1, conv),), (), ()), at, cpu)[0]


def same(ins: int, outs: int, kernel: tuple[int, int] = (3, 3), strides: tuple[int, int] = (1, 1),
         dilations: tuple[int, int] = (1, 1)) -> BranchedConv:
    rng = np.random.default_rng(0)
    branches = [(range(ins), range(k * outs // 2, (k + 1) * outs // 2), rng.standard_normal((outs // 2, ins, *kernel)).astype(np.float32))
                for k in range(2)]
    return BranchedConv.build(ins, outs, branches, kernel_shape=kernel, pads=(kernel[0] // 2, kernel[1] // 2) * 2,
                              strides=strides, dilations=dilations)


def test_the_input_transform_is_shared_by_the_branches_and_the_products_stay_branched() -> None:
    """F(2 x 2) multiplies 16 times for 4 outputs and not 36 times; F(4 x 4) 36 and not 144; down the columns 4 for 2, 6 for 4."""
    cpu, conv = CPUS["x86-64-v4"], same(32, 32)
    found = {way.name.split(",")[0].removeprefix("conv 3x3 "): way for way in ways_of(conv, (16, 16), cpu) if uses_winograd(way)}
    direct = conv.macs((16, 16))
    assert {name: way.macs / direct for name, way in found.items()} == {
        "winograd 2": 4 / 6, "winograd 4": 6 / 12, "winograd 2x2": 16 / 36, "winograd 4x4": 36 / 144}
    for name, points in (("winograd 2", 4), ("winograd 4", 6), ("winograd 2x2", 16), ("winograd 4x4", 36)):
        before = found[name].before
        assert before is not None
        assert before.y.value.channels == points * 32


@pytest.mark.parametrize("more", [{"strides": (2, 2)}, {"dilations": (2, 2)}], ids=["stride", "dilation"])
def test_other_windows_are_left_alone(more: dict[str, tuple[int, int]]) -> None:
    cpu = CPUS["x86-64-v3"]
    assert not any(map(uses_winograd, ways_of(same(16, 16, **more), (16, 16), cpu)))
    assert not any(map(uses_winograd, ways_of(same(16, 16, (5, 5)), (16, 16), cpu)))
    assert any(map(uses_winograd, ways_of(same(16, 16), (16, 16), cpu)))


def test_a_layer_whose_transformed_weights_are_too_large_is_left_alone() -> None:
    cpu, value = CPUS["x86-64-v4"], Value(512, 14, 14)
    target = channels_last(value, (1, 1, 1, 1), 16)
    assert tiles_fit(Conv(0, 1, same(64, 512)), 4, target, cpu)
    assert not tiles_fit(Conv(0, 1, same(512, 512)), 4, target, cpu)


def test_rows_ask_for_whole_groups_of_rows() -> None:
    cpu, step = CPUS["x86-64-v3"], Conv(0, 1, same(4, 4))
    for height, fits in ((8, (True, True)), (6, (True, False)), (7, (False, False))):
        target = planar(Value(4, height, 16), (1, 1, 1, 1), 8)
        assert tuple(rows_fit(step, m, target, cpu) for m in (2, 4)) == fits
