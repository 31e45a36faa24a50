"""Layouts of values: halos that are large enough, and a choice that can always be computed."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from conv_kit import place
from plan_kit import random_program

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.layout import Kind, channels_last, planar
from gkp.converter.native.planning.geometry import Geometry, geometry
from gkp.converter.native.planning.layouts import (
    Times,
    choose_layouts,
    conversion_seconds,
    source_kind,
    step_seconds,
)
from gkp.converter.native.planning.ways import conv_ways
from gkp.converter.native.program import (
    Conv,
    Depthwise,
    Dequantise,
    Grid,
    Interleave,
    Port,
    Program,
    Resize,
    Sampling,
    Value,
)

Rng = np.random.Generator
KINDS: tuple[Kind, Kind] = ("planar", "last")


# ---- memory ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_elements_lie_apart_and_inside_with_the_halo_around_them(lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    for _ in range(60):
        value = Value(*map(int, rng.integers(1, 20, 3)))
        top, left, bottom, right = map(int, rng.integers(0, 4, 4))
        pitch = value.width + max(left, right) + int(rng.integers(0, 3))
        for layout in (planar(value, (top, left, bottom, right), lanes, pitch), planar(value, (top, left, bottom, right), lanes),
                       channels_last(value, (top, left, bottom, right), lanes)):
            where = place(layout)
            assert where.shape == (value.channels, value.height, value.width)
            assert np.unique(where).size == value.size
            assert where[value.channels - 1, 0, 0] == layout.offset(value.channels - 1, 0, 0)
            cells = layout.size - 2 * lanes
            elements = set(where.ravel().tolist())
            for c, y, x in product((0, value.channels - 1), range(-top, value.height + bottom), range(-left, value.width + right)):
                at = layout.offset(c, y, x)
                assert 0 <= at < cells
                inside = 0 <= y < value.height and 0 <= x < value.width
                assert (at in elements) == inside, "a halo cell is another element"


def test_blocks_of_channels_begin_where_they_say() -> None:
    layout = channels_last(Value(32, 1, 5), lanes=16)
    blocked = type(layout)(layout.value, 1, 80, 16, 0, layout.size, 32, block=(16, 80))
    assert blocked.channel_offsets(np.array([0, 15, 16, 31])).tolist() == [0, 15, 80, 95]
    assert layout.channel_offsets(np.array([0, 15, 16, 31])).tolist() == [0, 15, 16, 31]


@pytest.mark.parametrize("seed", range(30))
def test_halos_cover_all_that_is_read_and_planes_of_one_size_match(seed: int) -> None:
    program = random_program(np.random.default_rng(seed))
    at = geometry(program, 8)
    for step in program.steps:
        if not isinstance(step, Conv | Depthwise):
            continue
        c = step.conv if isinstance(step, Conv) else step
        kernel = step.conv.kernel_shape if isinstance(step, Conv) else step.weight.shape[1:]
        target = program.values[step.target]
        for layout in at.layouts[step.source].values():
            lowest = layout.offset(0, -c.pads[0], -c.pads[1])
            last = [(n - 1) * s + (k - 1) * d - p for n, s, k, d, p in zip((target.height, target.width), c.strides, kernel, c.dilations,
                                                                       c.pads, strict=False)]
            highest = layout.offset(layout.value.channels - 1, last[0], last[1])
            assert lowest >= 0
            assert highest < layout.size - 2 * 8
            cells = [layout.offset(0, y, x) for y in (-c.pads[0], last[0]) for x in (-c.pads[1], last[1])
                     if not (0 <= y < layout.value.height and 0 <= x < layout.value.width)]
            assert not np.isin(cells, place(layout)).any(), "reads an element where a zero belongs"
    rows: dict[tuple[int, int], int] = {}
    for found in at.layouts:
        v = found["planar"].value
        assert rows.setdefault((v.height, v.width), found["planar"].row) == found["planar"].row


def test_a_plane_of_one_pixel_is_a_vector_of_channels() -> None:
    program = Program((Value(5, 1, 1), Value(5, 1, 2)), (), (), ())
    at = geometry(program, 4)
    assert at.kinds(0) == ("last",)
    assert at.kinds(1) == KINDS


# ---- the choice -----------------------------------------------------------------------------------------------------
def some_times(rng: Rng, program: Program, at: Geometry, scale: float) -> dict[int, Times]:
    """Seconds of every convolution for the pairs that can be computed: a channels-last target always, planes sometimes."""
    found: dict[int, Times] = {}
    for number, step in enumerate(program.steps):
        if isinstance(step, Conv):
            pairs: list[tuple[Kind, Kind]] = [(s, "last") for s in at.kinds(step.source)]
            if "planar" in at.kinds(step.target) and "planar" in at.kinds(step.source) and rng.integers(2):
                pairs.append(("planar", "planar"))
            found[number] = {p: float(rng.random()) * scale for p in pairs}
    return found


def total(program: Program, at: Geometry, kinds: list[Kind], times: dict[int, Times]) -> float:
    return sum(step_seconds(program, at, n, kinds, times.__getitem__) for n in range(len(program.steps)))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 100.0])
@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_chosen_can_be_computed(seed: int, scale: float) -> None:
    """Also where a layer takes minutes."""
    rng = np.random.default_rng(seed)
    program = random_program(rng)
    at = geometry(program, 8)
    times = some_times(rng, program, at, scale)
    kinds = choose_layouts(program, at, times.__getitem__)
    assert all(kind in at.kinds(v) for v, kind in enumerate(kinds))
    for number, step in enumerate(program.steps):
        if isinstance(step, Conv):
            reads = source_kind(program, at, kinds, times[number], step.source, step.target)
            assert (reads, kinds[step.target]) in times[number]


@pytest.mark.parametrize("seed", range(12))
def test_no_change_of_one_value_makes_the_choice_cheaper(seed: int) -> None:
    rng = np.random.default_rng(seed)
    program = random_program(rng)
    at = geometry(program, 8)
    times = some_times(rng, program, at, 3e-6)
    kinds = choose_layouts(program, at, times.__getitem__)
    cost = total(program, at, kinds, times)
    for v, kind in product(range(len(kinds)), KINDS):
        if kind in at.kinds(v):
            assert total(program, at, [*kinds[:v], kind, *kinds[v + 1:]], times) >= cost * (1 - 1e-5)
    for start in KINDS:
        uniform: list[Kind] = [start if start in at.kinds(v) else "last" for v in range(len(kinds))]
        assert cost <= total(program, at, uniform, times)


def chain(length: int) -> Program:
    """1x1 convolutions, each followed by the next."""
    conv = BranchedConv.from_dense(np.ones((16, 16, 1, 1), np.float32))
    shape = (16, 8, 8)
    return Program((Value(*shape),) * (length + 1), tuple(Conv(a, b, conv) for a, b in pairwise(range(length + 1))),
                   (Port("x", 0, shape),), (Port("y", length, shape),))


def test_one_slow_pair_turns_the_whole_chain() -> None:
    """Going through a hill: one value alone would only add conversions."""
    program = chain(6)
    at = geometry(program, 8)
    fast: Times = {("planar", "planar"): 1e-5, ("planar", "last"): 9e-5, ("last", "last"): 1.2e-5}
    assert set(choose_layouts(program, at, lambda n: fast)) == {"planar"}
    without: Times = {k: v for k, v in fast.items() if k != ("planar", "planar")}
    kinds = choose_layouts(program, at, lambda n: without)
    assert set(kinds[1:]) == {"last"}


def test_a_lone_faster_layer_is_worth_no_conversions() -> None:
    program = chain(5)
    at = geometry(program, 8)
    slow: Times = {("planar", "planar"): 1.00e-5, ("last", "last"): 1.02e-5, ("planar", "last"): 1.02e-5}
    fast: Times = {("planar", "planar"): 1.00e-5, ("last", "last"): 0.99e-5, ("planar", "last"): 1.02e-5}
    assert set(choose_layouts(program, at, lambda n: fast if n == 2 else slow)) == {"planar"}


@pytest.mark.parametrize("cpu", CPUS.values(), ids=CPUS)
def test_every_convolution_of_a_program_has_a_way_to_a_channels_last_target(cpu: object) -> None:
    for seed in range(6):
        program = random_program(np.random.default_rng(seed))
        at = geometry(program, cpu.lanes)  # type: ignore[attr-defined]
        for number, ways in conv_ways(program, at, cpu).items():
            step = program.steps[number]
            assert isinstance(step, Conv)
            assert {(s, "last") for s in at.kinds(step.source)} <= {w.kinds for w in ways}


def test_integers_of_few_channels_lie_in_words_where_only_convolutions_read_them_and_none_writes_them() -> None:
    grid = Grid(0.5, 3)
    values = (*(Value(c, 8, 8, UINT8, grid) for c in (3, 4, 5, 3, 3, 3, 3, 3)), Value(3, 8, 8))
    conv = {(i, o): BranchedConv.from_dense(np.ones((o, i, 1, 1), np.float32)) for i in (3, 4, 5) for o in (3, 4, 5)}
    steps = (Conv(0, 1, conv[3, 4]), Conv(1, 2, conv[4, 5]), Conv(2, 3, conv[5, 3]), Conv(4, 3, conv[3, 3], residual=6),
             Conv(7, 3, conv[3, 3], residual=7), Dequantise(5, 8), Conv(5, 3, conv[3, 3]), Conv(6, 3, conv[3, 3]),
             Depthwise(0, 3, np.ones((3, 1, 1), np.float32), np.zeros(3, np.float32), (1, 1), (0, 0, 0, 0), (1, 1)))
    at = geometry(Program(values, steps, (), ()), 16)
    assert [at.layouts[n]["last"].words for n in range(9)] == [n in (0, 4) for n in range(9)]
    assert [at.layouts[n]["last"].column for n in range(8)] == [4, 16, 16, 16, 4, 16, 16, 16]


# ---- planes of another size -----------------------------------------------------------------------------------------
def _linear(n: int, m: int) -> Sampling:
    x = np.linspace(0, n - 1, m)
    low = x.astype(np.int64)
    return Sampling(low, np.minimum(low + 1, n - 1), (x - low).astype(np.float32))


def _resized(n: int, m: int) -> tuple[Program, Geometry]:
    """Between two convolutions."""
    values = (Value(16, n, n), Value(16, n, n), Value(16, m, m), Value(16, m, m))
    conv = BranchedConv.from_dense(np.ones((16, 16, 1, 1), np.float32))
    steps = (Conv(0, 1, conv), Resize(1, 2, _linear(n, m), _linear(n, m)), Conv(2, 3, conv))
    program = Program(values, steps, (Port("x", 0, (16, n, n)),), (Port("y", 3, (16, m, m)),))
    return program, geometry(program, 8)


def test_planes_that_are_sampled_by_a_table_are_better_kept_channels_last() -> None:
    program, at = _resized(64, 33)
    kinds = choose_layouts(program, at, lambda number: dict.fromkeys(product(KINDS, KINDS), 1e-6))
    assert (kinds[1], kinds[2]) == ("last", "last")


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_in_the_other_layout_costs_its_conversion(kind: Kind) -> None:
    program, at = _resized(8, 64)
    other: Kind = "last" if kind == "planar" else "planar"

    def seconds(source: Kind) -> float:
        return step_seconds(program, at, 1, [kind, source, kind, kind], lambda number: {})

    assert seconds(other) == pytest.approx(seconds(kind) + conversion_seconds(program, 1))
    phases = Program((Value(64, 4, 4), Value(16, 8, 8)), (Interleave(0, 1, (2, 2)),), (), ())
    costs = [step_seconds(phases, geometry(phases, 8), 0, [source, kind], lambda number: {}) for source in (kind, other)]
    assert costs[1] == pytest.approx(costs[0] + conversion_seconds(phases, 0))
