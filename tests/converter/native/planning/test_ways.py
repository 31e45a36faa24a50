"""Which ways are offered: those whose instructions the processor has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from gkp.branched import BranchedConv
from gkp.converter.native.kernels import pixel
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.planning.geometry import Geometry, geometry
from gkp.converter.native.planning.ways import FAMILIES, conv_ways
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
