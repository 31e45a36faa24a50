"""Networks in bf16 and fp16: every value may be rounded to floats of 16 bits, and nothing else goes wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bfloat_kit import PROCESSORS, SAPPHIRE_RAPIDS
from integer_kit import ZEN4, parameter
from plan_kit import Chance, assert_right, built, feeds_for, random_program, resnet20

from gkp.converter.native.dtypes import BFLOAT16, FLOAT16, DType
from gkp.converter.native.kernels.cpu import CPUS, FP16, Cpu
from gkp.converter.native.kernels.layout import NARROW
from gkp.converter.native.kernels.steps import knows_narrow
from gkp.converter.native.planning.geometry import geometry
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import Conv, Program
from gkp.runtime.native import NativeRunner

every_processor = pytest.mark.parametrize("cpu", [*PROCESSORS, parameter(SAPPHIRE_RAPIDS, "avx512_fp16")])


def check(program: Program, cpu: Cpu, timer: Chance | None, tolerance: float) -> int:
    """How many kernels read or write floats of 16 bits. tolerance: of bfloat16; float16 has three bits more."""
    narrow = FLOAT16 if FP16 in cpu.instructions else BFLOAT16
    tolerance = tolerance / 8 if narrow == FLOAT16 else tolerance
    plan = make_plan(program, cpu, timer, narrow=narrow)
    with built(plan) as path:
        for batch, threads in ((2, 1), (3, 2)):
            runner = NativeRunner(path, threads)
            for seed in range(2):
                feeds = feeds_for(program, batch, seed)
                assert_right(program, feeds, runner.run(feeds), f"batch {batch}, {threads} threads, run {seed}", tolerance)
            runner.close()
    return sum(narrow.c in call.kernel.source for call in plan.calls)


@every_processor
@pytest.mark.parametrize("seed", range(4))
def test_random_programs_planned_by_chance(seed: int, cpu: Cpu) -> None:
    """Every way, layout and type is chosen sometimes, sensible or not."""
    check(random_program(np.random.default_rng((3, seed)), 14), cpu, Chance(seed), 8e-2)


@every_processor
def test_resnet20_with_overlapping_branches(cpu: Cpu) -> None:
    assert check(resnet20(np.random.default_rng(0)), cpu, None, 4e-2) > 4


@pytest.mark.parametrize("cpu", PROCESSORS[:1])
def test_resnet20_planned_by_chance(cpu: Cpu) -> None:
    assert check(resnet20(np.random.default_rng(0)), cpu, Chance(0), 4e-2) > 4


@pytest.mark.parametrize("narrow", [BFLOAT16, FLOAT16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("seed", range(10))
def test_outputs_and_what_only_floats_are_written_by_stay_float32(seed: int, narrow: DType) -> None:
    program = random_program(np.random.default_rng((4, seed)), 12)
    plain, at = geometry(program, 16), geometry(program, 16, narrow)
    wide = {port.value for port in program.outputs} | {s.target for s in program.steps if not knows_narrow(s)}
    others = {s.target for s in program.steps if not isinstance(s, Conv)}
    for value, found in enumerate(at.layouts):
        assert {kind: layout for kind, layout in found.items() if kind not in NARROW} == plain.layouts[value]
        assert ("narrow" in at.kinds(value)) == (value not in wide)
        assert ("narrow planes" in found) == (narrow == FLOAT16 and value not in wide | others)
        for kind in NARROW:
            if kind in found:
                assert found[kind].value == replace(program.values[value], dtype=narrow)
                assert found[kind].kind == kind


def test_processors_without_its_instructions_get_none() -> None:
    """The planner takes float32 then: there are no kernels of bfloat16 to choose from."""
    plan = make_plan(resnet20(np.random.default_rng(1), 8), replace(CPUS["x86-64-v4"]), narrow=BFLOAT16)
    convolutions = [call for call in plan.calls if call.macs]
    assert convolutions
    assert not any("Bf16" in call.kernel.source for call in convolutions)
    plan = make_plan(resnet20(np.random.default_rng(1), 8), ZEN4, narrow=FLOAT16)
    assert not any("Fp16" in call.kernel.source for call in plan.calls if call.macs)
