"""Networks in bf16: every value may be rounded to bfloat16, and nothing else goes wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from integer_kit import ZEN4, has
from plan_kit import Chance, assert_right, built, feeds_for, random_program, resnet20

from gkp.converter.native.dtypes import BFLOAT16
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.steps import knows_narrow
from gkp.converter.native.planning.geometry import geometry
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import Program
from gkp.runtime.native import NativeRunner

needs_bf16 = pytest.mark.skipif(not has("avx512_bf16", "avx512_vnni"), reason="this processor has no AVX512-BF16")


def check(program: Program, timer: Chance | None, tolerance: float) -> int:
    """How many kernels read or write bfloat16."""
    plan = make_plan(program, ZEN4, timer, narrow=BFLOAT16)
    with built(plan) as path:
        for batch, threads in ((2, 1), (3, 2)):
            runner = NativeRunner(path, threads)
            for seed in range(2):
                feeds = feeds_for(program, batch, seed)
                assert_right(program, feeds, runner.run(feeds), f"batch {batch}, {threads} threads, run {seed}", tolerance)
            runner.close()
    return sum("Bf16" in call.kernel.source for call in plan.calls)


@needs_bf16
@pytest.mark.parametrize("seed", range(4))
def test_random_programs_planned_by_chance(seed: int) -> None:
    """Every way, layout and type is chosen sometimes, sensible or not."""
    check(random_program(np.random.default_rng((3, seed)), 14), Chance(seed), 8e-2)


@needs_bf16
@pytest.mark.parametrize("timer", [None, Chance(0)], ids=["model", "chance"])
def test_resnet20_with_overlapping_branches(timer: Chance | None) -> None:
    assert check(resnet20(np.random.default_rng(0)), timer, 4e-2) > 4


@pytest.mark.parametrize("seed", range(20))
def test_outputs_and_what_only_floats_are_written_by_stay_float32(seed: int) -> None:
    program = random_program(np.random.default_rng((4, seed)), 12)
    plain, at = geometry(program, 16), geometry(program, 16, narrow=BFLOAT16)
    wide = {port.value for port in program.outputs} | {s.target for s in program.steps if not knows_narrow(s)}
    for value, found in enumerate(at.layouts):
        assert {kind: layout for kind, layout in found.items() if kind != "narrow"} == plain.layouts[value]
        assert ("narrow" in at.kinds(value)) == (value not in wide)
        if "narrow" in found:
            assert found["narrow"].value == replace(program.values[value], dtype=BFLOAT16)
            assert found["narrow"].kind == "narrow"
            assert found["narrow"].padded % 16 == 0


def test_processors_without_its_instructions_get_none() -> None:
    """The planner takes float32 then: there are no kernels of bfloat16 to choose from."""
    plan = make_plan(resnet20(np.random.default_rng(1), 8), replace(CPUS["x86-64-v4"]), narrow=BFLOAT16)
    convolutions = [call for call in plan.calls if call.macs]
    assert convolutions
    assert not any("Bf16" in call.kernel.source for call in convolutions)
