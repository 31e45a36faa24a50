"""Which ways are offered: those whose instructions the processor has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from gkp.branched import BranchedConv
from gkp.converter.native.kernels import pixel
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.way import Trial, Way
from gkp.converter.native.planning.geometry import Geometry, geometry
from gkp.converter.native.planning.ways import FAMILIES, conv_ways, time_ways
from gkp.converter.native.program import Conv, Program, Value

CPU = CPUS["x86-64-v3"]


def one_layer(strides: tuple[int, int] = (1, 1)) -> tuple[Program, Geometry]:
    conv = BranchedConv.from_dense(np.ones((16, 16, 3, 3), np.float32), pads=(1, 1, 1, 1), strides=strides)
    side = 16 // strides[0]
    program = Program((Value(16, 16, 16), Value(16, side, side)), (Conv(0, 1, conv),), (), ())
    return program, geometry(program, CPU.lanes)


def exotic(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Iterator[Way]:
    """A family whose kernels multiply by an instruction that no processor has."""
    for way in pixel.ways(step, source, target, residual, cpu):
        recipe = replace(way.trial.recipe, needs=("vectors", "abacus"))
        yield replace(way, tile="abacus", trial=replace(way.trial, recipe=recipe))


def test_a_family_is_offered_where_the_processor_has_its_instructions() -> None:
    program, at = one_layer()
    able = replace(CPU, instructions=(*CPU.instructions, "abacus"))
    usual, offered, refused = (conv_ways(program, at, cpu, families)[0] for cpu, families in (
        (CPU, FAMILIES), (able, (*FAMILIES, exotic)), (CPU, (*FAMILIES, exotic))))
    assert [way.name for way in refused] == [way.name for way in usual]
    assert [way.tile for way in offered[len(usual):]] != []
    assert sum(way.tile == "abacus" for way in offered) == len(offered) - len(usual) > 0


def test_the_kernels_before_and_after_count_too() -> None:
    program, at = one_layer((2, 2))
    (way, *_) = [w for w in conv_ways(program, at, CPU)[0] if w.before is not None]
    assert way.before is not None
    needy = replace(way.before, recipe=replace(way.before.recipe, needs=("abacus",)))
    assert way.runs_on(CPU)
    assert not replace(way, before=needy).runs_on(CPU)


@pytest.mark.parametrize("cpu", CPUS.values(), ids=CPUS)
def test_every_processor_has_what_the_present_families_need(cpu: Cpu) -> None:
    program, at = one_layer()
    assert {w.kinds for w in conv_ways(program, at, cpu)[0]} == {("planar", "planar"), ("planar", "last"), ("last", "last")}


# ---- what is tried --------------------------------------------------------------------------------------------------
class Clock:
    """Measures as told; notes what it was asked."""

    measures = True

    def __init__(self, seconds: Callable[[Trial], float]) -> None:
        self._seconds, self.rounds = seconds, list[int]()

    def seconds(self, trials: Sequence[Trial]) -> list[float]:
        self.rounds.append(len(trials))
        return [self._seconds(t) for t in trials]


def ways_of_a_network() -> dict[int, list[Way]]:
    found, number = dict[int, list[Way]](), 0
    for strides in ((1, 1), (2, 2), (1, 1)):
        program, at = one_layer(strides)
        found[number], number = conv_ways(program, at, CPU)[0], number + 1
    return found


def test_where_the_model_is_right_the_fastest_is_found_with_fewer_kernels() -> None:
    ways = ways_of_a_network()
    clock = Clock(lambda t: t.cycles / 4e9)
    found = time_ways(ways, clock)
    for n, every in ways.items():
        assert {w.kinds for w in found[n]} == {w.kinds for w in every}
        for w in found[n]:
            assert w.cycles == min(other.cycles for other in every if other.kinds == w.kinds)
    assert len(clock.rounds) == 2, "compiled in two goes"
    assert sum(clock.rounds) < 0.6 * sum(len(w.trials) for every in ways.values() for w in every)


def test_a_sort_that_proves_faster_than_the_model_says_is_tried_further() -> None:
    """The model's favourite among the channel tiles is not the best; another is, by a little."""
    ways = ways_of_a_network()
    tiles = sorted((w for w in ways[0] if w.sort == "channel" and w.kinds == ("last", "last")), key=lambda w: w.cycles)
    best = tiles[2].trial.recipe.source
    clock = Clock(lambda t: 1e-6 if t.recipe.source == best else 1.1e-6 if "tile: channel" in t.recipe.source else 1e-5)
    (last,) = [w for w in time_ways(ways, clock)[0] if w.kinds == ("last", "last")]
    assert last.trial.recipe.source == best


def test_convolutions_that_take_no_time_are_tried_once() -> None:
    ways = ways_of_a_network()
    others = {id(t) for w in ways[1] for t in w.trials}
    clock = Clock(lambda t: 1e-9 if id(t) in others else 1e-3)
    time_ways(ways, clock)
    assert len(clock.rounds) == 2
    first = {(n, w.kinds, w.sort) for n in (0, 2) for w in ways[n]}
    assert clock.rounds[1] <= sum(len(w.trials) for n in (0, 2) for w in ways[n]) - len(first)
